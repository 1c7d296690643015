// ONNX Runtime Web on the CPU, loaded only by browsers without WebGPU.

/** @import {Answer, Backend, Scene} from "./types.d.ts" */

const MOST_THREADS = 8;

/**
 * @param {Scene} scene
 * @param {URL} base folder of the export
 * @param {{progress: (done: number) => void, threads: number}} options `threads` 0: one per core
 * @returns {Promise<Backend>}
 */
export function openFallback(scene, base, { progress, threads: asked }) {
  const cores = Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1);
  // Threads need the server's headers for cross-origin isolation.
  const threads = globalThis.crossOriginIsolated ? (asked >= 1 ? Math.min(asked, cores) : cores) : 1;
  const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  const canvas = document.createElement("canvas");
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  /** @type {{resolve: (milliseconds: number) => void, reject: (error: Error) => void} | null} */
  let waiting = null;
  let [id, isOpen] = [0, false];
  return new Promise((resolve, reject) => {
    const fail = (/** @type {string} */ sentence) => {
      const error = new Error(sentence);
      if (isOpen) waiting?.reject(error);
      else reject(error);
      worker.terminate();
    };
    worker.addEventListener("error", () => fail("A part of this page did not load. Reload the page, or copy the whole folder of the export to the server again."));
    worker.addEventListener("message", (/** @type {MessageEvent<Answer>} */ { data }) => {
      if (data.kind === "progress") progress(data.done);
      else if (data.kind === "failed") fail(data.sentence);
      else if (data.kind === "frame") {
        if (data.id !== id) return;
        const { width, height, pixels, milliseconds } = data;
        if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
        context.putImageData(new ImageData(new Uint8ClampedArray(/** @type {ArrayBuffer} */ (pixels.buffer)), width), 0, 0);
        waiting?.resolve(milliseconds);
      } else {
        isOpen = true;
        resolve({
          name: `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`,
          canvas,
          resizes: false,
          fits: () => true,
          draw: (camera) =>
            new Promise((done, failed) => {
              waiting = { resolve: done, reject: failed };
              worker.postMessage({ kind: "frame", id: ++id, ...camera });
            }),
          depthAt: () => Promise.resolve(0),
          read: () => Promise.resolve(new Uint8Array(context.getImageData(0, 0, canvas.width, canvas.height).data)),
          close: () => worker.terminate(),
          device: null,
        });
      }
    });
    worker.postMessage({ kind: "start", scene, base: base.href, threads });
  });
}
