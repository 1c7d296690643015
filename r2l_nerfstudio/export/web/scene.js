// Whether scene.json is what an export writes: checked once, so that nothing after it needs to ask.

/** A file of this folder or of a folder in it: no other server, no data: address, no way up. */
const OWN_FILE = /^(?![.])[\w.-]+(?:\/(?![.])[\w.-]+)*$/;

/** @param {unknown} value */
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
/** @param {unknown} value */
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
/** @param {unknown} value @param {number} [length] */
const isNumbers = (value, length) =>
  Array.isArray(value) && (length === undefined || value.length === length) && value.every(isNumber);
/** @param {unknown} value */
const isSize = (value) => Number.isInteger(value) && Number(value) >= 1 && Number(value) <= 16384;
/** @param {unknown} value */
const isBytes = (value) => Number.isInteger(value) && Number(value) >= 1 && Number(value) <= 2 ** 32;
/** @param {unknown} value */
const isFile = (value) => typeof value === "string" && OWN_FILE.test(value);

/**
 * The first field that is missing or is not what it should be; null for none.
 *
 * @param {any} scene as parsed
 * @returns {string | null}
 */
export function faultyField(scene) {
  if (!isObject(scene)) return "everything";
  /** @type {[string, () => boolean][]} */
  const checks = [
    ["title", () => typeof scene.title === "string"],
    ["method", () => typeof scene.method === "string"],
    ["background", () => isNumbers(scene.background, 3)],
    ["factor", () => isSize(scene.factor) && scene.factor <= 64],
    ["margin", () => Number.isInteger(scene.margin) && scene.margin >= 0 && scene.margin <= 64],
    ["sphere", () => scene.sphere === null || (isNumbers(scene.sphere.center, 3) && scene.sphere.radius > 0)],
    ["picture", () => isSize(scene.picture.width) && isSize(scene.picture.height) && scene.picture.focal > 0],
    ["models", () => ["fp16", "fp32"].every((name) => isModel(scene.models[name]))],
    ["runtime", () => typeof scene.runtime.version === "string" && ["webgpu", "wasm"].every((name) => isBackend(scene.runtime[name]))],
    ["view", () => ["orbit", "walk"].includes(scene.view.kind) && isObject(scene.view.start)],
    ["probe", () => isProbe(scene.probe)],
  ];
  for (const [name, check] of checks) {
    try {
      if (!check()) return name;
    } catch {
      return name; // a part of it is missing
    }
  }
  return null;
}

/** @param {any} model */
function isModel(model) {
  return isFile(model.file) && isBytes(model.bytes) && /^[0-9a-f]{64}$/.test(model.sha256);
}

/** @param {any} backend */
function isBackend(backend) {
  return isFile(backend.module) && isFile(backend.loader) && isFile(backend.wasm) && isBytes(backend.bytes);
}

/** @param {any} probe */
function isProbe(probe) {
  const cells = isSize(probe.rows) && isSize(probe.columns) ? probe.rows * probe.columns : NaN;
  return isNumbers(probe.origin, 3) && isNumbers(probe.directions, 3 * cells) && isNumbers(probe.pixels) && probe.pixels.length > 0;
}
