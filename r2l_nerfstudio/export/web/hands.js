// Mouse, touch and keys, as turns, moves and zooms of a rig.

/** @import {OrbitRig, WalkRig} from "./rigs.js" */

const KEY_STEP = 0.035;

/**
 * Let a visitor move the camera.
 *
 * @param {HTMLElement} stage
 * @param {OrbitRig | WalkRig} rig
 * @param {() => void} moved called after every step
 * @param {Record<string, () => void>} commands by key
 * @param {AbortSignal} signal ends it
 * @returns {() => boolean} whether a hand is on the stage
 */
export function listen(stage, rig, moved, commands, signal) {
  /** @type {Map<number, {x: number, y: number}>} */
  const fingers = new Map();
  const height = () => Math.max(1, stage.clientHeight);

  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    stage.focus({ preventScroll: true });
  }, { signal });
  stage.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const [right, down] = [(event.clientX - before.x) / height(), (event.clientY - before.y) / height()];
    if (fingers.size === 1) {
      if (event.buttons & 6 || event.shiftKey) rig.move(right, down);
      else rig.turn(right, down);
    } else {
      const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
      if (other) {
        const spread = Math.hypot(before.x - other.x, before.y - other.y);
        const next = Math.hypot(event.clientX - other.x, event.clientY - other.y);
        rig.zoom(6 * Math.log(Math.max(next, 1) / Math.max(spread, 1)));
      }
      // Each of two fingers moves the point between them half as far.
      rig.move(right / 2, down / 2);
    }
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    moved();
  }, { signal });
  for (const name of /** @type {const} */ (["pointerup", "pointercancel", "lostpointercapture"])) {
    stage.addEventListener(name, (event) => {
      if (fingers.delete(event.pointerId)) moved();
    }, { signal });
  }
  stage.addEventListener("contextmenu", (event) => event.preventDefault(), { signal });
  stage.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const pixels = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY : 33 * event.deltaY;
      // Touchpads send a pinch as a wheel with the control key, in small steps.
      rig.zoom(-Math.max(-3, Math.min(3, (event.ctrlKey ? 6 : 1) * (pixels / 100))));
      moved();
    },
    { passive: false, signal },
  );

  /** @type {Record<string, () => void>} */
  const steps = {
    ArrowLeft: () => rig.turn(-KEY_STEP, 0),
    ArrowRight: () => rig.turn(KEY_STEP, 0),
    ArrowUp: () => rig.turn(0, -KEY_STEP),
    ArrowDown: () => rig.turn(0, KEY_STEP),
    "+": () => rig.zoom(0.5),
    "=": () => rig.zoom(0.5),
    "-": () => rig.zoom(-0.5),
    w: () => rig.move(0, KEY_STEP),
    a: () => rig.move(KEY_STEP, 0),
    s: () => rig.move(0, -KEY_STEP),
    d: () => rig.move(-KEY_STEP, 0),
  };
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const [step, command] = [steps[key], commands[key]];
    if (!step && !command) return;
    event.preventDefault();
    if (command && !event.repeat) command();
    if (step) {
      step();
      moved();
    }
  }, { signal });
  return () => fingers.size > 0;
}
