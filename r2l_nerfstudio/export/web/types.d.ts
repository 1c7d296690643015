// Types that the page's modules share, only for the type checker.

export type Vector = [number, number, number];
export type Range = [number, number];

export interface ListedFile {
  file: string;
  bytes: number;
  sha256: string;
}

/** A camera and the pixels that the student renders for it: red, green, blue, in base64. */
export interface Probe {
  position: Vector;
  axes: [Vector, Vector, Vector];
  side: number;
  focal: number;
  pixels: string;
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

/** For captures that look around instead of at one center. */
export interface WalkLimits {
  kind: "walk";
  frame: [Vector, Vector, Vector];
  positions: Vector[];
  reach: number;
  azimuth: Range | null;
  elevation: Range;
  start: { azimuth: number; elevation: number; position: Vector };
}

/** Bounds of a bounded scene. */
export interface Sphere {
  center: Vector;
  radius: number;
}

/** Conventions of the student's ray encoding. */
export interface RayConventions {
  /** Directions have a component of 1 along the viewing axis, instead of length 1. */
  planar: boolean;
  /** Where a cell's ray passes through it: 0.5 is the center, 0 the upper left corner. */
  offset: number;
}

/** Fields that all encodings share. */
interface Placed {
  spacing: "sphere" | "near-far" | "disparity";
  center: Vector;
  radius: number;
  near: number;
  far: number;
  axes: number[][];
}

/** Features composited along rays; see docs/composited.md. */
export interface Composited extends Placed {
  kind: "composited";
  warp: "ball" | "contracted" | "frustum";
  low: Vector;
  extent: Vector;
  origin: Vector;
  occupancy: Vector;
  cells: Vector;
  channels: number;
  samples: number;
  pixelSamples: number;
  /** Pixels along each side of the blocks that share a MobileR2L's sample points. */
  block: number;
  probes: number;
  pointOctaves: number;
  directionOctaves: number;
}

/** Encodings of the ray itself, optionally with a dense feature volume. */
export interface Direct extends Placed {
  kind: "points" | "plucker" | "two-plane";
  contracted: boolean;
  frame: number[][] | null;
  rotation: number[][] | null;
  ndc: number[] | null;
  points: number;
  octaves: number;
  volume: { resolution: number; channels: number; points: number; extent: number } | null;
}

export type Encoding = Composited | Direct;

export interface Network {
  kind: "r2l" | "mobile-r2l";
  width: number;
  blocks: number;
  ups: { channels: number; step: number }[];
  /** Channels of the layer that joins pixels' own features; 0 if there is none. */
  join: number;
  /** Residual blocks after it. */
  joinBlocks: number;
}

export interface Student {
  weights: ListedFile & { precision: "fp16" | "int8" };
  rays: RayConventions;
  factor: number;
  margin: number;
  outputs: 3 | 5;
  encoding: Encoding;
  network: Network;
}

export interface Fallback {
  model: ListedFile;
  raysPerCell: number;
  runtime: { version: string; module: string; loader: string; wasm: string; bytes: number };
}

export interface Scene {
  version: number;
  title: string;
  method: string;
  background: Vector;
  poster: string;
  sphere: Sphere | null;
  picture: { width: number; height: number; focal: number };
  view: OrbitLimits | WalkLimits;
  student: Student;
  probe: Probe;
  fallback: Fallback | null;
}

/** A layer of the network, as its shader needs it. */
export interface Layer {
  name: string;
  inputs: number;
  outputs: number;
  /** `outputs`, in whole vectors of four. */
  padded: number;
  /** Vectors of four that one thread computes. */
  groups: number;
  activation: "none" | "relu" | "gelu";
  /** Hidden pixels per row, before the layer. */
  scale: number;
  /** Upsampling factor of the layer. */
  step: number;
  /** Input pixels per output pixel. */
  taps: number;
  /** Whether the previous contents of the output are added. */
  residual: boolean;
  /** How many times the head's output is added. */
  skip: number;
  /** Names of buffers. */
  input: string;
  output: string;
}

/** A tensor of a safetensors file. */
export interface Tensor {
  dtype: "F32" | "F16" | "I8" | "U8";
  shape: number[];
  count: number;
  bytes: Uint8Array<ArrayBuffer>;
}

/** Columns right, up, backward, position. */
export interface Pose {
  right: Vector;
  up: Vector;
  backward: Vector;
  position: Vector;
}

/** Pose, and size and focal length in pixels. */
export interface Camera {
  pose: Pose;
  width: number;
  height: number;
  focal: number;
}

/** Moves the camera. */
export interface Rig {
  reset(): void;
  startFrom(query: URLSearchParams): void;
  address(): string;
  turn(right: number, down: number): void;
  move(right: number, down: number): void;
  zoom(steps: number): void;
  focus(point: Vector, share: number): void;
  settle(milliseconds: number): boolean;
  pose(): Pose;
}

/** Renders the student into a canvas. */
export interface Backend {
  name: string;
  canvas: HTMLCanvasElement;
  /** Whether the canvas may have another size than the rendered image. */
  resizes: boolean;
  fits(width: number, height: number): boolean;
  /** Returns the milliseconds that it took. */
  draw(camera: Camera): Promise<number>;
  /** Depth along the ray through a point of the last frame, in shares of its sides; 0 if unknown. */
  depthAt(x: number, y: number): Promise<number>;
  /** The last frame: red, green, blue, opacity. */
  read(): Promise<Uint8Array>;
  close(): void;
  device: GPUDevice | null;
}

export interface FrameRequest extends Camera {
  kind: "frame";
  id: number;
}

export interface StartRequest {
  kind: "start";
  scene: Scene;
  base: string;
  threads: number;
}

export type Answer =
  | { kind: "progress"; done: number }
  | { kind: "ready" }
  | { kind: "frame"; id: number; width: number; height: number; pixels: Int32Array; milliseconds: number }
  | { kind: "failed"; sentence: string };

/** The part of ONNX Runtime Web that the page uses. */
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
