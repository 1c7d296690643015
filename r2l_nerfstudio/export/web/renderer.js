// Renders a student on the GPU: one command buffer per frame, without a readback.

import { Kernel } from "./kernel.js";
import { layersOf, rowLength } from "./layers.js";
import { layerNumbers, numbers, readTensors, spaceNumbers, toHalf } from "./weights.js";
import {
  argumentShader,
  cellMarchShader,
  cellShader,
  codeLength,
  encodeShader,
  finishShader,
  foundLength,
  layerShader,
  pixelShader,
  PRESENT,
  tailShader,
  TILE,
} from "./wgsl.js";

/** @import {Camera, Layer, Scene} from "./types.d.ts" */
/** @import {Resource} from "./kernel.js" */

/** Rays that go through an R2L network's layers together, so that their hidden features stay in the GPU's caches. */
const CHUNK = 1 << 15;

/** @typedef {{kernel: Kernel, groups: GPUBindGroup[], x: number, y: number, argument: number}} Dispatch `argument` -1: x, y workgroups */

export class Renderer {
  /**
   * Start compiling the shaders while the weights are still loading; pass those to `load`.
   *
   * @param {Scene} scene
   * @param {GPUDevice} device
   */
  constructor(scene, device) {
    this.scene = scene;
    this.device = device;
    const { student } = scene;
    this.isImage = student.factor > 1;
    this.layers = layersOf(student);
    this.tail = /** @type {Layer} */ (this.layers.pop());
    const join = this.layers.findIndex(({ name }) => name === "join");
    /** The layers between upsampling and the last, which join each pixel's own features. */
    this.joins = join < 0 ? [] : this.layers.splice(join);
    this.composited = student.encoding.kind === "composited" ? student.encoding : null;
    // Half precision halves the memory traffic. Sums are always in fp32.
    this.number = device.features.has("shader-f16") ? "f16" : "f32";
    /** @type {Map<string, Kernel>} */
    const made = new Map();
    /** @param {string} code */
    const kernel = (code) => {
      const found = made.get(code) ?? new Kernel(device, code);
      made.set(code, found);
      return found;
    };
    this.kernels = {
      pixels: kernel(pixelShader(scene)),
      cells: this.isImage ? kernel(cellShader(scene)) : null,
      cellMarch: this.isImage && this.composited ? kernel(cellMarchShader(scene)) : null,
      encode: kernel(encodeShader(scene, this.number)),
      layers: this.layers.map((layer) => kernel(layerShader(layer, this.number))),
      last: kernel(
        this.isImage
          ? finishShader(scene, { joins: this.joins, tail: this.tail }, this.number)
          : tailShader(scene, this.tail, this.number),
      ),
    };
    const module = device.createShaderModule({ code: PRESENT });
    this.format = navigator.gpu.getPreferredCanvasFormat();
    this.presenting = device.createRenderPipelineAsync({
      layout: "auto",
      vertex: { module, entryPoint: "corner" },
      fragment: { module, entryPoint: "shade", targets: [{ format: this.format }] },
    });
    this.presenting.catch(() => undefined);
    this.made = made;
    this.camera = this.#buffer("camera", 96, GPUBufferUsage.UNIFORM);
    this.present = this.#buffer("present", 32, GPUBufferUsage.UNIFORM);
    this.grid = this.#buffer("grid", 16, GPUBufferUsage.UNIFORM);
    this.counter = this.#buffer("counter", 16);
    this.smooth = device.createSampler({ magFilter: "linear", minFilter: "linear" });
    /** @type {Record<string, Resource>} */
    this.fixed = {};
    /** @type {Map<string, Resource>} */
    this.weights = new Map();
    this.width = this.height = this.room = 0;
    /** @type {GPUBuffer[]} */
    this.sized = [];
    /** @type {Dispatch[]} */
    this.dispatches = [];
    /** @type {GPUTexture | null} */
    this.picture = null;
  }

