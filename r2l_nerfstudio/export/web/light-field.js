// <light-field src="folder/">: a scene in any page. Loads it, renders it as the visitor moves, and shows an error if it cannot.

import { openFallback } from "./fallback.js";
import { fetchWhole, inlined, MissingFile } from "./fetching.js";
import { NoGpu, openGpu } from "./gpu.js";
import { connectInput } from "./input.js";
import { Pace } from "./pace.js";
import { drawnSize } from "./rays.js";
import { OrbitRig, WalkRig } from "./rigs.js";
import { faultyField, SCENE_VERSION } from "./scene.js";
import { MARKUP, STYLE } from "./style.js";
import { WrongWeights } from "./weights.js";

/** @import {Backend, Rig, Scene, Vector} from "./types.d.ts" */

const REST_MS = 180;
/** Time constant of the glide after a release: two thirds of its speed are lost in it. */
const GLIDE_MS = 320;
const FOCUS_MS = 350;
/** Speed of auto-rotate, in shares of the stage's height per millisecond. */
const ROTATION = 0.00009;
const MOST_RESTARTS = 3;
const RESTART_MS = 500;
const AGAIN = "copy the whole folder of the export to the server again.";

const sheet = new CSSStyleSheet();
sheet.replaceSync(STYLE);

export class LightField extends HTMLElement {
  constructor() {
    super();
    const root = this.attachShadow({ mode: "open" });
    root.adoptedStyleSheets = [sheet];
    root.innerHTML = MARKUP;
    /** @type {Backend | null} */
    this.backend = null;
    /** @type {Scene | null} */
    this.scene = null;
    /** @type {Rig | null} */
    this.rig = null;
    this.restarts = 0;
    /** The weights, kept for when the GPU is lost. @type {Promise<Uint8Array<ArrayBuffer>> | null} */
    this.file = null;
    this.arrived = 0;
    /** @type {(() => boolean) | null} */
    this.isHeld = null;
    this.query = new URLSearchParams();
    this.isStarted = false;
    this.frames = 0;
    /** Removes this element's listeners from the page around it. */
    this.ending = new AbortController();
  }

  connectedCallback() {
    if (this.isStarted) return;
    this.isStarted = true;
    this.dataset.state = "loading";
    this.#begin().catch((error) => this.#stop(error));
  }

  disconnectedCallback() {
    this.ending.abort();
    this.backend?.close();
    this.backend = null;
  }

  /** The view in the form that an address takes. */
  get view() {
    return this.rig?.address() ?? "";
  }

  set view(address) {
    this.rig?.reset();
    this.rig?.startFrom(new URLSearchParams(address));
    this.wake?.();
  }

