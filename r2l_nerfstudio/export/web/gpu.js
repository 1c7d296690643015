// The WebGPU backend: opens the GPU, checks that it renders this student correctly, and reports when it is lost.

import { Renderer } from "./renderer.js";

/** @import {Backend, Camera, Scene} from "./types.d.ts" */

/** Mean error, in steps of 8-bit color, above which the GPU is not used. */
const WRONG = 4;

/** The GPU cannot be used, but the fallback may work. */
export class NoGpu extends Error {}

/**
 * @param {Scene} scene
 * @param {() => Promise<Uint8Array<ArrayBuffer>>} load the weights, once there is a GPU; shaders are compiled meanwhile
 * @param {{lost: () => void, transparent: boolean}} options
 * @returns {Promise<Backend>}
 */
export async function openGpu(scene, load, { lost, transparent }) {
  const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) throw new NoGpu("no adapter is available");
  const file = load();
  const { maxBufferSize, maxStorageBufferBindingSize } = adapter.limits;
  const device = await adapter.requestDevice({
    requiredFeatures: adapter.features.has("shader-f16") ? ["shader-f16"] : [],
    requiredLimits: { maxBufferSize, maxStorageBufferBindingSize },
  });
  let isClosed = false;
  void device.lost.then(() => {
    if (!isClosed) lost();
  });
  const most = Math.min(maxBufferSize, maxStorageBufferBindingSize);
  const close = () => {
    isClosed = true;
    device.destroy();
  };
  try {
    device.pushErrorScope("validation");
    device.pushErrorScope("out-of-memory");
    const renderer = new Renderer(scene, device);
    await renderer.load(await file);
    const difference = await probe(renderer, scene);
    for (const error of [await device.popErrorScope(), await device.popErrorScope()]) {
      if (error) throw new NoGpu(error.message);
    }
    if (!(difference < WRONG)) throw new NoGpu(`its pixels are wrong by ${difference.toFixed(0)} of 255`);
    return backend(renderer, { most, close, transparent });
  } catch (error) {
    close();
    throw error;
  }
}

/** Mean difference from the student's own pixels: some drivers compute wrong results without an error. @param {Renderer} renderer @param {Scene} scene */
async function probe(renderer, { probe: { position, axes, side, focal, pixels } }) {
  const [right, up, backward] = axes;
  await renderer.draw({ pose: { position, right, up, backward }, width: side, height: side, focal }, null);
  const found = await renderer.read(side, side);
  const wanted = Uint8Array.from(atob(pixels), (byte) => byte.charCodeAt(0));
  const sum = wanted.reduce((total, value, at) => total + Math.abs(value - found[4 * Math.floor(at / 3) + (at % 3)]), 0);
  return sum / wanted.length;
}

/**
 * @param {Renderer} renderer
 * @param {{most: number, close: () => void, transparent: boolean}} options
 * @returns {Backend}
 */
function backend(renderer, { most, close, transparent }) {
  const canvas = document.createElement("canvas");
  const context = /** @type {GPUCanvasContext} */ (canvas.getContext("webgpu"));
  context.configure({ device: renderer.device, format: renderer.format, alphaMode: transparent ? "premultiplied" : "opaque" });
  /** @type {Camera | null} */
  let last = null;
  return {
    name: "WebGPU",
    canvas,
    resizes: true,
    fits: (width, height) => renderer.largestBuffer(width, height) <= most,
    async draw(camera) {
      last = camera;
      const started = performance.now();
      await renderer.draw(camera, context, transparent);
      return performance.now() - started;
    },
    depthAt: async (x, y) => {
      if (!last) return 0;
      const [column, row] = [Math.floor(x * last.width), Math.floor(y * last.height)];
      return renderer.depthAt(Math.min(row, last.height - 1) * last.width + Math.min(column, last.width - 1));
    },
    read: () => (last ? renderer.read(last.width, last.height) : Promise.resolve(new Uint8Array())),
    close,
    device: renderer.device,
  };
}
