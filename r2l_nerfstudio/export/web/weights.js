// Reads the student's weights: safetensors (eight bytes of length, JSON, numbers).

import { matrixShape } from "./layers.js";

/** @import {Layer, Scene, Tensor} from "./types.d.ts" */

/** Bytes per number. */
const SIZES = /** @type {const} */ ({ F32: 4, F16: 2, I8: 1, U8: 1 });

export class WrongWeights extends Error {}

/**
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @returns {Map<string, Tensor>}
 */
export function readTensors(bytes) {
  const length = bytes.length >= 8 ? Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true)) : Infinity;
  if (length > bytes.length - 8) throw new WrongWeights("its header is cut short");
  /** @type {any} */
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, 8 + length)));
  } catch {
    throw new WrongWeights("its header is no JSON");
  }
  const tensors = new Map();
  for (const [name, entry] of Object.entries(header ?? {})) {
    if (name === "__metadata__") continue;
    const { dtype, shape, data_offsets: range } = Object(entry);
    const isShape = Array.isArray(shape) && shape.every((side) => Number.isInteger(side) && side >= 0);
    const isRange = Array.isArray(range) && range.length === 2 && range.every((at) => Number.isInteger(at) && at >= 0);
    const size = SIZES[/** @type {keyof typeof SIZES} */ (dtype)];
    if (!isShape || !isRange || !size) throw new WrongWeights(`${name} is described wrongly`);
    const count = shape.reduce((/** @type {number} */ product, /** @type {number} */ side) => product * side, 1);
    const [from, to] = range;
    if (to - from !== count * size || 8 + length + to > bytes.length) throw new WrongWeights(`${name} is cut short`);
    // A copy, since the file's offsets need not be aligned for typed arrays.
    tensors.set(name, { dtype, shape, count, bytes: bytes.slice(8 + length + from, 8 + length + to) });
  }
  return tensors;
}

const bits = new Uint32Array(1);
const float = new Float32Array(bits.buffer);

/** Value of a half: its bits, shifted, are those of a float 2^112 times as small. @param {number} half */
function fromHalf(half) {
  bits[0] = ((half & 0x8000) << 16) | ((half & 0x7fff) << 13);
  return float[0] * 2 ** 112;
}

/** Inverse of `fromHalf`, rounded, and clamped to the largest half. @param {number} value */
export function toHalf(value) {
  float[0] = Math.min(65504, Math.abs(value)) * 2 ** -112;
  return ((value < 0 ? 0x8000 : 0) | ((bits[0] + 0x1000) >>> 13)) & 0xffff;
}

/**
 * Return a tensor's numbers, dequantized.
 *
 * @param {Map<string, Tensor>} tensors
 * @param {string} name
 * @param {readonly number[]} shape that it must have
 * @returns {Float32Array<ArrayBuffer>}
 */
export function numbers(tensors, name, shape) {
  const tensor = tensors.get(name);
  if (!tensor) throw new WrongWeights(`it has no ${name}`);
  if (tensor.shape.join() !== shape.join()) {
    throw new WrongWeights(`${name} has shape ${tensor.shape.join("x")} instead of ${shape.join("x")}`);
  }
  if (tensor.dtype === "F32") return new Float32Array(tensor.bytes.buffer);
  const found = new Float32Array(tensor.count);
  if (tensor.dtype === "F16") {
    new Uint16Array(tensor.bytes.buffer).forEach((half, index) => (found[index] = fromHalf(half)));
    return found;
  }
  const columns = shape[shape.length - 1];
  const scale = numbers(tensors, `${name}.scale`, [columns]);
  const offset = tensors.has(`${name}.offset`) ? numbers(tensors, `${name}.offset`, [columns]) : new Float32Array(columns);
  const stored = tensor.dtype === "I8" ? new Int8Array(tensor.bytes.buffer) : tensor.bytes;
  stored.forEach((step, index) => (found[index] = step * scale[index % columns] + offset[index % columns]));
  return found;
}

/**
 * Return a layer's matrix, padded with zeros to vectors of four, with its bias as the last row.
 *
 * @param {Map<string, Tensor>} tensors
 * @param {Layer} layer
 * @param {number} [split] number of inputs of the first part, if the inputs come from two buffers; each part is padded separately
 */
