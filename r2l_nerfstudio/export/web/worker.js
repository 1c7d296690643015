// Loads ONNX Runtime and the student and renders on the CPU, in a worker, so that the page stays responsive.

import { fetchWhole, MissingFile, unpack } from "./fetching.js";
import { cellRays, missTest, plane, seenCells } from "./rays.js";

/** @import {Answer, Camera, Fallback, FrameRequest, Runtime, Scene, Session, StartRequest} from "./types.d.ts" */
/** @typedef {Camera & {id: number}} View */

/** Rays per evaluation of an R2L student: their encodings take some 30 MB. */
const RAYS_AT_ONCE = 12288;
const COLUMNS = 64;
/** Mean error, in steps of 8-bit color, above which a backend is not used. */
const WRONG = 4;

/** @type {Scene} */
let scene;
/** @type {Runtime} */
let runtime;
/** @type {Session} */
let session;
let newest = -1;
/** @type {Promise<void>} */
let drawing = Promise.resolve();

self.addEventListener("message", (/** @type {MessageEvent<StartRequest | FrameRequest>} */ { data }) => {
  if (data.kind === "start") void start(data);
  else {
    newest = data.id;
    drawing = drawing.then(() => draw(data)).catch((error) => fail("This browser stopped rendering", error));
  }
});

/** @param {Answer} answer @param {Transferable[]} [moved] */
function say(answer, moved = []) {
  self.postMessage(answer, { transfer: moved });
}

/** @param {string} what @param {unknown} error */
function fail(what, error) {
  say({ kind: "failed", sentence: `${what} (${reason(error)}). Reload the page, or use another browser.` });
}

/** @param {unknown} error */
function reason(error) {
  return String(error instanceof Error ? error.message : error).replace(/\s+/g, " ").slice(0, 160);
}

/** @param {StartRequest} request */
async function start(request) {
  try {
    scene = request.scene;
    const { model, runtime: files } = /** @type {Fallback} */ (scene.fallback);
    const total = files.bytes + model.bytes;
    /** @param {number} done */
    const progress = (done) => say({ kind: "progress", done: (0.97 * done) / total });
    const base = new URL(request.base);
    const wasm = await fetchWhole(base, files.wasm, files.bytes, null, progress);
    const weights = await fetchWhole(base, model.file, model.bytes, model.sha256, (done) => progress(files.bytes + done));
    runtime = await import(new URL(files.module, base).href);
    runtime.env.logLevel = "error";
    runtime.env.wasm.wasmPaths = { mjs: new URL(files.loader, base).href };
    runtime.env.wasm.wasmBinary = await unpack(wasm, files.wasm);
    runtime.env.wasm.numThreads = request.threads;
    try {
      session = await runtime.InferenceSession.create(weights, {
        executionProviders: ["wasm"],
        graphOptimizationLevel: "all",
      });
    } catch (error) {
      throw new Error(`the student could not be loaded: ${reason(error)}`);
    }
    if (!((await probe()) < WRONG)) throw new Error("its pixels differ from the student's");
    say({ kind: "ready" });
  } catch (error) {
    if (error instanceof MissingFile) say({ kind: "failed", sentence: error.message });
    else fail("This browser cannot render the scene", error);
  }
}

/** Mean difference from the student's own pixels, in steps of 8-bit color. */
async function probe() {
  const { position, axes, side, focal, pixels } = scene.probe;
  const [right, up, backward] = axes;
  const found = new Int32Array(side * side).fill(background());
  const request = { id: newest, pose: { position, right, up, backward }, width: side, height: side, focal };
  await drawOn(request, found);
  const bytes = new Uint8Array(found.buffer);
  const wanted = Uint8Array.from(atob(pixels), (byte) => byte.charCodeAt(0));
  return wanted.reduce((sum, value, at) => sum + Math.abs(value - bytes[4 * Math.floor(at / 3) + (at % 3)]), 0) / wanted.length;
}

/**
 * @param {Float32Array} origin
 * @param {Float32Array} directions
 * @param {number} rows
 * @param {number} columns
 * @returns {Promise<Int32Array<ArrayBuffer>>} red, green, blue, 255 per pixel
 */
async function evaluate(origin, directions, rows, columns) {
  const { pixels } = await session.run({
    origin: new runtime.Tensor("float32", origin, [3]),
    directions: new runtime.Tensor("float32", directions, [rows, columns, 3]),
  });
  return /** @type {Int32Array<ArrayBuffer>} */ (pixels.data.slice());
}

