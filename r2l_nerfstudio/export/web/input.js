// Mouse, touch and keys, translated to rotations, moves and zooms of a rig.

/** @import {Rig} from "./types.d.ts" */

const KEY_STEP = 0.035;
const TAP_MS = 250;
const DOUBLE_TAP_MS = 350;
const TAP_PIXELS = 10;

/**
 * Connect the stage's input to the camera.
 *
 * @param {HTMLElement} stage
 * @param {Rig} rig
 * @param {object} events
 * @param {() => void} events.moved after every step
 * @param {(right: number, down: number) => void} events.thrown on release in motion: shares of the height per ms
 * @param {(x: number, y: number) => void} events.doubleTapped shares of the stage
 * @param {Record<string, () => void>} commands by key
 * @returns {() => boolean} whether a pointer is pressed on the stage
 */
export function connectInput(stage, rig, { moved, thrown, doubleTapped }, commands) {
  /** @type {Map<number, {x: number, y: number}>} */
  const fingers = new Map();
  const height = () => Math.max(1, stage.clientHeight);
  let [speedRight, speedDown, lastMove, tapStart, lastTap] = [0, 0, 0, 0, -1e9];
  let [startX, startY, isTurning] = [0, 0, false];

  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    stage.focus({ preventScroll: true });
    [speedRight, speedDown, tapStart, startX, startY] = [0, 0, event.timeStamp, event.clientX, event.clientY];
    thrown(0, 0);
  });
  stage.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const [right, down] = [(event.clientX - before.x) / height(), (event.clientY - before.y) / height()];
    isTurning = fingers.size === 1 && !(event.buttons & 6 || event.shiftKey);
    if (isTurning) {
      rig.turn(right, down);
      const passed = Math.max(1, event.timeStamp - lastMove);
      // The mean of the last few moves, since single ones jitter.
      speedRight += (right / passed - speedRight) * 0.4;
      speedDown += (down / passed - speedDown) * 0.4;
    } else if (fingers.size === 1) rig.move(right, down);
    else {
      const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
      if (other) {
        const spread = Math.hypot(before.x - other.x, before.y - other.y);
        const next = Math.hypot(event.clientX - other.x, event.clientY - other.y);
        rig.zoom(6 * Math.log(Math.max(next, 1) / Math.max(spread, 1)));
      }
      // Each of two fingers moves their midpoint half as far.
      rig.move(right / 2, down / 2);
    }
    lastMove = event.timeStamp;
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    moved();
  });
  /** @param {PointerEvent} event */
  const release = (event) => {
    if (!fingers.delete(event.pointerId)) return;
    if (event.type === "pointerup" && fingers.size === 0) {
      const isTap = event.timeStamp - tapStart < TAP_MS && Math.hypot(event.clientX - startX, event.clientY - startY) < TAP_PIXELS;
      if (isTap && event.timeStamp - lastTap < DOUBLE_TAP_MS) {
        const box = stage.getBoundingClientRect();
        doubleTapped((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
      } else if (isTurning && event.timeStamp - lastMove < 50) thrown(speedRight, speedDown);
      lastTap = isTap ? event.timeStamp : -1e9;
    }
    isTurning = false;
    moved();
  };
  for (const name of /** @type {const} */ (["pointerup", "pointercancel", "lostpointercapture"])) {
    stage.addEventListener(name, release);
  }
  stage.addEventListener("contextmenu", (event) => event.preventDefault());
  stage.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const pixels = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY : 33 * event.deltaY;
      // Touchpads report a pinch as small wheel steps with the control key.
      rig.zoom(-Math.max(-3, Math.min(3, (event.ctrlKey ? 6 : 1) * (pixels / 100))));
      moved();
    },
    { passive: false },
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
  // Only while the stage has the focus: the page may hold more than a scene.
  stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const [step, command] = [steps[key], commands[key]];
    if (!step && !command) return;
    event.preventDefault();
    if (command && !event.repeat) command();
    if (step) {
      thrown(0, 0);
      step();
      moved();
    }
  });
  return () => fingers.size > 0;
}