  /** @param {string} label @param {number} size in bytes @param {number} [usage] in addition to being written to */
  #buffer(label, size, usage = GPUBufferUsage.STORAGE) {
    const most = GPUBufferUsage.COPY_DST | GPUBufferUsage.COPY_SRC | usage;
    return this.device.createBuffer({ label, size: Math.max(16, 4 * Math.ceil(size / 4)), usage: most });
  }

  /** @param {string} label @param {ArrayBufferView<ArrayBuffer>} values */
  #filled(label, values) {
    const buffer = this.#buffer(label, values.byteLength);
    const whole = values.byteLength % 4 === 0;
    const bytes = new Uint8Array(whole ? values.byteLength : buffer.size);
    bytes.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
    this.device.queue.writeBuffer(buffer, 0, bytes);
    return buffer;
  }

  /**
   * Load the weights, and wait for the shaders.
   *
   * @param {Uint8Array<ArrayBuffer>} file
   */
  async load(file) {
    const tensors = readTensors(file);
    // Offsets of bindings must be multiples of 256.
    const room = (/** @type {Float32Array} */ { byteLength }) => 256 * Math.ceil(byteLength / 256);
    const matrices = [...this.layers, this.tail].map((layer) => ({ name: layer.name, matrix: layerNumbers(tensors, layer) }));
    if (this.joins.length) {
      const own = this.composited ? this.composited.channels + 1 : 0;
      const parts = this.joins.map((layer, index) => layerNumbers(tensors, layer, layer.inputs - (index ? 0 : own)));
      const matrix = new Float32Array(parts.reduce((sum, { length }) => sum + length, 0));
      parts.reduce((at, part) => (matrix.set(part, at), at + part.length), 0);
      matrices.push({ name: "join", matrix });
    }
    const buffer = this.#buffer("weights", matrices.reduce((sum, { matrix }) => sum + room(matrix), 0));
    let offset = 0;
    for (const { name, matrix } of matrices) {
      this.device.queue.writeBuffer(buffer, offset, matrix);
      this.weights.set(name, { buffer, offset, size: matrix.byteLength });
      offset += room(matrix);
    }
    const { encoding } = this.scene.student;
    if (encoding.kind === "composited") {
      const { occupancy, indices, features } = spaceNumbers(tensors, this.scene);
      this.fixed = {
        occupancy: this.#filled("occupancy", occupancy),
        indices: this.#filled("indices", indices),
        features: this.#filled("features", features),
      };
    } else if (encoding.volume) {
      const { resolution: side, channels } = encoding.volume;
      const values = numbers(tensors, "features", [side, side, side, channels]);
      this.fixed = { features: this.#filled("features", Uint16Array.from(values, toHalf)) };
    }
    await Promise.all([...this.made.values()].map(({ ready }) => ready));
    this.presenter = await this.presenting;
  }

  /** Bytes of the largest buffer that a frame needs. @param {number} width @param {number} height */
  largestBuffer(width, height) {
    const { rows, chunk } = this.#rows(width, height);
    const bytes = this.number === "f16" ? 2 : 4;
    const hidden = this.layers.map(({ output }) => rowLength(this.layers, output));
    const values = this.composited ? 4 * Math.ceil((this.composited.channels + 1) / 4) : 0;
    return Math.max(
      ...hidden.map((count) => count * chunk * bytes),
      4 * foundLength(this.scene.student.encoding) * rows,
      4 * values * width * height,
    );
  }

  /** @param {number} width @param {number} height */
  #rows(width, height) {
    const { factor, margin } = this.scene.student;
    const count = this.isImage
      ? (Math.ceil(width / factor) + 2 * margin) * (Math.ceil(height / factor) + 2 * margin)
      : width * height;
    const rows = TILE * Math.ceil(count / TILE);
    return { rows, chunk: this.isImage ? rows : Math.min(rows, CHUNK) };
  }

  /** Allocate buffers for frames of this size; smaller ones use the same buffers. @param {number} width @param {number} height */
  #reserve(width, height) {
    if (this.picture && width <= this.width && height <= this.height) return;
    for (const buffer of this.sized) buffer.destroy();
    this.picture?.destroy();
    [this.width, this.height] = [Math.max(width, this.width), Math.max(height, this.height)];
    const { device, kernels, fixed, counter, camera, grid } = this;
    const { student } = this.scene;
    const { rows, chunk } = this.#rows(this.width, this.height);
    const [bytes, pixels] = [this.number === "f16" ? 2 : 4, this.width * this.height];
    this.picture = device.createTexture({
      size: [this.width, this.height],
      format: "rgba8unorm",
      usage: GPUTextureUsage.STORAGE_BINDING | GPUTextureUsage.TEXTURE_BINDING | GPUTextureUsage.COPY_SRC,
    });
    this.sized = [];
    /** @param {string} label @param {number} size @param {number} [usage] */
    const buffer = (label, size, usage) => {
      const made = this.#buffer(label, size, usage);
      this.sized.push(made);
      return made;
    };
    const values = this.composited ? Math.ceil((this.composited.channels + 1) / 4) : 0;
    this.depths = buffer("depths", 4 * pixels);
    this.marks = buffer("marks", this.isImage ? 4 * rows : 0);
    /** @type {Record<string, Resource>} */
    const common = {
      ...fixed,
      camera,
      counter,
      grid,
      picture: this.picture.createView(),
      depths: this.depths,
      list: buffer("list", 4 * rows),
      marks: this.marks,
      map: buffer("map", this.isImage ? 4 * rows : 0),
      met: buffer("met", this.isImage ? 16 * values * pixels : 0),
      found: buffer("found", 4 * foundLength(student.encoding) * rows),
    };
    const code4 = Math.ceil(codeLength(student.encoding) / 4);
    /** @type {Record<string, GPUBuffer>} */
    const hidden = { code: buffer("code", 4 * code4 * chunk * bytes) };
    for (const { output } of this.layers) {
      hidden[output] ??= buffer(output, rowLength(this.layers, output) * chunk * bytes);
    }
    /** @type {{scale: number, y: number, z: number, start: number}[]} */
    const passes = [];
    /** @type {Dispatch[]} */
    const late = [];
    /** @type {(kernel: Kernel, groups: GPUBindGroup[], scale: number, y: number, z: number, start: number) => void} */
    const then = (kernel, groups, scale, y, z, start) => {
      late.push({ kernel, groups, x: 0, y: 0, argument: passes.length });
      passes.push({ scale, y, z, start });
    };
    // Its workgroups are a quarter of a tile.
    if (kernels.cellMarch) then(kernels.cellMarch, kernels.cellMarch.bind(common), 4, 1, 1, 0);
    for (let start = 0; start < rows; start += chunk) {
      const part = buffer("chunk", 16, GPUBufferUsage.UNIFORM);
      device.queue.writeBuffer(part, 0, new Uint32Array([start, 0, 0, 0]));
      const shared = { ...common, chunk: part };
      then(kernels.encode, kernels.encode.bind({ ...shared, code: hidden.code }), 1, code4, 1, start);
      this.layers.forEach((layer, index) => {
        const matrix = /** @type {Resource} */ (this.weights.get(layer.name));
        const ends = { input: hidden[layer.input], output: hidden[layer.output], skipped: hidden.skip };
        const groups = kernels.layers[index].bind({ ...shared, matrix, ...ends });
        then(kernels.layers[index], groups, layer.scale, layer.padded / 4 / layer.groups, layer.step ** 2, start);
      });
      const matrix = /** @type {Resource} */ (this.weights.get("tail"));
      const joinMatrix = /** @type {Resource} */ (this.weights.get("join"));
      const ends = { input: hidden[this.tail.input], matrix, joinMatrix };
      then(kernels.last, kernels.last.bind({ ...shared, ...ends }), this.isImage ? student.factor ** 2 : 1, 1, 1, start);
    }
    this.arguments = buffer("arguments", 12 * passes.length, GPUBufferUsage.STORAGE | GPUBufferUsage.INDIRECT);
    this.argue = new Kernel(device, argumentShader(passes, chunk));
    /** @type {Dispatch[]} */
    this.dispatches = late;
    this.early = { pixels: kernels.pixels.bind(common), cells: kernels.cells?.bind(common) };
    this.argueGroups = this.argue.bind({ counter, arguments: this.arguments });
    this.presentGroup = device.createBindGroup({
      layout: /** @type {GPURenderPipeline} */ (this.presenter).getBindGroupLayout(0),
      entries: [
        { binding: 0, resource: { buffer: this.present } },
        { binding: 1, resource: /** @type {GPUTextureView} */ (common.picture) },
        { binding: 2, resource: this.smooth },
      ],
    });
  }

  /**
   * Render a frame, onto a canvas if one is given.
   *
   * @param {Camera} view
   * @param {GPUCanvasContext | null} context
   * @param {boolean} [transparent] leave the background out
   * @returns {Promise<void>} resolves when the GPU is done
   */
  async draw(view, context, transparent = false) {
    const { width, height, focal, pose } = view;
    this.#reserve(width, height);
    await this.argue?.ready;
    const { device, kernels } = this;
    const { factor, margin } = this.scene.student;
    const [columns, rows] = [width, height].map((side) => Math.ceil(side / factor) + 2 * margin);
    const axes = [...pose.position, focal, ...pose.right, width, ...pose.up, height, ...pose.backward, columns];
    device.queue.writeBuffer(this.camera, 0, new Float32Array([...axes, rows, 0, 0, 0]));
    device.queue.writeBuffer(this.grid, 0, new Uint32Array([columns, rows, 0, 0]));
    const encoder = device.createCommandEncoder();
    encoder.clearBuffer(this.counter);
    if (this.isImage && this.marks) encoder.clearBuffer(this.marks);
    const pass = encoder.beginComputePass();
    /** @type {(kernel: Kernel | null, groups: GPUBindGroup[] | undefined) => void} */
    const use = (kernel, groups) => {
      pass.setPipeline(/** @type {GPUComputePipeline} */ (kernel?.pipeline));
      groups?.forEach((group, index) => pass.setBindGroup(index, group));
    };
    use(kernels.pixels, this.early?.pixels);
    const { encoding } = this.scene.student;
    const side = 8 * (this.isImage && encoding.kind === "composited" ? encoding.block : 1);
    pass.dispatchWorkgroups(Math.ceil(width / side), Math.ceil(height / side));
    if (kernels.cells) {
      use(kernels.cells, this.early?.cells);
      pass.dispatchWorkgroups(Math.ceil(columns / 8), Math.ceil(rows / 8));
    }
    use(/** @type {Kernel} */ (this.argue), this.argueGroups);
    pass.dispatchWorkgroups(1);
    for (const { kernel, groups, argument } of this.dispatches) {
      use(kernel, groups);
      pass.dispatchWorkgroupsIndirect(/** @type {GPUBuffer} */ (this.arguments), 12 * argument);
    }
    pass.end();
    if (context) this.#show(encoder, context, width, height, transparent);
    device.queue.submit([encoder.finish()]);
    await device.queue.onSubmittedWorkDone();
  }

  /** @param {GPUCommandEncoder} encoder @param {GPUCanvasContext} context @param {number} width @param {number} height @param {boolean} transparent */
  #show(encoder, context, width, height, transparent) {
    const canvas = context.getCurrentTexture();
    const sizes = [width, height, canvas.width, canvas.height, ...this.scene.background, Number(transparent)];
    this.device.queue.writeBuffer(this.present, 0, new Float32Array(sizes));
    const pass = encoder.beginRenderPass({
      colorAttachments: [{ view: canvas.createView(), loadOp: "clear", storeOp: "store" }],
    });
    pass.setPipeline(/** @type {GPURenderPipeline} */ (this.presenter));
    pass.setBindGroup(0, this.presentGroup);
    pass.draw(3);
    pass.end();
  }

  /** The last frame, read back for comparisons. @param {number} width @param {number} height @returns {Promise<Uint8Array<ArrayBuffer>>} red, green, blue, opacity */
  async read(width, height) {
    const stride = 256 * Math.ceil((4 * width) / 256);
    const buffer = this.device.createBuffer({ size: stride * height, usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ });
    const encoder = this.device.createCommandEncoder();
    encoder.copyTextureToBuffer({ texture: /** @type {GPUTexture} */ (this.picture) }, { buffer, bytesPerRow: stride }, [width, height]);
    this.device.queue.submit([encoder.finish()]);
    await buffer.mapAsync(GPUMapMode.READ);
    const rows = new Uint8Array(buffer.getMappedRange());
    const found = new Uint8Array(4 * width * height);
    for (let row = 0; row < height; row++) found.set(rows.subarray(row * stride, row * stride + 4 * width), 4 * row * width);
    buffer.destroy();
    return found;
  }

  /** Depth along the ray of a pixel of the last frame; 0 for the background. @param {number} pixel index in raster order */
  async depthAt(pixel) {
    const buffer = this.device.createBuffer({ size: 4, usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ });
    const encoder = this.device.createCommandEncoder();
    encoder.copyBufferToBuffer(/** @type {GPUBuffer} */ (this.depths), 4 * pixel, buffer, 0, 4);
    this.device.queue.submit([encoder.finish()]);
    await buffer.mapAsync(GPUMapMode.READ);
    const [depth] = new Float32Array(buffer.getMappedRange().slice(0));
    buffer.destroy();
    return depth;
  }
}
