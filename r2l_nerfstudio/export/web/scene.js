// Validates scene.json once, so that no other module has to. Its numbers become constants of shaders, and its names
// become addresses.

export const SCENE_VERSION = 2;

/** A file in this folder or below it: no other server, no data: address, no parent folder. */
const OWN_FILE = /^(?![.])[\w.-]+(?:\/(?![.])[\w.-]+)*$/;

/** @param {unknown} value */
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
/** @param {unknown} value */
const isPositive = (value) => isNumber(value) && Number(value) > 0;
/** @param {unknown} value */
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
/** @param {unknown} value @param {number} [length] */
const isNumbers = (value, length) =>
  Array.isArray(value) && (length === undefined || value.length === length) && value.every(isNumber);
/** @param {unknown} value @param {number} rows @param {number} columns */
const isMatrix = (value, rows, columns) =>
  Array.isArray(value) && value.length === rows && value.every((row) => isNumbers(row, columns));
/** @param {unknown} value @param {number} low @param {number} high */
const isWhole = (value, low, high) => Number.isInteger(value) && Number(value) >= low && Number(value) <= high;
/** @param {unknown} value */
const isSize = (value) => isWhole(value, 1, 16384);
/** @param {any} file */
const isFile = (file) =>
  typeof file.file === "string" && OWN_FILE.test(file.file) && isWhole(file.bytes, 1, 2 ** 32) && /^[0-9a-f]{64}$/.test(file.sha256);
/** @param {unknown} name */
const isName = (name) => typeof name === "string" && OWN_FILE.test(name);

/**
 * Return the first field that is missing or invalid; null for none.
 *
 * @param {any} scene as parsed
 * @returns {string | null}
 */
export function faultyField(scene) {
  if (!isObject(scene)) return "everything";
  /** @type {[string, () => boolean][]} */
  const checks = [
    ["version", () => scene.version === SCENE_VERSION],
    ["title", () => typeof scene.title === "string"],
    ["method", () => typeof scene.method === "string"],
    ["background", () => isNumbers(scene.background, 3)],
    ["poster", () => isName(scene.poster)],
    ["sphere", () => scene.sphere === null || (isNumbers(scene.sphere.center, 3) && isPositive(scene.sphere.radius))],
    ["picture", () => isSize(scene.picture.width) && isSize(scene.picture.height) && isPositive(scene.picture.focal)],
    ["view", () => ["orbit", "walk"].includes(scene.view.kind) && isObject(scene.view.start)],
    ["student.weights", () => isFile(scene.student.weights)],
    ["student.rays", () => typeof scene.student.rays.planar === "boolean" && isNumber(scene.student.rays.offset)],
    ["student.factor", () => isWhole(scene.student.factor, 1, 64)],
    ["student.margin", () => isWhole(scene.student.margin, 0, 1)],
    ["student.outputs", () => [3, 5].includes(scene.student.outputs)],
    ["student.encoding", () => isEncoding(scene.student.encoding)],
    ["student.network", () => isNetwork(scene.student)],
    ["probe", () => isProbe(scene.probe)],
    ["fallback", () => scene.fallback === null || isFallback(scene.fallback)],
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

/** @param {any} encoding */
function isEncoding(encoding) {
  const isPlaced =
    ["sphere", "near-far", "disparity"].includes(encoding.spacing) &&
    isNumbers(encoding.center, 3) &&
    isPositive(encoding.radius) &&
    isNumber(encoding.near) &&
    isNumber(encoding.far) &&
    isMatrix(encoding.axes, 3, 3);
  if (!isPlaced) return false;
  if (encoding.kind === "composited") {
    const { low, extent, origin, occupancy, cells, channels, samples, pixelSamples, block, probes } = encoding;
    return (
      ["ball", "contracted", "frustum"].includes(encoding.warp) &&
      [low, extent, origin].every((numbers) => isNumbers(numbers, 3)) &&
      extent.every(isPositive) &&
      [occupancy, cells].every((sizes) => isNumbers(sizes, 3) && sizes.every((/** @type {unknown} */ size) => isWhole(size, 1, 2048))) &&
      isWhole(channels, 1, 63) &&
      [samples, pixelSamples, block, probes].every((count) => isWhole(count, 1, 4096)) &&
      [encoding.pointOctaves, encoding.directionOctaves].every((count) => isWhole(count, 0, 24))
    );
  }
  const { volume, frame, rotation, ndc } = encoding;
  return (
    ["points", "plucker", "two-plane"].includes(encoding.kind) &&
    typeof encoding.contracted === "boolean" &&
    (frame === null || (isMatrix(frame, 3, 4) && isMatrix(rotation, 3, 3))) &&
    (ndc === null || isNumbers(ndc, 2)) &&
    isWhole(encoding.points, 1, 4096) &&
    isWhole(encoding.octaves, 0, 24) &&
    (volume === null ||
      (isWhole(volume.resolution, 2, 512) && isWhole(volume.channels, 1, 256) && isWhole(volume.points, 1, 4096) && isPositive(volume.extent)))
  );
}

/** @param {any} student */
function isNetwork({ network, factor }) {
  const { kind, width, blocks, ups, join, joinBlocks } = network;
  const isUp = (/** @type {any} */ up) => isWhole(up.channels, 1, 8192) && [2, 3].includes(up.step);
  return (
    ["r2l", "mobile-r2l"].includes(kind) &&
    isWhole(width, 1, 8192) &&
    isWhole(blocks, 1, 1024) &&
    Array.isArray(ups) &&
    ups.every(isUp) &&
    ups.reduce((product, { step }) => product * step, 1) === factor &&
    isWhole(join, 0, 8192) &&
    isWhole(joinBlocks, 0, 64)
  );
}

/** @param {any} probe */
function isProbe(probe) {
  return (
    isNumbers(probe.position, 3) &&
    isMatrix(probe.axes, 3, 3) &&
    isWhole(probe.side, 1, 512) &&
    isPositive(probe.focal) &&
    typeof probe.pixels === "string" &&
    atob(probe.pixels).length === 3 * probe.side ** 2
  );
}

/** @param {any} fallback */
function isFallback({ model, raysPerCell, runtime }) {
  const names = [runtime.module, runtime.loader, runtime.wasm];
  return isFile(model) && isWhole(raysPerCell, 1, 64) && names.every(isName) && isWhole(runtime.bytes, 1, 2 ** 32) && typeof runtime.version === "string";
}