/** @param {FrameRequest} request */
async function draw(request) {
  if (request.id !== newest) return;
  const started = performance.now();
  const { width, height, id } = request;
  const pixels = new Int32Array(width * height).fill(background());
  if (!(await drawOn(request, pixels))) return;
  say({ kind: "frame", id, width, height, pixels, milliseconds: performance.now() - started }, [pixels.buffer]);
}

/** @param {View} view @param {Int32Array} pixels of the background @returns {Promise<boolean>} whether the image is complete */
async function drawOn(view, pixels) {
  const { pose, width, height } = view;
  const where = plane(width, height, view.focal);
  const misses = missTest(pose, scene.sphere);
  const cells = seenCells(width, height, scene.student.factor, where, misses);
  if (!cells) return true;
  const drawn = scene.student.factor > 1 ? drawImage : drawRays;
  return drawn(view, Float32Array.from(pose.position), where, cells, misses, pixels);
}

function background() {
  const [red, green, blue] = scene.background.map((value) => Math.round(255 * value));
  return red + 256 * green + 65536 * blue - 2 ** 24;
}

/**
 * Render all cells in one evaluation.
 *
 * @param {View} request
 * @param {Float32Array} origin
 * @param {import("./rays.js").Plane} where
 * @param {import("./rays.js").Cells} cells
 * @param {(x: number, y: number) => boolean} misses
 * @param {Int32Array} pixels to draw on
 * @returns {Promise<boolean>} whether the image is complete
 */
async function drawImage(request, origin, where, cells, misses, pixels) {
  const { factor, margin } = scene.student;
  const { raysPerCell } = /** @type {Fallback} */ (scene.fallback);
  const { width, height } = request;
  const [rows, columns] = [cells.rows, cells.columns].map((count) => (count + 2 * margin) * raysPerCell);
  const [top0, left0] = [cells.top, cells.left].map((first) => (first - margin) * raysPerCell);
  const all = { top: top0, left: left0, rows, columns };
  const found = await evaluate(origin, cellRays(request.pose, where, factor / raysPerCell, all, scene.student.rays), rows, columns);
  const stride = cells.columns * factor;
  const [top, left] = [cells.top * factor, cells.left * factor];
  const [bottom, right] = [Math.min(height, top + cells.rows * factor), Math.min(width, left + stride)];
  for (let row = top; row < bottom; row++) {
    const y = where.y(row + 0.5);
    const from = (row - top) * stride - left;
    for (let column = left; column < right; column++) {
      if (!misses(where.x(column + 0.5), y)) pixels[row * width + column] = found[from + column];
    }
  }
  return true;
}

/**
 * Render only the rays that see the scene, in parts. Arguments as of `drawImage`; stops when a newer image is requested.
 *
 * @type {typeof drawImage}
 */
async function drawRays(request, origin, where, cells, misses, pixels) {
  const { width } = request;
  const directions = cellRays(request.pose, where, 1, cells, scene.student.rays);
  const places = new Int32Array(cells.rows * cells.columns);
  let count = 0;
  for (let row = 0; row < cells.rows; row++) {
    const y = where.y(cells.top + row + 0.5);
    for (let column = 0; column < cells.columns; column++) {
      if (misses(where.x(cells.left + column + 0.5), y)) continue;
      const from = 3 * (row * cells.columns + column);
      // Seen rays move to the front.
      directions.copyWithin(3 * count, from, from + 3);
      places[count++] = (cells.top + row) * width + cells.left + column;
    }
  }
  for (let first = 0; first < count; first += RAYS_AT_ONCE) {
    const number = Math.min(RAYS_AT_ONCE, count - first);
    // The rows and columns have no meaning here: the graph's input has two axes, and each ray is evaluated independently.
    const rows = Math.max(3, Math.ceil(number / COLUMNS));
    const part = new Float32Array(3 * rows * COLUMNS).fill(directions[3 * first]);
    part.set(directions.subarray(3 * first, 3 * (first + number)));
    const found = await evaluate(origin, part, rows, COLUMNS);
    for (let ray = 0; ray < number; ray++) pixels[places[first + ray]] = found[ray];
    // Lets the worker receive a newer request.
    await new Promise((resolve) => setTimeout(resolve));
    if (request.id !== newest) return false;
  }
  return true;
}
