// Camera rigs: how input moves the camera. Beyond the region that the student was trained on, the camera slows down and
// returns.

/** @import {OrbitLimits, Pose, Range, Vector, WalkLimits} from "./types.d.ts" */

const RETURN_MS = 120;

/** @type {(a: Vector, b: Vector, share: number) => Vector} */
const addScaled = (a, b, share) => [a[0] + share * b[0], a[1] + share * b[1], a[2] + share * b[2]];
/** @type {(a: Vector, b: Vector) => number} */
const distanceBetween = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]);
/** @type {(a: Vector) => number} */
const lengthOf = (a) => Math.hypot(a[0], a[1], a[2]);
/** @type {(a: Vector, by: number) => Vector} */
const scaled = (a, by) => [a[0] * by, a[1] * by, a[2] * by];
/** @type {(value: number, range: Range) => number} */
const clamp = (value, range) => Math.min(range[1], Math.max(range[0], value));

/**
 * Apply a step: fully inside a range, with growing resistance beyond it, and never farther out than `give`.
 *
 * @param {number} value
 * @param {number} step
 * @param {Range} range
 * @param {number} give
 */
export function softStep(value, step, range, give) {
  const next = value + step;
  const inside = clamp(next, range);
  const beyond = next - inside;
  const outwards = Math.abs(beyond) > Math.abs(value - clamp(value, range));
  if (!beyond || !outwards) return next;
  // Relative to the present position, so that repeated steps outwards become ever smaller.
  const before = Math.min(Math.abs(value - clamp(value, range)), give);
  const traveled = Math.abs(beyond) - before;
  return inside + Math.sign(beyond) * (before + (give - before) * (1 - Math.exp(-traveled / give)));
}

/** @type {(value: number, range: Range, milliseconds: number) => number} */
function comeBack(value, range, milliseconds) {
  const target = clamp(value, range);
  const left = (value - target) * Math.exp(-milliseconds / RETURN_MS);
  return Math.abs(left) < 1e-5 ? target : target + left;
}

/**
 * Axes of a camera on a sphere, looking at its center.
 *
 * @param {[Vector, Vector, Vector]} frame
 * @param {number} azimuth
 * @param {number} elevation
 * @returns {{right: Vector, up: Vector, backward: Vector}}
 */
function axesTowards(frame, azimuth, elevation) {
  const [sinA, cosA, sinE, cosE] = [Math.sin(azimuth), Math.cos(azimuth), Math.sin(elevation), Math.cos(elevation)];
  /** @type {(x: number, y: number, z: number) => Vector} */
  const turn = (x, y, z) => addScaled(addScaled(addScaled([0, 0, 0], frame[0], x), frame[1], y), frame[2], z);
  return {
    right: turn(cosA, 0, -sinA),
    up: turn(-sinA * sinE, cosE, -cosA * sinE),
    backward: turn(sinA * cosE, sinE, cosA * cosE),
  };
}

/** Orbits the point that the training cameras looked at, or a point near it. */
export class OrbitRig {
  /** @param {OrbitLimits} limits */
  constructor(limits) {
    this.limits = limits;
    this.azimuth = this.elevation = this.distance = 0;
    /** Offset of the orbited point from the center. @type {Vector} */
    this.target = [0, 0, 0];
    this.reset();
  }

  reset() {
    ({ azimuth: this.azimuth, elevation: this.elevation, distance: this.distance } = this.limits.start);
    this.target = [0, 0, 0];
  }

  /** @param {URLSearchParams} query angles in degrees */
  startFrom(query) {
    const { azimuth, elevation, distance, shift } = this.limits;
    const angle = number(query, "azimuth");
    if (angle !== null) this.azimuth = nearestTurn((angle * Math.PI) / 180, azimuth);
    const height = number(query, "elevation");
    if (height !== null) this.elevation = clamp((height * Math.PI) / 180, elevation);
    const far = number(query, "distance");
    if (far !== null) this.distance = clamp(far, distance);
    const target = vector(query, "target");
    if (target) this.target = scaled(target, Math.min(1, shift / Math.max(lengthOf(target), 1e-9)));
  }

