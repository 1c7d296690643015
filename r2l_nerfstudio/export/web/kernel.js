// A compute shader whose bindings are addressed by their names in the WGSL source.

const DECLARATION = /@group\((\d)\) @binding\((\d)\) var(?:<([\w, ]+)>)? (\w+)\s*:\s*([\w]+)(?:<(\w+))?/g;

/** @typedef {GPUBuffer | GPUTextureView | GPUSampler | {buffer: GPUBuffer, offset: number, size: number}} Resource */

export class Kernel {
  /** @param {GPUDevice} device @param {string} code */
  constructor(device, code) {
    this.device = device;
    /** @type {{name: string, binding: number}[][]} */
    this.groups = [];
    /** @type {GPUBindGroupLayoutEntry[][]} */
    const layouts = [];
    for (const [, group, binding, space, name, type, format] of code.matchAll(DECLARATION)) {
      const at = Number(group);
      const number = Number(binding);
      (this.groups[at] ??= []).push({ name, binding: number });
      // Explicit, since derived layouts omit bindings that a shader declares but does not use.
      (layouts[at] ??= []).push({ binding: number, visibility: GPUShaderStage.COMPUTE, ...kind(space, type, format) });
    }
    this.layouts = layouts.map((entries) => device.createBindGroupLayout({ entries }));
    const layout = device.createPipelineLayout({ bindGroupLayouts: this.layouts });
    const module = device.createShaderModule({ code });
    /** @type {GPUComputePipeline | null} */
    this.pipeline = null;
    this.ready = device
      .createComputePipelineAsync({ layout, compute: { module, entryPoint: "main" } })
      .then((pipeline) => (this.pipeline = pipeline));
    // Errors are handled where `ready` is awaited.
    this.ready.catch(() => undefined);
  }

  /** @param {Record<string, Resource>} resources by name @returns {GPUBindGroup[]} */
  bind(resources) {
    return this.groups.map((names, group) =>
      this.device.createBindGroup({
        layout: this.layouts[group],
        entries: names.map(({ name, binding }) => {
          const resource = resources[name];
          if (!resource) throw new Error(`nothing is bound to ${name}`);
          return { binding, resource: resource instanceof GPUBuffer ? { buffer: resource } : resource };
        }),
      }),
    );
  }
}

/** @param {string | undefined} space @param {string} type @param {string} format @returns {Partial<GPUBindGroupLayoutEntry>} */
function kind(space, type, format) {
  if (type === "texture_storage_2d") return { storageTexture: { format: /** @type {GPUTextureFormat} */ (format) } };
  if (space === "uniform") return { buffer: { type: "uniform" } };
  return { buffer: { type: space === "storage, read" ? "read-only-storage" : "storage" } };
}
