// The network's layers, and where their weights are in the file.

import { codeLength } from "./wgsl.js";

/** @import {Layer, Network, Student} from "./types.d.ts" */

/** Columns that a thread keeps in registers, in vectors of four: the largest count that divides a layer's. @param {number} outputs */
function columns(outputs) {
  const vectors = Math.ceil(outputs / 4);
  const groups = [4, 3, 2].find((count) => vectors % count === 0) ?? 1;
  return { groups, padded: 4 * vectors };
}

/**
 * All layers, in the order of evaluation.
 *
 * `scale` is the number of hidden pixels per row. The long skip is the head's output, added to that of the last block.
 *
 * @param {Student} student
 * @returns {Layer[]}
 */
export function layersOf(student) {
  const { network, encoding, outputs } = student;
  const activation = network.kind === "r2l" ? "relu" : "gelu";
  /** @type {Layer[]} */
  const layers = [];
  /** @type {(name: string, inputs: number, outputs: number, more?: Partial<Layer>) => void} */
  const add = (name, inputs, made, more = {}) => {
    const plain = { activation: "none", scale: 1, step: 1, taps: 1, residual: false, skip: 0, input: "", output: "" };
    layers.push(/** @type {Layer} */ ({ name, inputs, outputs: made, ...columns(made), ...plain, ...more }));
  };
  let width = network.width;
  add("head", codeLength(encoding), width, { activation, input: "code", output: "skip" });
  for (let block = 0; block < network.blocks; block++) {
    const [isFirst, isLast] = [block === 0, block === network.blocks - 1];
    add(`blocks.${block}.first`, width, width, { activation, input: isFirst ? "skip" : "x0", output: "y0" });
    add(`blocks.${block}.second`, width, width, {
      input: "y0",
      output: "x0",
      residual: !isFirst,
      skip: Number(isFirst) + Number(isLast),
    });
  }
  let scale = 1;
  network.ups.forEach(({ channels, step }, up) => {
    add(`ups.${up}`, width, channels, {
      scale,
      step,
      taps: step === 2 ? 4 : 1,
      input: `x${up}`,
      output: `x${up + 1}`,
    });
    width = channels;
    scale *= step * step;
    for (let block = 0; block < 2; block++) {
      const place = { scale, input: `x${up + 1}`, output: `y${up + 1}` };
      add(`ups.${up}.${block}.first`, width, width, { ...place, activation });
      add(`ups.${up}.${block}.second`, width, width, { ...place, input: place.output, output: place.input, residual: true });
    }
  });
  if (network.join) {
    const own = encoding.kind === "composited" ? encoding.channels + 1 : 0;
    add("join", width + own, network.join, { scale, activation, input: `x${network.ups.length}` });
    width = network.join;
    // Every pixel's hidden features stay in its thread.
    for (let block = 0; block < network.joinBlocks; block++) {
      add(`joins.${block}.first`, width, width, { scale, activation: "relu" });
      add(`joins.${block}.second`, width, width, { scale, residual: true });
    }
  }
  add("tail", width, outputs, { scale, input: `x${network.ups.length}` });
  return layers;
}

/** Numbers per row of a hidden buffer. @param {Layer[]} layers @param {string} name */
export function rowLength(layers, name) {
  const layer = layers.find((one) => one.output === name);
  return layer ? layer.padded * layer.scale * layer.step ** 2 : 0;
}

/** Floating-point operations per row, a multiply-add counted as two. @param {Layer[]} layers */
export function flopsPerRow(layers) {
  return layers.reduce((sum, layer) => sum + 2 * layer.inputs * layer.outputs * layer.taps * layer.scale * layer.step ** 2, 0);
}

/** Shape of a layer's matrix in the weights file. @param {Layer} layer @returns {number[]} */
export function matrixShape({ inputs, outputs, taps, step }) {
  return step > 1 ? [step * step, taps * inputs, outputs] : [inputs, outputs];
}

/** @param {Network} network */
export const factorOf = (network) => network.ups.reduce((product, { step }) => product * step, 1);