  /** The view in the form that an address takes. */
  address() {
    const [azimuth, elevation] = [degrees(this.azimuth), degrees(this.elevation)];
    const target = lengthOf(this.target) > 1e-4 ? `&target=${written(this.target)}` : "";
    return `azimuth=${azimuth}&elevation=${elevation}&distance=${this.distance.toFixed(4)}${target}`;
  }

  /**
   * @param {number} right share of the stage's height
   * @param {number} down
   */
  turn(right, down) {
    const { azimuth, elevation } = this.limits;
    this.azimuth = azimuth ? softStep(this.azimuth, -2.6 * right, azimuth, 0.12) : this.azimuth - 2.6 * right;
    this.elevation = softStep(this.elevation, 2.6 * down, elevation, 0.12);
  }

  /**
   * @param {number} right
   * @param {number} down
   */
  move(right, down) {
    const { right: across, up } = this.pose();
    const step = 0.7 * this.distance;
    this.#aim(addScaled(addScaled(this.target, across, -right * step), up, down * step));
  }

  /** @param {Vector} next */
  #aim(next) {
    const most = this.limits.shift;
    const [before, after] = [lengthOf(this.target), lengthOf(next)];
    const soft = softStep(before, after - before, [0, most], 0.2 * most);
    this.target = scaled(next, after > 0 ? soft / after : 1);
  }

  /** @param {number} steps above 0: closer */
  zoom(steps) {
    const { distance } = this.limits;
    this.distance = softStep(this.distance, this.distance * (Math.exp(-0.16 * steps) - 1), distance, 0.06 * distance[0]);
  }

  /**
   * Move towards a view of a point, from closer.
   *
   * @param {Vector} point
   * @param {number} share of the way
   */
  focus(point, share) {
    const { center, shift, distance } = this.limits;
    const wanted = addScaled(point, center, -1);
    const reached = scaled(wanted, Math.min(1, shift / Math.max(lengthOf(wanted), 1e-9)));
    this.target = addScaled(scaled(this.target, 1 - share), reached, share);
    this.distance += share * (clamp(0.6 * this.distance, distance) - this.distance) * 0.5;
  }

  /**
   * Return towards the region that the student was trained on.
   *
   * @param {number} milliseconds since the last call
   * @returns {boolean} whether anything moved
   */
  settle(milliseconds) {
    const { azimuth, elevation, distance, shift } = this.limits;
    const before = [this.azimuth, this.elevation, this.distance, ...this.target].join();
    if (azimuth) this.azimuth = comeBack(this.azimuth, azimuth, milliseconds);
    this.elevation = comeBack(this.elevation, elevation, milliseconds);
    this.distance = comeBack(this.distance, distance, milliseconds);
    const far = lengthOf(this.target);
    if (far > shift) this.target = scaled(this.target, comeBack(far, [0, shift], milliseconds) / far);
    return before !== [this.azimuth, this.elevation, this.distance, ...this.target].join();
  }

  /** @returns {Pose} */
  pose() {
    const axes = axesTowards(this.limits.frame, this.azimuth, this.elevation);
    const middle = addScaled(this.limits.center, this.target, 1);
    return { ...axes, position: addScaled(middle, axes.backward, this.distance) };
  }
}

/** Moves freely near the positions of the training cameras. */
export class WalkRig {
  /** @param {WalkLimits} limits */
  constructor(limits) {
    this.limits = limits;
    this.azimuth = this.elevation = 0;
    /** @type {Vector} */
    this.position = [0, 0, 0];
    this.reset();
  }

  reset() {
    ({ azimuth: this.azimuth, elevation: this.elevation, position: this.position } = this.limits.start);
  }

  /** @param {URLSearchParams} query angles in degrees */
  startFrom(query) {
    const { azimuth, elevation } = this.limits;
    const angle = number(query, "azimuth");
    if (angle !== null) this.azimuth = nearestTurn((angle * Math.PI) / 180, azimuth);
    const height = number(query, "elevation");
    if (height !== null) this.elevation = clamp((height * Math.PI) / 180, elevation);
    const position = vector(query, "position");
    if (position && nearest(this.limits.positions, position)[1] <= this.limits.reach) this.position = position;
  }