export function layerNumbers(tensors, layer, split = layer.inputs) {
  const { name, inputs, outputs, padded, taps, step } = layer;
  const given = numbers(tensors, `${name}.weight`, matrixShape(layer));
  const pad = (/** @type {number} */ count) => 4 * Math.ceil(count / 4);
  const rows = pad(split) + pad(inputs - split);
  const parts = (step > 1 ? step * step : 1) * taps;
  const matrix = new Float32Array((parts * rows + 1) * padded);
  for (let part = 0; part < parts; part++) {
    for (let row = 0; row < inputs; row++) {
      const at = (part * inputs + row) * outputs;
      const to = part * rows + (row < split ? row : row - split + pad(split));
      matrix.set(given.subarray(at, at + outputs), to * padded);
    }
  }
  matrix.set(numbers(tensors, `${name}.bias`, [outputs]), parts * rows * padded);
  return matrix;
}

/**
 * Return occupancy, grid points and features of a composited encoding, in the layout of the shaders.
 *
 * @param {Map<string, Tensor>} tensors
 * @param {Scene} scene
 */
export function spaceNumbers(tensors, scene) {
  const { encoding } = scene.student;
  if (encoding.kind !== "composited") throw new Error("there is no such space");
  const [ox, oy, oz] = encoding.occupancy;
  const packed = tensors.get("occupancy");
  if (packed?.dtype !== "U8" || packed.count !== Math.ceil((ox * oy * oz) / 8)) throw new WrongWeights("occupancy is wrong");
  const occupancy = new Uint32Array(Math.ceil(packed.count / 4));
  new Uint8Array(occupancy.buffer).set(packed.bytes);
  const { indices, held } = gridPoints(occupancy, encoding.occupancy, encoding.cells);
  const values = encoding.channels + 1;
  const given = numbers(tensors, "features", [held + 1, values]);
  const row = 8 * Math.ceil(values / 8);
  const features = new Uint16Array((held + 1) * row);
  for (let point = 0; point <= held; point++) {
    for (let value = 0; value < values; value++) features[point * row + value] = toHalf(given[point * values + value]);
  }
  return { occupancy, indices, features };
}

/**
 * Number the grid points that touch an occupied cell. The file does not store them, since they follow from the occupancy.
 *
 * @param {Uint32Array} occupancy bits
 * @param {readonly number[]} grid cells of the occupancy along x, y, z
 * @param {readonly number[]} cells of the volume
 */
export function gridPoints(occupancy, grid, cells) {
  const [nx, ny, nz] = cells;
  // As in rays/occupancy.py: the occupancy is repeated to at least the volume's size; a cell is occupied if it overlaps an
  // occupied one.
  const spans = cells.map((count, axis) => {
    const size = Math.ceil(count / grid[axis]) * grid[axis];
    return Array.from({ length: count }, (_, cell) => [
      Math.floor((Math.floor((cell * size) / count) * grid[axis]) / size),
      Math.floor(((Math.ceil(((cell + 1) * size) / count) - 1) * grid[axis]) / size),
    ]);
  });
  const touched = new Uint8Array((nx + 1) * (ny + 1) * (nz + 1));
  const isOccupied = (/** @type {number} */ number) => (occupancy[number >> 5] >> (number & 31)) & 1;
  for (let z = 0; z < nz; z++) {
    for (let y = 0; y < ny; y++) {
      for (let x = 0; x < nx; x++) {
        let found = false;
        for (let k = spans[2][z][0]; k <= spans[2][z][1] && !found; k++) {
          for (let j = spans[1][y][0]; j <= spans[1][y][1] && !found; j++) {
            for (let i = spans[0][x][0]; i <= spans[0][x][1] && !found; i++) {
              found = isOccupied((k * grid[1] + j) * grid[0] + i) === 1;
            }
          }
        }
        if (!found) continue;
        for (let corner = 0; corner < 8; corner++) {
          touched[((z + (corner >> 2)) * (ny + 1) + y + ((corner >> 1) & 1)) * (nx + 1) + x + (corner & 1)] = 1;
        }
      }
    }
  }
  let held = 0;
  const indices = new Uint32Array(touched.length);
  touched.forEach((is, point) => (indices[point] = is ? ++held : 0));
  return { indices, held };
}
