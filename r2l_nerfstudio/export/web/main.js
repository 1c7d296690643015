// The page: loads a scene, draws it as the visitor moves, and says so where it cannot.

import { listen } from "./hands.js";
import { Pace } from "./pace.js";
import { drawnSize } from "./rays.js";
import { OrbitRig, WalkRig } from "./rigs.js";
import { faultyField } from "./scene.js";

/** @import {Answer, Scene} from "./types.d.ts" */

const MOST_THREADS = 8;
const REST_MS = 180;

/** @template {HTMLElement} T @param {string} id @param {new () => T} kind @returns {T} */
function element(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${id}`);
  return found;
}

const stage = element("stage", HTMLElement);
const canvas = element("picture", HTMLCanvasElement);
const poster = element("poster", HTMLImageElement);
const loading = element("loading", HTMLDivElement);
const figures = element("figures", HTMLParagraphElement);
const hint = element("hint", HTMLParagraphElement);
const query = new URLSearchParams();

/** What the address asks for, before and after its #; the latter wins. */
function readAddress() {
  for (const name of [...query.keys()]) query.delete(name);
  for (const part of [location.search, location.hash.slice(1)]) {
    for (const [name, value] of new URLSearchParams(part)) query.set(name, value);
  }
}

readAddress();

/** @param {string} sentence */
function giveUp(sentence) {
  const message = element("message", HTMLParagraphElement);
  message.textContent = sentence;
  message.hidden = false;
  loading.hidden = true;
  figures.hidden = true;
  hint.hidden = true;
  document.body.dataset.state = "failed";
}

begin().catch(stop);

/** @param {unknown} error that nobody foresaw */
function stop(error) {
  const reason = String(error instanceof Error ? error.message : error).replace(/\s+/g, " ").slice(0, 160);
  giveUp(`This page stopped (${reason}): load it again, or copy the whole folder of the export to the server again.`);
}

async function begin() {
  if (!canRun()) return giveUp("This browser cannot draw the scene: it lacks fast WebAssembly. A current Chrome, Edge, Firefox or Safari has it.");
  /** @type {Scene} */
  let scene;
  try {
    const response = await fetch("scene.json");
    if (!response.ok) throw new Error(String(response.status));
    scene = await response.json();
  } catch {
    return giveUp("The file scene.json is missing or damaged: copy the whole folder of the export to the server again.");
  }
  const fault = faultyField(scene);
  if (fault) return giveUp(`The file scene.json is not the one that was exported (wrong: ${fault}): copy the whole folder of the export to the server again.`);
  const [red, green, blue] = scene.background.map((value) => Math.round(255 * value));
  document.documentElement.style.setProperty("--backdrop", `rgb(${red} ${green} ${blue})`);
  document.title = scene.title;
  const fitPoster = () => {
    const { height } = drawnSize(scene, stage.clientWidth / Math.max(1, stage.clientHeight), 1);
    poster.style.height = `${(100 * scene.picture.height) / height}%`;
  };
  fitPoster();
  new ResizeObserver(fitPoster).observe(stage);
  const wanted = query.get("backend");
  const hasGpu = "gpu" in navigator && wanted !== "wasm";
  run(scene, hasGpu ? "webgpu" : "wasm");
}

/** Whether WebAssembly and its vector instructions are there: the smallest module that uses one. */
function canRun() {
  const vector = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
  return typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(vector));
}

/**
 * @param {Scene} scene
 * @param {"webgpu" | "wasm"} backend
 */
function run(scene, backend) {
  const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.addEventListener("error", () => giveUp("A part of this page did not load: copy the whole folder of the export to the server again, or load the page again."));
  const asked = Number(query.get("threads"));
  const cores = Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1);
  const threads = globalThis.crossOriginIsolated ? (asked >= 1 ? Math.min(asked, cores) : cores) : 1;
  /** @type {((answer: Answer) => void) | null} */
  let show = null;
  worker.addEventListener("message", (/** @type {MessageEvent<Answer>} */ { data }) => {
    if (data.kind === "progress") {
      element("loading-text", HTMLSpanElement).textContent = data.text;
      element("progress", HTMLProgressElement).value = data.done;
    } else if (data.kind === "refused") {
      // The GPU's driver, its memory, the browser: whatever it is, the processor draws too.
      console.info(`WebGPU is not used: ${data.reason}`);
      worker.terminate();
      run(scene, "wasm");
    } else if (data.kind === "failed") {
      worker.terminate();
      if (document.body.dataset.backend === "WebGPU") run(scene, "wasm");
      else giveUp(data.sentence);
    } else if (data.kind === "ready") {
      document.body.dataset.backend = data.backend;
      try {
        show = play(scene, worker, data.backend);
      } catch (error) {
        worker.terminate();
        stop(error);
      }
    } else show?.(data);
  });
  worker.postMessage({ kind: "start", scene, base: document.baseURI, backend, threads });
}

/** @type {AbortController | null} */
let playing = null;

/**
 * Draw whenever something changed.
 *
 * @param {Scene} scene
 * @param {Worker} worker
 * @param {string} backend
 * @returns {(answer: Answer) => void} takes finished pictures
 */
function play(scene, worker, backend) {
  playing?.abort();
  playing = new AbortController();
  const { signal } = playing;
  const rig = scene.view.kind === "orbit" ? new OrbitRig(scene.view) : new WalkRig(scene.view);
  rig.startFrom(query);
  const own = scene.picture;
  // As fine as the screen, but no finer than twice what the student learnt from.
  const largest = () => {
    const pixels = stage.clientWidth * stage.clientHeight * Math.min(devicePixelRatio, 2) ** 2;
    return Math.min(2, Math.max(0.25, Math.sqrt(pixels / (own.width * own.height))));
  };
  const side = Math.min(2048, Number(query.get("size")) || 0);
  // Whole images are drawn at the pitch they were learnt at, or not well.
  const fixed = scene.factor > 1 ? 1 : side > 0 ? side / Math.sqrt(own.width * own.height) : null;
  const pace = new Pace(fixed, own.width * own.height, largest());
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  let [id, isBusy, wantsFrame, shown, asked, lastMove, lastTick] = [0, false, true, 0, 0, -1e9, performance.now()];
  let isFirst = true;
  let drawnView = "";

  const moved = () => {
    wantsFrame = true;
    lastMove = performance.now();
    if (!hint.classList.contains("seen")) hint.classList.add("seen");
  };
  const reset = () => {
    rig.reset();
    rig.startFrom(query);
    moved();
  };
  // A page around this one moves it by the address.
  const follow = () => {
    readAddress();
    reset();
  };
  window.addEventListener("hashchange", follow, { signal });
  const toggleFullscreen = () => {
    if (document.fullscreenElement) void document.exitFullscreen();
    else void document.documentElement.requestFullscreen?.().catch(() => undefined);
  };
  const keys = element("keys", HTMLDialogElement);
  const isHandOn = listen(canvas, rig, moved, { r: reset, f: toggleFullscreen, h: () => keys.showModal() }, signal);
  canvas.addEventListener("dblclick", reset, { signal });
  element("reset", HTMLButtonElement).addEventListener("click", reset, { signal });
  element("help", HTMLButtonElement).addEventListener("click", () => keys.showModal(), { signal });
  const fullscreen = element("fullscreen", HTMLButtonElement);
  fullscreen.addEventListener("click", toggleFullscreen, { signal });
  fullscreen.hidden = !document.fullscreenEnabled;
  element("about", HTMLParagraphElement).textContent =
    `${scene.title}: ${scene.method}, drawn with ${backend} by ONNX Runtime Web ${scene.runtime.version}.`;
  new ResizeObserver(() => {
    pace.largest = largest();
    wantsFrame = true;
  }).observe(stage);

  /** @param {number} scale */
  const ask = (scale) => {
    const drawn = drawnSize(scene, stage.clientWidth / Math.max(1, stage.clientHeight), scale);
    asked = scale;
    drawnView = rig.address();
    isBusy = true;
    wantsFrame = false;
    const focal = own.focal * scale;
    worker.postMessage({ kind: "frame", id: ++id, pose: rig.pose(), ...drawn, focal });
  };

  /** @param {number} now */
  const tick = (now) => {
    if (signal.aborted) return;
    requestAnimationFrame(tick);
    if (!isHandOn() && rig.settle(Math.min(100, now - lastTick))) wantsFrame = true;
    lastTick = now;
    if (!stage.clientWidth || !stage.clientHeight) return;
    const isMoving = now - lastMove < REST_MS;
    if (wantsFrame && (!isBusy || asked > 1.5 * pace.moving())) ask(pace.moving());
    else if (!isBusy && !isMoving && shown < 0.99 * pace.resting(shown)) ask(pace.resting(shown));
    document.body.dataset.state = isBusy || wantsFrame || shown < 0.99 * pace.resting(shown) ? "drawing" : "resting";
  };
  requestAnimationFrame(tick);

  return (answer) => {
    if (answer.kind !== "frame" || signal.aborted || answer.id !== id) return;
    const { width, height, pixels, milliseconds } = answer;
    const now = performance.now();
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const bytes = new Uint8ClampedArray(/** @type {ArrayBuffer} */ (pixels.buffer));
    context.putImageData(new ImageData(bytes, width), 0, 0);
    isBusy = false;
    shown = asked;
    pace.took(width * height, milliseconds, now);
    element("speed", HTMLSpanElement).textContent = speed(pace, now);
    element("details", HTMLSpanElement).textContent = ` · ${width}×${height} · ${backend}`;
    document.body.dataset.view = drawnView;
    document.body.dataset.frames = String(Number(document.body.dataset.frames ?? 0) + 1);
    document.body.dataset.milliseconds = milliseconds.toFixed(2);
    if (isFirst) arrive();
    isFirst = false;
  };
}

/** @param {Pace} pace @param {number} now */
function speed(pace, now) {
  const rate = Math.max(1, pace.framesPerSecond(now));
  const possible = 1000 / Math.max(pace.milliseconds, 0.1);
  const milliseconds = pace.milliseconds < 10 ? pace.milliseconds.toFixed(1) : pace.milliseconds.toFixed(0);
  return `${rate > 1 ? `${rate} fps` : `${possible < 10 ? possible.toFixed(1) : possible.toFixed(0)} fps`} · ${milliseconds} ms`;
}

/** The first picture is there. */
function arrive() {
  stage.setAttribute("aria-busy", "false");
  poster.hidden = true;
  loading.hidden = true;
  const isPlain = query.has("plain");
  figures.hidden = isPlain;
  element("buttons", HTMLElement).hidden = isPlain;
  hint.hidden = isPlain;
  canvas.focus({ preventScroll: true });
  setTimeout(() => hint.classList.add("seen"), 6000);
}