  /** The view in the form that an address takes. */
  address() {
    return `azimuth=${degrees(this.azimuth)}&elevation=${degrees(this.elevation)}&position=${written(this.position)}`;
  }

  /**
   * @param {number} right
   * @param {number} down
   */
  turn(right, down) {
    const { azimuth, elevation } = this.limits;
    // The scene follows the pointer, as with OrbitRig.
    this.azimuth = azimuth ? softStep(this.azimuth, 1.2 * right, azimuth, 0.08) : this.azimuth + 1.2 * right;
    this.elevation = softStep(this.elevation, -1.2 * down, elevation, 0.08);
  }

  /**
   * @param {number} right
   * @param {number} down
   */
  move(right, down) {
    const { right: across, up } = this.pose();
    this.#go(addScaled(addScaled([0, 0, 0], across, -2 * this.limits.reach * right), up, 2 * this.limits.reach * down));
  }

  /** @param {number} steps above 0: forward */
  zoom(steps) {
    this.#go(addScaled([0, 0, 0], this.pose().backward, -0.15 * this.limits.reach * steps));
  }

  /**
   * Move towards a point.
   *
   * @param {Vector} point
   * @param {number} share of the remaining way
   */
  focus(point, share) {
    this.#go(scaled(addScaled(point, this.position, -1), 0.1 * share));
  }

  /** @param {Vector} step */
  #go(step) {
    const { reach, positions } = this.limits;
    const next = addScaled(this.position, step, 1);
    const [, now] = nearest(positions, this.position);
    const [, then] = nearest(positions, next);
    if (then <= reach || then <= now) this.position = next;
    else this.position = addScaled(this.position, step, Math.max(0, 1 - now / (1.2 * reach)));
  }

  /**
   * @param {number} milliseconds
   * @returns {boolean}
   */
  settle(milliseconds) {
    const { azimuth, elevation, positions, reach } = this.limits;
    const before = [this.azimuth, this.elevation, ...this.position].join();
    if (azimuth) this.azimuth = comeBack(this.azimuth, azimuth, milliseconds);
    this.elevation = comeBack(this.elevation, elevation, milliseconds);
    const [closest, far] = nearest(positions, this.position);
    if (far > reach) {
      const share = comeBack(far, [0, reach], milliseconds) / far;
      this.position = addScaled(addScaled([0, 0, 0], closest, 1 - share), this.position, share);
    }
    return before !== [this.azimuth, this.elevation, ...this.position].join();
  }

  /** @returns {Pose} */
  pose() {
    return { ...axesTowards(this.limits.frame, this.azimuth, this.elevation), position: this.position };
  }
}

/** @type {(positions: Vector[], position: Vector) => [Vector, number]} */
function nearest(positions, position) {
  let found = positions[0];
  let least = Infinity;
  for (const candidate of positions) {
    const far = distanceBetween(candidate, position);
    if (far < least) [found, least] = [candidate, far];
  }
  return [found, least];
}

/**
 * Return an angle plus whole turns so that it is in a range, or nearest to it.
 *
 * @param {number} angle
 * @param {Range | null} range
 */
function nearestTurn(angle, range) {
  if (!range) return angle;
  const middle = (range[0] + range[1]) / 2;
  return clamp(angle - 2 * Math.PI * Math.round((angle - middle) / (2 * Math.PI)), range);
}

/** @type {(angle: number) => string} */
const degrees = (angle) => ((angle * 180) / Math.PI).toFixed(2);

/** @type {(query: URLSearchParams, name: string) => number | null} */
function number(query, name) {
  const text = query.get(name);
  return text === null || text.trim() === "" || !Number.isFinite(Number(text)) ? null : Number(text);
}

/** @type {(query: URLSearchParams, name: string) => Vector | null} three numbers separated by commas */
function vector(query, name) {
  const found = (query.get(name) ?? "").split(",").map((text) => (text.trim() === "" ? NaN : Number(text)));
  return found.length === 3 && found.every(Number.isFinite) ? /** @type {Vector} */ (found) : null;
}

/** @type {(position: Vector) => string} */
const written = (position) => position.map((value) => value.toFixed(4)).join(",");
