// The shapes that the page's modules share; for the type checker alone.

export type Vector = [number, number, number];
export type Range = [number, number];

export interface ModelFile {
  file: string;
  bytes: number;
  sha256: string;
}

export interface RuntimeFiles {
  module: string;
  loader: string;
  wasm: string;
  bytes: number;
}

/** A few rays and the pixels they are known to have. */
export interface Probe {
  origin: Vector;
  rows: number;
  columns: number;
  directions: number[];
  pixels: number[];
}

/** Angles in radians, lengths in the run's unit. `frame`: right, up, backward. */
export interface OrbitLimits {
  kind: "orbit";
  center: Vector;
  frame: [Vector, Vector, Vector];
  azimuth: Range | null;
  elevation: Range;
  distance: Range;
  shift: number;
  start: { azimuth: number; elevation: number; distance: number };
}

/** For captures that look around rather than at something. */
export interface WalkLimits {
  kind: "walk";
  frame: [Vector, Vector, Vector];
  positions: Vector[];
  reach: number;
  azimuth: Range | null;
  elevation: Range;
  start: { azimuth: number; elevation: number; position: Vector };
}

/** What a bounded scene lies in. */
export interface Sphere {
  center: Vector;
  radius: number;
}

/** How the student's ray encoding reads rays. */
export interface RayConventions {
  /** Directions have a component of 1 along the viewing axis, instead of length 1. */
  planar: boolean;
  /** Where in a cell its ray passes: 0.5 is the center, 0 the upper left corner. */
  offset: number;
}

export interface Scene {
  title: string;
  method: string;
  background: Vector;
  factor: number;
  margin: number;
  rays: RayConventions;
  raysPerCell: number;
  sphere: Sphere | null;
  picture: { width: number; height: number; focal: number };
  models: { fp16: ModelFile; fp32: ModelFile };
  runtime: { version: string; webgpu: RuntimeFiles; wasm: RuntimeFiles };
  view: OrbitLimits | WalkLimits;
  probe: Probe;
}

/** Columns right, up, backward, position. */
export interface Pose {
  right: Vector;
  up: Vector;
  backward: Vector;
  position: Vector;
}

export interface FrameRequest {
  kind: "frame";
  id: number;
  pose: Pose;
  width: number;
  height: number;
  focal: number;
}

export interface StartRequest {
  kind: "start";
  scene: Scene;
  base: string;
  backend: "webgpu" | "wasm";
  threads: number;
}

export type Answer =
  | { kind: "progress"; text: string; done: number }
  | { kind: "ready"; backend: string }
  | { kind: "frame"; id: number; width: number; height: number; pixels: Int32Array; milliseconds: number }
  | { kind: "refused"; reason: string }
  | { kind: "failed"; sentence: string };

/** What the page uses of ONNX Runtime Web. */
export interface Runtime {
  env: { wasm: { wasmPaths: object; wasmBinary: ArrayBuffer; numThreads: number }; logLevel: string };
  Tensor: new (type: "float32", data: Float32Array, dims: number[]) => RuntimeTensor;
  InferenceSession: { create(model: Uint8Array, options: object): Promise<Session> };
}

export interface RuntimeTensor {
  data: Int32Array;
  dims: readonly number[];
}

export interface Session {
  run(inputs: Record<string, RuntimeTensor>): Promise<Record<string, RuntimeTensor>>;
}