  /** @param {string} id */
  #part(id) {
    return /** @type {HTMLElement} */ (this.shadowRoot?.getElementById(id));
  }

  /** Read the options in the address, before and after its #; the latter take precedence. */
  #readAddress() {
    this.query = new URLSearchParams(this.getAttribute("view") ?? "");
    if (!this.hasAttribute("linked")) return;
    for (const part of [location.search, location.hash.slice(1)]) {
      for (const [name, value] of new URLSearchParams(part)) this.query.set(name, value);
    }
  }

  /** @param {unknown} error unexpected */
  #stop(error) {
    const reason = String(error instanceof Error ? error.message : error).replace(/\s+/g, " ").slice(0, 160);
    this.#fail(`The page stopped (${reason}). Reload it, or ${AGAIN}`);
  }

  /** @param {string} sentence */
  #fail(sentence) {
    const message = this.#part("message");
    message.textContent = sentence;
    message.hidden = false;
    for (const id of ["loading", "figures", "hint", "buttons"]) this.#part(id).hidden = true;
    this.dataset.state = "failed";
    this.backend?.close();
    this.backend = null;
    this.dispatchEvent(new CustomEvent("error", { detail: sentence }));
  }

  async #begin() {
    this.#readAddress();
    const source = this.getAttribute("src");
    // Without src: the folder that holds this module, as in an npm package.
    const base = new URL(`${(source ?? ".").replace(/\/$/, "")}/`, source === null ? import.meta.url : document.baseURI);
    /** @type {any} */
    let scene;
    try {
      const inside = inlined("scene.json");
      const response = inside ? new Response(inside) : await fetch(new URL("scene.json", base));
      if (!response.ok) throw new Error(String(response.status));
      scene = await response.json();
    } catch {
      return this.#fail(`The file scene.json is missing or damaged. To fix this, ${AGAIN}`);
    }
    const fault = faultyField(scene);
    if (fault === "version") {
      return this.#fail(`The file scene.json is of version ${String(scene.version).slice(0, 20)} and this page is of version ${SCENE_VERSION}. Export the scene again and copy the whole folder.`);
    }
    if (fault) return this.#fail(`The file scene.json is not the one that was exported (invalid: ${fault}). To fix this, ${AGAIN}`);
    this.scene = /** @type {Scene} */ (scene);
    await this.#open(this.scene, base);
  }

  /** @param {Scene} scene @param {URL} base */
  async #open(scene, base) {
    const [red, green, blue] = scene.background.map((value) => Math.round(255 * value));
    const stage = this.#part("stage");
    if (!this.hasAttribute("transparent")) this.style.setProperty("--backdrop", `rgb(${red} ${green} ${blue})`);
    if (this.hasAttribute("linked")) document.title = scene.title;
    this.#part("stage").setAttribute("aria-label", `${scene.title}; drag to look around it`);
    const poster = /** @type {HTMLImageElement} */ (this.#part("poster"));
    const inside = inlined(scene.poster);
    poster.src = inside ? URL.createObjectURL(new Blob([inside])) : new URL(scene.poster, base).href;
    const fitPoster = () => {
      const { height } = drawnSize(scene, stage.clientWidth / Math.max(1, stage.clientHeight), 1);
      poster.style.height = `${(100 * scene.picture.height) / height}%`;
    };
    fitPoster();
    this.resizes = new ResizeObserver(() => {
      fitPoster();
      this.wake?.();
    });
    this.resizes.observe(stage);
    this.rig = scene.view.kind === "orbit" ? new OrbitRig(scene.view) : new WalkRig(scene.view);
    this.rig.startFrom(this.query);
    await this.#start(scene, base, this.query.get("backend") === "wasm");
  }

  /**
   * Open the GPU backend, or the fallback for browsers without WebGPU.
   *
   * @param {Scene} scene
   * @param {URL} base
   * @param {boolean} skipsGpu
   */
  async #start(scene, base, skipsGpu) {
    const progress = /** @type {HTMLProgressElement} */ (this.#part("progress"));
    const show = (/** @type {number} */ done) => (progress.value = done);
    const { weights } = scene.student;
    let reason = "the address has backend=wasm";
    if (!skipsGpu) {
      const load = () => {
        this.file ??= fetchWhole(base, weights.file, weights.bytes, weights.sha256, (done) => show(done / weights.bytes)).then((file) => {
          this.arrived = performance.now();
          return file;
        });
        // The error is handled where the file is awaited; without this, browsers report an unhandled rejection first.
        this.file.catch(() => undefined);
        return this.file;
      };
      try {
        this.backend = await openGpu(scene, load, {
          transparent: this.hasAttribute("transparent"),
          lost: () => this.#recover(scene, base),
        });
      } catch (error) {
        if (error instanceof MissingFile) return this.#fail(error.message);
        if (error instanceof WrongWeights) return this.#fail(`The file ${weights.file} is damaged (${error.message}). To fix this, ${AGAIN}`);
        reason = String(error instanceof Error ? error.message : error);
        if (!(error instanceof NoGpu)) reason = `it failed: ${reason}`;
        console.info(`WebGPU is not used: ${reason}`);
      }
    }
    if (!this.backend) {
      if (!scene.fallback) {
        return this.#fail("This browser cannot render the scene: it needs WebGPU, which is missing or disabled. Current versions of Chrome, Edge, Firefox and Safari have it.");
      }
      if (!canRunWasm()) {
        return this.#fail("This browser cannot render the scene: it needs WebGPU or WebAssembly SIMD. Current versions of Chrome, Edge, Firefox and Safari have both.");
      }
      try {
        this.backend = await openFallback(scene, base, { progress: show, threads: Number(this.query.get("threads")) || 0 });
      } catch (error) {
        return this.#fail(error instanceof Error ? error.message : String(error));
      }
    }
    this.dataset.backend = this.backend.name;
    const stage = this.#part("stage");
    stage.querySelector("canvas")?.remove();
    this.backend.canvas.setAttribute("aria-hidden", "true");
    stage.append(this.backend.canvas);
    this.#play(scene, this.backend);
  }

  /** Restart after the GPU was lost, for example by a driver update or a sleeping laptop. @param {Scene} scene @param {URL} base */
  #recover(scene, base) {
    this.backend = null;
    this.dataset.state = "loading";
    this.dataset.restarts = String(++this.restarts);
    // A browser that lost its GPU process has no adapter for a moment.
    setTimeout(() => this.#start(scene, base, this.restarts > MOST_RESTARTS).catch((error) => this.#stop(error)), RESTART_MS);
  }

  /** Render whenever something changed. @param {Scene} scene @param {Backend} backend */
  #play(scene, backend) {
    const stage = this.#part("stage");
    const rig = /** @type {Rig} */ (this.rig);
    const own = scene.picture;
    const isImage = scene.student.factor > 1;
    const calm = matchMedia("(prefers-reduced-motion: reduce)");
    const aspect = () => stage.clientWidth / Math.max(1, stage.clientHeight);
    // As fine as the screen, at least as fine as the student learned, and no finer than twice that.
    const largest = () => {
      const pixels = stage.clientWidth * stage.clientHeight * Math.min(devicePixelRatio, 2) ** 2;
      let scale = Math.min(2, Math.max(backend.resizes ? 1 : 0.25, Math.sqrt(pixels / (own.width * own.height))));
      const fits = () => {
        const { width, height } = drawnSize(scene, aspect(), scale);
        return backend.fits(width, height);
      };
      while (!fits() && scale > 0.1) scale *= 0.9;
      return scale;
    };
    const side = Math.min(2048, Number(this.query.get("size")) || 0);
    // MobileR2L students only render well at the pixel pitch of their training views.
    const fixed = isImage ? Math.min(1, largest()) : side > 0 ? side / Math.sqrt(own.width * own.height) : null;
    const pace = new Pace(fixed, own.width * own.height, largest());
    let [isBusy, wantsFrame, shown, asked, lastMove, lastTick, ticking] = [false, true, 0, 0, -1e9, 0, 0];
    let [glideRight, glideDown] = [0, 0];
    /** @type {{point: Vector, left: number} | null} */
    let focusing = null;
    const canRotate = (this.hasAttribute("auto-rotate") || this.query.has("rotate")) && !calm.matches;
    let isRotating = canRotate && !this.wasTouched;

    const wake = () => {
      pace.largest = largest();
      wantsFrame = true;
      if (!ticking && this.backend === backend) {
        lastTick = performance.now();
        ticking = requestAnimationFrame(tick);
      }
    };
    this.wake = wake;
    const moved = () => {
      lastMove = performance.now();
      isRotating = false;
      focusing = null;
      this.wasTouched = true;
      this.#part("hint").classList.add("seen");
      wake();
    };
    this.moved = moved;
    const thrown = (/** @type {number} */ right, /** @type {number} */ down) => {
      [glideRight, glideDown] = calm.matches ? [0, 0] : [right, down];
    };
    const doubleTapped = async (/** @type {number} */ x, /** @type {number} */ y) => {
      const pose = rig.pose();
      const { width, height } = drawnSize(scene, aspect(), 1);
      const depth = await backend.depthAt(x, y);
      if (!(depth > 0)) return;
      const [across, up] = [((x - 0.5) * width) / own.focal, ((0.5 - y) * height) / own.focal];
      const far = depth / (scene.student.rays.planar ? 1 : Math.hypot(across, up, 1));
      const point = /** @type {Vector} */ (
        pose.position.map((value, axis) => value + far * (across * pose.right[axis] + up * pose.up[axis] - pose.backward[axis]))
      );
      moved();
      focusing = { point, left: calm.matches ? 1 : FOCUS_MS };
    };
    const reset = () => {
      rig.reset();
      rig.startFrom(this.query);
      thrown(0, 0);
      moved();
    };
    this.isHeld ??= this.#connect({ reset, thrown: (right, down) => this.thrown?.(right, down), doubleTapped: (x, y) => void this.doubleTapped?.(x, y) });
    this.thrown = thrown;
    this.doubleTapped = doubleTapped;
    this.reset = reset;

    /** @param {number} scale */
    const draw = (scale) => {
      const drawn = drawnSize(scene, aspect(), scale);
      if (backend.resizes) {
        const ratio = Math.min(devicePixelRatio, 2);
        const [width, height] = [stage.clientWidth, stage.clientHeight].map((length) => Math.max(1, Math.round(length * ratio)));
        if (backend.canvas.width !== width || backend.canvas.height !== height) {
          [backend.canvas.width, backend.canvas.height] = [width, height];
        }
      }
      asked = scale;
      isBusy = true;
      wantsFrame = false;
      const view = rig.address();
      backend.draw({ pose: rig.pose(), ...drawn, focal: own.focal * scale }).then(
        (milliseconds) => {
          if (this.backend !== backend) return;
          isBusy = false;
          shown = asked;
          pace.took(drawn.width * drawn.height, milliseconds, performance.now());
          this.#drawn({ ...drawn, milliseconds, view, speed: pace.framesPerSecond(performance.now()) });
          if (!ticking) ticking = requestAnimationFrame(tick);
        },
        (error) => {
          if (this.backend === backend) this.#stop(error);
        },
      );
    };

    /** @param {number} now */
    const tick = (now) => {
      ticking = 0;
      if (this.backend !== backend) return;
      const passed = Math.min(100, Math.max(0, now - lastTick));
      lastTick = now;
      const isHeld = this.isHeld?.() ?? false;
      if (!isHeld && Math.hypot(glideRight, glideDown) > 2e-6) {
        rig.turn(glideRight * passed, glideDown * passed);
        const left = Math.exp(-passed / GLIDE_MS);
        [glideRight, glideDown, lastMove, wantsFrame] = [glideRight * left, glideDown * left, now, true];
      } else if (!isHeld) [glideRight, glideDown] = [0, 0];
      if (focusing) {
        rig.focus(focusing.point, Math.min(1, passed / Math.max(1, focusing.left)));
        focusing.left -= passed;
        [lastMove, wantsFrame] = [now, true];
        if (focusing.left <= 0) focusing = null;
      }
      if (isRotating) {
        rig.turn(ROTATION * passed, 0);
        [lastMove, wantsFrame] = [now, true];
      }
      if (!isHeld && rig.settle(passed)) wantsFrame = true;
      if (!stage.clientWidth || !stage.clientHeight) return;
      const isMoving = now - lastMove < REST_MS;
      const isCoarse = shown < 0.99 * pace.resting(shown);
      if (wantsFrame && !isBusy) draw(pace.moving());
      else if (!isBusy && !isMoving && isCoarse) draw(pace.resting(shown));
      const isResting = !isBusy && !wantsFrame && !isMoving && !isCoarse && !isHeld;
      this.dataset.state = isResting ? "resting" : "drawing";
      // At rest no frame is requested, which saves battery. A hidden page gets none anyway.
      if (!isResting && !isBusy) ticking = requestAnimationFrame(tick);
      else if (isBusy && (isHeld || isRotating || focusing || glideRight || glideDown)) ticking = requestAnimationFrame(tick);
    };
    wake();
  }

  /**
   * Connect mouse, touch, keys and buttons, once for all backends.
   *
   * @param {{reset: () => void, thrown: (right: number, down: number) => void, doubleTapped: (x: number, y: number) => void}} events
   */
  #connect(events) {
    const stage = this.#part("stage");
    const rig = /** @type {Rig} */ (this.rig);
    const scene = /** @type {Scene} */ (this.scene);
    const { signal } = this.ending;
    const keys = /** @type {HTMLDialogElement} */ (this.#part("keys"));
    const [reset, help] = [() => this.reset?.(), () => keys.showModal()];
    const fullscreen = () => {
      if (document.fullscreenElement) void document.exitFullscreen();
      else void this.requestFullscreen?.().catch(() => undefined);
    };
    const share = async () => {
      const address = new URL(location.href);
      address.hash = this.view;
      if (this.hasAttribute("linked")) history.replaceState(null, "", address);
      try {
        if (navigator.share && matchMedia("(pointer: coarse)").matches) await navigator.share({ title: scene.title, url: address.href });
        else {
          await navigator.clipboard.writeText(address.href);
          this.#toast("Link copied");
        }
      } catch {
        this.#toast("The link is in the address bar");
      }
    };
    const moved = () => this.moved?.();
    const hand = connectInput(stage, rig, { ...events, moved }, { r: reset, f: fullscreen, h: help, l: () => void share() });
    for (const [id, act] of /** @type {const} */ ([["reset", reset], ["help", help], ["fullscreen", fullscreen], ["share", share]])) {
      this.#part(id).addEventListener("click", () => void act());
    }
    this.#part("fullscreen").hidden = !document.fullscreenEnabled;
    const follow = () => {
      this.#readAddress();
      this.reset?.();
    };
    if (this.hasAttribute("linked")) window.addEventListener("hashchange", follow, { signal });
    document.addEventListener("visibilitychange", () => this.wake?.(), { signal });
    return hand;
  }

  /** @param {string} sentence shown briefly */
  #toast(sentence) {
    const toast = this.#part("toast");
    toast.textContent = sentence;
    toast.hidden = false;
    setTimeout(() => (toast.hidden = true), 2500);
  }

  /** @param {{width: number, height: number, milliseconds: number, view: string, speed: number}} frame */
  #drawn({ width, height, milliseconds, view, speed }) {
    const possible = 1000 / Math.max(milliseconds, 0.1);
    const rate = speed > 1 ? speed : possible < 10 ? Number(possible.toFixed(1)) : Math.round(possible);
    const taken = milliseconds < 10 ? milliseconds.toFixed(1) : milliseconds.toFixed(0);
    this.#part("speed").textContent = `${rate} fps · ${taken} ms`;
    this.#part("details").textContent = ` · ${width}×${height} · ${this.backend?.name}`;
    Object.assign(this.dataset, { view, frames: String(++this.frames), milliseconds: milliseconds.toFixed(2), size: `${width}x${height}` });
    if (this.frames > 1) return;
    if (this.arrived) this.dataset.firstFrame = (performance.now() - this.arrived).toFixed(0);
    const scene = /** @type {Scene} */ (this.scene);
    const runtime = this.backend?.device || !scene.fallback ? "" : ` by ONNX Runtime Web ${scene.fallback.runtime.version}`;
    this.#part("about").textContent = `${scene.title}: ${scene.method}, rendered with ${this.backend?.name}${runtime}.`;
    const isPlain = this.hasAttribute("plain") || this.query.has("plain");
    for (const id of ["poster", "loading"]) this.#part(id).hidden = true;
    for (const id of ["figures", "buttons", "hint"]) this.#part(id).hidden = isPlain;
    this.#part("stage").setAttribute("aria-busy", "false");
    if (this.hasAttribute("linked")) this.#part("stage").focus({ preventScroll: true });
    setTimeout(() => this.#part("hint").classList.add("seen"), 6000);
    this.dispatchEvent(new CustomEvent("ready"));
  }
}

/** Whether the browser has WebAssembly with SIMD: validates the smallest module that uses it. */
function canRunWasm() {
  const vector = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
  return typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(vector));
}

customElements.define("light-field", LightField);
