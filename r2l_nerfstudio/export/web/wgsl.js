// Generates the shaders for one student; everything known about its scene is a constant in them.

/** @import {Encoding, Layer, Scene} from "./types.d.ts" */

/** Rows per workgroup of a layer: 64 threads, 4 rows each. Buffers are padded to it, so that no bounds are checked. */
export const TILE = 256;

/** @param {number} value @returns {string} a WGSL literal of type f32 */
const f32 = (value) => `f32(${value})`;
/** @param {readonly number[]} values */
const vec3 = (values) => `vec3f(${values.map(f32).join(", ")})`;
/** @param {readonly (readonly number[])[]} rows @returns {string} a matrix for multiplication from the left */
const mat3 = (rows) => `mat3x3f(${[0, 1, 2].map((column) => vec3(rows.map((row) => row[column]))).join(", ")})`;

/** WGSL: rays of the camera, and where they cross a bounded scene. @param {Scene} scene @returns {string} */
function rays(scene) {
  const { encoding, rays: conventions } = scene.student;
  return /* wgsl */ `
struct Camera {
  position: vec3f, focal: f32,
  right: vec3f, width: f32,
  up: vec3f, height: f32,
  backward: vec3f, columns: f32,
  rows: f32, transparent: f32, canvasWidth: f32, canvasHeight: f32,
}
const CENTER = ${vec3(encoding.center)};
const RADIUS = ${f32(encoding.radius)};
const NEAR = ${f32(encoding.near)};
const FAR = ${f32(encoding.far)};
const BACKGROUND = ${vec3(scene.background)};

/** Direction through an image point, in pixels. */
fn direction(camera: Camera, place: vec2f) -> vec3f {
  let x = (place.x - 0.5 * camera.width) / camera.focal;
  let y = (0.5 * camera.height - place.y) / camera.focal;
  let along = x * camera.right + y * camera.up - camera.backward;
  return ${conventions.planar ? "along" : "normalize(along)"};
}

struct Crossing { enter: f32, leave: f32, missed: bool }

/** Where a unit ray crosses the scene's sphere. */
fn crossing(origin: vec3f, along: vec3f) -> Crossing {
  let offset = origin - CENTER;
  let middle = -dot(offset, along);
  let nearest = offset + middle * along;
  let closest = dot(nearest, nearest);
  // A ray that misses the sphere gets a short interval, as in training.
  let half = sqrt(max(RADIUS * RADIUS - closest, 0.01 * RADIUS * RADIUS));
  let outside = dot(offset, offset) > RADIUS * RADIUS;
  return Crossing(middle - half, middle + half, closest > RADIUS * RADIUS || (middle < 0.0 && outside));
}

fn misses(origin: vec3f, along: vec3f) -> bool {
  return ${encoding.spacing === "sphere" ? "crossing(origin, along).missed" : "false"};
}

/** Distance along a ray at a position in [0, 1] of the scene's spacing. */
fn spaced(fraction: f32) -> f32 {
  return ${encoding.spacing === "disparity" ? "1.0 / (1.0 / NEAR + (1.0 / FAR - 1.0 / NEAR) * fraction)" : "NEAR + (FAR - NEAR) * fraction"};
}

/** Contract space into a ball of radius 2 (mip-NeRF 360, eq. 10). */
fn contract(point: vec3f) -> vec3f {
  let far = max(length(point), 1.0);
  return point * ((2.0 - 1.0 / far) / far);
}

/** Sine or cosine with range reduction: some GPUs are inaccurate for large angles, as WGSL allows. */
fn wave(angle: f32, cosine: bool) -> f32 {
  let turns = floor(angle / 6.283185307 + 0.5);
  // 2 pi in two parts, the first of so few bits that its multiples are exact (Cody and Waite).
  let small = (angle - turns * 6.28125) - turns * 0.0019353071795864;
  if (cosine) { return cos(small); }
  return sin(small);
}

/** Number \`at\` of a frequency encoding with \`size\` axes; \`value\` is the coordinate on its axis. */
fn encoded(value: f32, at: u32, size: u32, octaves: u32) -> f32 {
  if (at < size) { return value; }
  let octave = (at - size) / size;
  return wave(value * f32(1u << (octave % octaves)), octave >= octaves);
}
`;
}

/** WGSL of the composited encoding: placement of sample points, reads of the volume, compositing. @param {Encoding & {kind: "composited"}} e @returns {string} */
function marching(e) {
  const bounded = e.warp === "ball";
  const values = e.channels + 1;
  const warped = {
    ball: "return point;",
    contracted: "return contract(point);",
    frustum: /* wgsl */ `
  let local = transpose(AXES) * (point - ORIGIN);
  let disparity = 1.0 / max(-local.z, 0.05);
  return vec3f(local.xy * disparity, disparity);`,
  }[e.warp];
  return /* wgsl */ `
const LOW = ${vec3(e.low)};
const INVERSE = ${vec3(e.extent.map((side) => 1 / side))};
const ORIGIN = ${vec3(e.origin)};
const AXES = ${mat3(e.axes)};
const OCCUPANCY = vec3u(${e.occupancy.join(", ")});
const CELLS = vec3u(${e.cells.join(", ")});
const PROBES = ${e.probes}u;
const MASKS = ${Math.ceil(e.probes / 32)}u;
/** Values of a grid point: features, then density, in vectors of four. */
const VALUES = ${Math.ceil(values / 4)}u;
const DENSITY = ${e.channels}u;
/** A grid point's row holds half-precision numbers, eight per vector. */
const ROW = ${Math.ceil(values / 8)}u;

struct Found {
  /** Features, then accumulation. */
  values: array<vec4f, VALUES>,
  fraction: f32,
  point: vec3f,
  distance: f32,
  empty: bool,
}

fn warped(point: vec3f) -> vec3f { ${warped} }
fn unit(point: vec3f) -> vec3f { return clamp((warped(point) - LOW) * INVERSE, vec3f(0.0), vec3f(1.0)); }
fn stepped(fraction: f32) -> f32 { return ${bounded ? "fraction" : "spaced(fraction)"}; }

fn occupied(place: vec3f) -> bool {
  let cell = min(vec3u(place * vec3f(OCCUPANCY)), OCCUPANCY - 1u);
  let number = (cell.z * OCCUPANCY.y + cell.y) * OCCUPANCY.x + cell.x;
  return ((occupancy[number >> 5u] >> (number & 31u)) & 1u) != 0u;
}

/** Trilinear interpolation. */
fn gathered(place: vec3f) -> array<vec4f, VALUES> {
  var sum: array<vec4f, VALUES>;
  let scaled = place * vec3f(CELLS);
  let low = min(vec3u(scaled), CELLS - 1u);
  let share = scaled - vec3f(low);
  let size = CELLS + 1u;
  let first = (low.z * size.y + low.y) * size.x + low.x;
  for (var corner = 0u; corner < 8u; corner++) {
    let far = vec3u(corner & 1u, (corner >> 1u) & 1u, corner >> 2u);
    let weights = select(1.0 - share, share, far == vec3u(1u));
    let weight = weights.x * weights.y * weights.z;
    let row = indices[first + (far.z * size.y + far.y) * size.x + far.x] * ROW;
    for (var v = 0u; v < VALUES; v++) {
      let words = features[row + v / 2u];
      let pair = select(words.xy, words.zw, (v & 1u) == 1u);
      sum[v] += weight * vec4f(unpack2x16float(pair.x), unpack2x16float(pair.y));
    }
  }
  return sum;
}

/** Placement of sample points: the searched part of a ray and its occupied bins. */
struct Placement {
  mask: array<u32, MASKS>,
  total: u32,
  start: vec3f,
  step: vec3f,
  enter: f32,
  length: f32,
}

/** Place sample points for a ray, or for the mean ray of a block, as in students/cpu_kernels.py. */
fn place_samples(origin: vec3f, lead: vec3f) -> Placement {
  var placed: Placement;
  let center = (origin - CENTER) / RADIUS;
  let slope = lead / RADIUS;
  ${
    bounded
      ? /* wgsl */ `
  let safe = select(slope, vec3f(1e-9), abs(slope) < vec3f(1e-9));
  let one = (LOW - center) / safe;
  let other = (LOW + 1.0 / INVERSE - center) / safe;
  let nearest = min(one, other);
  let farthest = max(one, other);
  placed.enter = max(max(nearest.x, max(nearest.y, nearest.z)), 0.0);
  placed.length = min(farthest.x, min(farthest.y, farthest.z)) - placed.enter;
  placed.start = center + placed.enter * slope;
  placed.step = placed.length * slope;
  let missed = placed.length <= 0.0;`
      : /* wgsl */ `
  placed.length = 1.0;
  placed.start = center;
  placed.step = slope;
  let missed = false;`
  }
  for (var j = 0u; j < PROBES && !missed; j++) {
    if (occupied(probe(placed.start, placed.step, j))) {
      placed.mask[j >> 5u] |= 1u << (j & 31u);
      placed.total++;
    }
  }
  return placed;
}

/** Unit coordinates of the middle of a bin. */
fn probe(start: vec3f, step: vec3f, bin: u32) -> vec3f {
  return unit(start + stepped((f32(bin) + 0.5) / f32(PROBES)) * step);
}

/** Composite along a ray; the sample points divide the occupied bins into equal shares. */
fn march(origin: vec3f, along: vec3f, placed: ptr<function, Placement>, samples: u32) -> Found {
  var found: Found;
  let start = (origin - CENTER) / RADIUS;
  let slope = along / RADIUS;
  found.empty = (*placed).total == 0u;
  if (!found.empty) {
    let share = f32((*placed).total) / f32(samples);
    var bin = -1;
    var before = 0.0;
    var here = 0.0;
    var length = 0.0;
    var light = 1.0;
    for (var i = 0u; i < samples && light >= 1e-3; i++) {
      let wanted = share * (f32(i) + 0.5);
      while (bin < 0 || (wanted >= before + here && bin < i32(PROBES) - 1)) {
        bin++;
        if (bin > 0) { before += here; }
        here = f32(((*placed).mask[u32(bin) >> 5u] >> (u32(bin) & 31u)) & 1u);
        if (here > 0.0) {
          let first = max(bin - 1, 0);
          let last = min(bin + 1, i32(PROBES) - 1);
          let begin = probe((*placed).start, (*placed).step, u32(first));
          let end = probe((*placed).start, (*placed).step, u32(last));
          length = distance(begin * vec3f(CELLS), end * vec3f(CELLS)) / f32(last - first);
        }
      }
      let fraction = (f32(bin) + wanted - before) / f32(PROBES);
      let place = unit(start + ((*placed).enter + (*placed).length * stepped(fraction)) * slope);
      var values = gathered(place);
      let thickness = exp(min(values[DENSITY / 4u][DENSITY % 4u] - 2.0, 10.0)) * length * share;
      let left = exp(-thickness);
      let weight = light * (1.0 - left);
      light *= left;
      // The component of the density holds the accumulation.
      values[DENSITY / 4u][DENSITY % 4u] = 1.0;
      for (var v = 0u; v < VALUES; v++) { found.values[v] += weight * values[v]; }
      found.fraction += weight * fraction;
      found.point += weight * place;
    }
  }
  let accumulation = found.values[DENSITY / 4u][DENSITY % 4u];
  found.fraction = (found.fraction + 0.00005) / (accumulation + 0.0001);
  found.point = (found.point + 0.00005) / (accumulation + 0.0001);
  found.distance = (*placed).enter + (*placed).length * stepped(found.fraction);
  return found;
}
`;
}

/** WGSL of the other encodings: numbers of a ray before frequency encoding. @param {Encoding & {kind: "points" | "plucker" | "two-plane"}} e */
function values(e) {
  if (e.kind === "plucker") {
    return /* wgsl */ `
fn value(origin: vec3f, along: vec3f, at: u32) -> f32 {
  if (at < 3u) { return along[at]; }
  return cross((origin - CENTER) / RADIUS, along)[at - 3u];
}`;
  }
  if (e.kind === "two-plane") {
    return /* wgsl */ `
const AXES = ${mat3(e.axes)};
fn value(origin: vec3f, along: vec3f, at: u32) -> f32 {
  let start = transpose(AXES) * ((origin - CENTER) / RADIUS);
  let step = transpose(AXES) * along;
  let slope = max(abs(step.z), 0.1) * select(-1.0, 1.0, step.z >= 0.0);
  let plane = f32(at / 2u) * 2.0 - 1.0;
  return (start.xy + (plane - start.z) / slope * step.xy)[at % 2u];
}`;
  }
  return "";
}

/** WGSL: points of a ray, in the coordinates that are encoded. @param {Encoding & {kind: "points" | "plucker" | "two-plane"}} e */
function points(e) {
  const ndc = e.ndc ?? [1, 1];
  let line = /* wgsl */ `
  let start = (origin - CENTER) / RADIUS;
  let step = along / RADIUS;
  return start + spaced(fraction) * step;`;
  if (e.spacing === "sphere") {
    line = /* wgsl */ `
  let span = crossing(origin, along);
  return (origin - CENTER + mix(span.enter, span.leave, fraction) * along) / RADIUS;`;
  }
  if (e.frame && e.rotation) {
    const [frame, rotation] = [e.frame, e.rotation];
    line = /* wgsl */ `
  let start = ${mat3(frame)} * origin + ${vec3(frame.map((row) => row[3]))};
  let step = ${mat3(rotation)} * along;`;
    line += e.ndc
      ? /* wgsl */ `
  // Normalized device coordinates (NeRF, appendix C).
  let slope = step.xy / min(step.z, -1e-3);
  let at = start.xy - (1.0 + start.z) * slope;
  let scale = vec2f(${ndc.map(f32).join(", ")});
  return vec3f(scale * at, -1.0) + spaced(fraction) * vec3f(-scale * (slope + at), 2.0);`
      : "return start + spaced(fraction) * step;";
  }
  return /* wgsl */ `
fn lined(origin: vec3f, along: vec3f, fraction: f32) -> vec3f { ${line} }
fn point(origin: vec3f, along: vec3f, fraction: f32) -> vec3f {
  return ${e.contracted ? "contract(lined(origin, along, fraction))" : "lined(origin, along, fraction)"};
}
${
    e.kind === "points"
      ? /* wgsl */ `
fn value(origin: vec3f, along: vec3f, at: u32) -> f32 {
  return point(origin, along, f32(at / 3u) / ${f32(Math.max(1, e.points - 1))})[at % 3u];
}`
      : values(e)
  }`;
}

/** @param {Encoding & {kind: "points" | "plucker" | "two-plane"}} e @returns {number} numbers before frequency encoding */
const valueCount = (e) => ({ points: 3 * e.points, plucker: 6, "two-plane": 4 })[e.kind];

/** Numbers per ray that a network reads. @param {Encoding} e @returns {number} */
export function codeLength(e) {
  if (e.kind === "composited") return e.channels + 1 + 3 * (2 * e.pointOctaves + 1) + 3 * (2 * e.directionOctaves + 1);
  return valueCount(e) * (2 * e.octaves + 1) + (e.volume ? e.volume.channels * e.volume.points : 0);
}

/** f32 numbers per row that marching leaves for encoding. @param {Encoding} e */
export const foundLength = (e) => (e.kind === "composited" ? e.channels + 7 : 0);

const FRAME = /* wgsl */ `
@group(0) @binding(0) var<uniform> camera: Camera;
@group(0) @binding(1) var<storage, read_write> counter: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read_write> list: array<u32>;
`;

const SPACE = /* wgsl */ `
@group(1) @binding(0) var<storage, read> occupancy: array<u32>;
@group(1) @binding(1) var<storage, read> indices: array<u32>;
@group(1) @binding(2) var<storage, read> features: array<vec4u>;
`;

/** @param {Encoding & {kind: "composited"}} e */
const KEEP = (e) => /* wgsl */ `
/** Store the result of marching for a row. */
fn keep(row: u32, what: Found, along: vec3f) {
  let at = row * ${foundLength(e)}u;
  for (var v = 0u; v <= DENSITY; v++) { found[at + v] = what.values[v / 4u][v % 4u]; }
  for (var axis = 0u; axis < 3u; axis++) {
    found[at + ${e.channels + 1}u + axis] = what.point[axis];
    found[at + ${e.channels + 4}u + axis] = along[axis];
  }
}
`;

/**
 * Shader over all pixels: march the ray, or write the background.
 *
 * R2L: pixels that hit something are listed. MobileR2L: their cells are marked.
 *
 * @param {Scene} scene
 */
export function pixelShader(scene) {
  const { encoding, factor, margin, rays: conventions } = scene.student;
  const composited = encoding.kind === "composited";
  const image = factor > 1;
  const inBlocks = image && composited;
  const seen = composited
    ? /* wgsl */ `
  ${image ? "" : "var placed = place_samples(camera.position, along);"}
  let what = march(camera.position, along, ${image ? "placed" : "&placed"}, ${image ? encoding.pixelSamples : encoding.samples}u);
  if (${encoding.warp === "ball" ? "what.empty" : "false"}) { missed = true; }
  else { depths[pixel] = what.distance; }`
    : "";
  const kept = image
    ? /* wgsl */ `
  let cell = (id.y / ${factor}u + ${margin}u) * u32(camera.columns) + id.x / ${factor}u + ${margin}u;
  marks[cell] = 1u;
  ${composited ? "for (var v = 0u; v < VALUES; v++) { met[pixel * VALUES + v] = what.values[v]; }" : ""}`
    : /* wgsl */ `
  let row = atomicAdd(&counter[0], 1u);
  list[row] = id.x | (id.y << 16u);
  ${composited ? "keep(row, what, along);" : ""}`;
  return /* wgsl */ `
${rays(scene)}
${FRAME}
@group(0) @binding(3) var picture: texture_storage_2d<rgba8unorm, write>;
@group(0) @binding(4) var<storage, read_write> depths: array<f32>;
${image ? "@group(0) @binding(5) var<storage, read_write> marks: array<u32>;" : ""}
${composited ? (image ? "@group(0) @binding(6) var<storage, read_write> met: array<vec4f>;" : "@group(0) @binding(6) var<storage, read_write> found: array<f32>;") : ""}
${composited ? SPACE + marching(encoding) + (image ? "" : KEEP(encoding)) : ""}
${inBlocks ? `const BLOCK = ${encoding.block}u;` : ""}

${
    inBlocks
      ? /* wgsl */ `
@compute @workgroup_size(8, 8)
fn main(@builtin(global_invocation_id) block: vec3u) {
  let first = direction(camera, vec2f(block.xy * BLOCK) + 0.5);
  let last = direction(camera, vec2f(block.xy * BLOCK) + f32(BLOCK) - 0.5);
  var placed = place_samples(camera.position, (first + last) / 2.0);
  for (var y = 0u; y < BLOCK; y++) {
    for (var x = 0u; x < BLOCK; x++) { draw(block.xy * BLOCK + vec2u(x, y), &placed); }
  }
}
fn draw(id: vec2u, placed: ptr<function, Placement>) {`
      : /* wgsl */ `
@compute @workgroup_size(8, 8)
fn main(@builtin(global_invocation_id) id: vec3u) {`
  }
  if (f32(id.x) >= camera.width || f32(id.y) >= camera.height) { return; }
  let pixel = id.y * u32(camera.width) + id.x;
  let along = direction(camera, vec2f(id.xy) + ${f32(image ? 0.5 : conventions.offset)});
  var missed = misses(camera.position, along);
  depths[pixel] = 0.0;
  if (!missed) {
    ${seen}
    if (!missed) { ${kept} }
  }
  if (missed) { textureStore(picture, id.xy, vec4f(BACKGROUND, 0.0)); }
}
`;
}

/** Shader over all cells: list those that have a marked pixel, or a neighbor with one. @param {Scene} scene */
export function cellShader(scene) {
  return /* wgsl */ `
${rays(scene)}
${FRAME}
@group(0) @binding(3) var<storage, read_write> marks: array<u32>;
@group(0) @binding(4) var<storage, read_write> map: array<i32>;

@compute @workgroup_size(8, 8)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let size = vec2i(i32(camera.columns), i32(camera.rows));
  let cell = vec2i(id.xy);
  if (any(cell >= size)) { return; }
  var needed = false;
  for (var y = max(cell.y - 1, 0); y <= min(cell.y + 1, size.y - 1); y++) {
    for (var x = max(cell.x - 1, 0); x <= min(cell.x + 1, size.x - 1); x++) {
      needed = needed || marks[y * size.x + x] != 0u;
    }
  }
  let at = cell.y * size.x + cell.x;
  map[at] = -1;
  if (needed) {
    let row = atomicAdd(&counter[0], 1u);
    list[row] = id.x | (id.y << 16u);
    map[at] = i32(row);
  }
}
`;
}

/** Shader over the listed cells: march their rays. @param {Scene} scene */
export function cellMarchShader(scene) {
  const { encoding, factor, margin } = scene.student;
  if (encoding.kind !== "composited") throw new Error("only composited cells are marched");
  return /* wgsl */ `
${rays(scene)}
${FRAME}
@group(0) @binding(3) var<storage, read_write> found: array<f32>;
${SPACE}
${marching(encoding)}
${KEEP(encoding)}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= atomicLoad(&counter[0])) { return; }
  let cell = vec2f(f32(list[id.x] & 0xffffu), f32(list[id.x] >> 16u)) - ${f32(margin)};
  // A cell's ray is the mean of those of two opposite corner pixels.
  let first = direction(camera, cell * ${f32(factor)} + 0.5);
  let last = direction(camera, cell * ${f32(factor)} + ${f32(factor - 0.5)});
  let along = normalize((first + last) / 2.0);
  var placed = place_samples(camera.position, along);
  keep(id.x, march(camera.position, along, &placed, ${encoding.samples}u), along);
}
`;
}

/** Shader: encode the rays of a chunk, four numbers at a time. @param {Scene} scene @param {string} T type of a stored number */
export function encodeShader(scene, T) {
  const { encoding: e, factor, margin, rays: conventions } = scene.student;
  const length = codeLength(e);
  let number;
  if (e.kind === "composited") {
    const [values, point] = [e.channels + 1, 3 * (2 * e.pointOctaves + 1)];
    number = /* wgsl */ `
fn number(row: u32, at: u32) -> f32 {
  let base = row * ${foundLength(e)}u;
  if (at < ${values}u) { return found[base + at]; }
  if (at < ${values + point}u) {
    let i = at - ${values}u;
    return encoded(2.0 * found[base + ${values}u + i % 3u] - 1.0, i, 3u, ${Math.max(1, e.pointOctaves)}u);
  }
  let i = at - ${values + point}u;
  return encoded(found[base + ${values + 3}u + i % 3u], i, 3u, ${Math.max(1, e.directionOctaves)}u);
}`;
  } else {
    const count = valueCount(e);
    const coded = count * (2 * e.octaves + 1);
    const place = factor > 1 ? `(cell - ${f32(margin)} + ${f32(conventions.offset)}) * ${f32(factor)}` : `cell + ${f32(conventions.offset)}`;
    number = /* wgsl */ `
${points(e)}
${
  e.volume
    ? /* wgsl */ `
fn feature(origin: vec3f, along: vec3f, at: u32) -> f32 {
  let place = point(origin, along, f32(at % ${e.volume.points}u) / ${f32(Math.max(1, e.volume.points - 1))}) / ${f32(e.volume.extent)};
  let scaled = clamp((place + 1.0) * 0.5, vec3f(0.0), vec3f(1.0)) * ${f32(e.volume.resolution - 1)};
  let low = min(vec3u(scaled), vec3u(${e.volume.resolution - 2}u));
  let share = scaled - vec3f(low);
  var sum = 0.0;
  for (var corner = 0u; corner < 8u; corner++) {
    let far = vec3u(corner & 1u, (corner >> 1u) & 1u, corner >> 2u);
    let weights = select(1.0 - share, share, far == vec3u(1u));
    let grid = low + far;
    let number = ((grid.z * ${e.volume.resolution}u + grid.y) * ${e.volume.resolution}u + grid.x) * ${e.volume.channels}u + at / ${e.volume.points}u;
    let pair = unpack2x16float(features[number >> 1u]);
    sum += weights.x * weights.y * weights.z * select(pair.x, pair.y, (number & 1u) == 1u);
  }
  return sum;
}`
    : ""
}
fn number(row: u32, at: u32) -> f32 {
  let cell = vec2f(f32(list[row] & 0xffffu), f32(list[row] >> 16u));
  let along = direction(camera, ${place});
  ${e.volume ? `if (at >= ${coded}u) { return feature(camera.position, along, at - ${coded}u); }` : ""}
  return encoded(value(camera.position, along, at % ${count}u), at, ${count}u, ${Math.max(1, e.octaves)}u);
}`;
  }
  return /* wgsl */ `
${T === "f16" ? "enable f16;" : ""}
${rays(scene)}
${FRAME}
@group(0) @binding(3) var<storage, read_write> code: array<vec4<${T}>>;
@group(0) @binding(4) var<uniform> chunk: vec4u;
${e.kind === "composited" ? "@group(0) @binding(5) var<storage, read> found: array<f32>;" : e.volume ? "@group(0) @binding(5) var<storage, read> features: array<u32>;" : ""}
${number}

@compute @workgroup_size(${TILE})
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3u) {
  let row = chunk.x + id.x;
  if (row >= atomicLoad(&counter[0])) { return; }
  var four = vec4f(0.0);
  for (var i = 0u; i < 4u; i++) {
    let at = group.y * 4u + i;
    if (at < ${length}u) { four[i] = number(row, at); }
  }
  code[(group.x * ${Math.ceil(length / 4)}u + group.y) * ${TILE}u + lane] = vec4<${T}>(four);
}
`;
}

/** Shader: compute the number of workgroups of each later pass. @param {{scale: number, y: number, z: number, start: number}[]} passes @param {number} chunk rows at once */
export function argumentShader(passes, chunk) {
  return /* wgsl */ `
@group(0) @binding(0) var<storage, read_write> counter: array<atomic<u32>>;
@group(0) @binding(1) var<storage, read_write> arguments: array<u32>;
@compute @workgroup_size(1)
fn main() {
  var passes = array<vec4u, ${passes.length}>(${passes.map((p) => `vec4u(${p.scale}, ${p.y}, ${p.z}, ${p.start})`).join(", ")});
  let count = atomicLoad(&counter[0]);
  for (var i = 0u; i < ${passes.length}u; i++) {
    let rows = min(max(count, passes[i].w) - passes[i].w, ${chunk}u) * passes[i].x;
    arguments[3u * i] = (rows + ${TILE - 1}u) / ${TILE}u;
    arguments[3u * i + 1u] = passes[i].y;
    arguments[3u * i + 2u] = passes[i].z;
  }
}
`;
}

/** @param {Layer["activation"]} kind @param {string} x */
const activated = (kind, x) => ({ none: x, relu: `max(${x}, vec4f(0.0))`, gelu: `gelu(${x})` })[kind];

/** The exact GELU, as torch's default. WGSL has no erf (approximation: Abramowitz and Stegun 7.1.26, off by 1.5e-7). */
const GELU = /* wgsl */ `
fn gelu(x: vec4f) -> vec4f {
  let z = abs(x) * 0.70710678;
  let t = 1.0 / (1.0 + 0.3275911 * z);
  let tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * exp(-z * z);
  return 0.5 * x * (1.0 + sign(x) * (1.0 - tail));
}
`;

/**
 * Shader of one layer: rows times matrix, plus bias, activation and residual.
 *
 * Rows are stored in tiles of 256, with four numbers of each of a tile's rows adjacent, for coalesced reads.
 * Each thread keeps 4 rows by 4 \`groups\` columns in registers. Sums are always in f32.
 *
 * @param {Layer} layer
 * @param {string} T
 */
export function layerShader(layer, T) {
  const { taps, step, groups, activation, residual, skip, scale } = layer;
  const [k4, n4] = [Math.ceil(layer.inputs / 4), layer.padded / 4];
  const rows = [0, 1, 2, 3];
  const columns = Array.from({ length: groups }, (_, c) => c);
  const spread = step > 1;
  const side = Math.sqrt(scale);
  const tile = `${TILE}u`;
  /** @param {(r: number, c: number) => string} line */
  const each = (line) => rows.map((r) => columns.map((c) => line(r, c)).join("\n")).join("\n");
  return /* wgsl */ `
${T === "f16" ? "enable f16;" : ""}
@group(0) @binding(0) var<storage, read> input: array<vec4<${T}>>;
@group(0) @binding(1) var<storage, read> matrix: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> output: array<vec4<${T}>>;
${skip ? `@group(0) @binding(3) var<storage, read> skipped: array<vec4<${T}>>;` : ""}
${
    spread
      ? /* wgsl */ `
@group(0) @binding(4) var<storage, read> list: array<u32>;
@group(0) @binding(5) var<storage, read> map: array<i32>;
@group(0) @binding(6) var<uniform> grid: vec4u;

/** Row of the hidden pixel at offset \`by\`, or -1 if there is none. */
fn neighbor(row: u32, by: vec2i) -> i32 {
  let cell = list[row / ${scale}u];
  let sub = row % ${scale}u;
  let at = vec2i(i32(cell & 0xffffu), i32(cell >> 16u)) * ${side} + vec2i(i32(sub % ${side}u), i32(sub / ${side}u)) + by;
  if (any(at < vec2i(0)) || any(at >= vec2i(grid.xy) * ${side})) { return -1; }
  let next = at / ${side};
  let found = map[u32(next.y) * grid.x + u32(next.x)];
  if (found < 0) { return -1; }
  return found * ${scale} + (at.y % ${side}) * ${side} + at.x % ${side};
}`
      : ""
  }
${activation === "gelu" ? GELU : ""}

fn at(row: u32, width: u32) -> u32 { return (row / ${tile}) * width * ${tile} + row % ${tile}; }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let first = group.x * ${tile} + lane;
  let column = group.y * ${groups}u;
  ${each((r, c) => `var sum${r}_${c} = matrix[${step * step * taps * k4 * 4 * n4}u + column + ${c}u];`)}
  ${rows.map((r) => `let row${r} = first + ${64 * r}u;`).join("\n")}
  ${
    taps > 1
      ? /* wgsl */ `let side = vec2i(i32(group.z & 1u), i32(group.z >> 1u)) * 2 - 1;
  for (var tap = 0u; tap < ${taps}u; tap++) {
    let by = side * vec2i(i32(tap & 1u), i32(tap >> 1u));
    ${rows.map((r) => `let from${r} = neighbor(row${r}, by); var read${r} = at(u32(max(from${r}, 0)), ${k4}u); let keep${r} = f32(from${r} >= 0);`).join("\n")}
    var weight = (group.z * ${taps}u + tap) * ${k4 * 4 * n4}u + column;`
      : /* wgsl */ `
  {
    ${rows.map((r) => `var read${r} = at(row${r}, ${k4}u);`).join("\n")}
    var weight = ${spread ? `group.z * ${k4 * 4 * n4}u + ` : ""}column;`
  }
    for (var k = 0u; k < ${k4}u; k++) {
      ${rows.map((r) => `let a${r} = vec4f(input[read${r}])${taps > 1 ? ` * keep${r}` : ""}; read${r} += ${tile};`).join("\n")}
      ${[0, 1, 2, 3].map((i) => columns.map((c) => `let w${i}_${c} = matrix[weight + ${i * n4 + c}u];`).join("\n")).join("\n")}
      ${each((r, c) => `sum${r}_${c} += a${r}.x * w0_${c} + a${r}.y * w1_${c} + a${r}.z * w2_${c} + a${r}.w * w3_${c};`)}
      weight += ${4 * n4}u;
    }
  }
  ${
    spread
      ? rows
          .map(
            (r) => /* wgsl */ `
  let sub${r} = vec2u(row${r} % ${side}u, (row${r} / ${side}u) % ${side}u) * ${step}u + vec2u(group.z % ${step}u, group.z / ${step}u);
  var write${r} = at((row${r} / ${scale}u) * ${scale * step * step}u + sub${r}.y * ${side * step}u + sub${r}.x, ${n4}u) + column * ${tile};`,
          )
          .join("\n")
      : rows.map((r) => `var write${r} = at(row${r}, ${n4}u) + column * ${tile};`).join("\n")
  }
  ${each((r, c) => {
    const to = `write${r} + ${c * TILE}u`;
    let made = activated(activation, `sum${r}_${c}`);
    if (residual) made += ` + vec4f(output[${to}])`;
    if (skip) made += ` + ${f32(skip)} * vec4f(skipped[${to}])`;
    return `output[${to}] = vec4<${T}>(${made});`;
  })}
}
`;
}

/** WGSL: color, accumulation and depth of a pixel from the network's outputs. @param {Scene} scene @param {boolean} hasOwn whether the network predicts accumulation and depth */
function painting(scene, hasOwn) {
  const { encoding } = scene.student;
  const bounded = encoding.kind === "composited" && encoding.warp === "ball";
  return /* wgsl */ `
fn paint(place: vec2u, first: vec4f, second: vec4f, composited: f32) {
  let values = 1.0 / (1.0 + exp(-first));
  ${bounded ? "let color = mix(BACKGROUND, values.rgb, composited);" : "let color = values.rgb;"}
  ${hasOwn ? `let along = direction(camera, vec2f(place) + 0.5);
  let fraction = 1.0 / (1.0 + exp(-second.x));
  ${encoding.spacing === "sphere" ? "let span = crossing(camera.position, along); let far = mix(span.enter, span.leave, fraction);" : "let far = spaced(fraction);"}
  depths[place.y * u32(camera.width) + place.x] = max(far, 0.0);` : ""}
  let opacity = ${hasOwn ? "values.w" : encoding.kind === "composited" ? "composited" : "1.0"};
  textureStore(picture, place, vec4f(color, opacity));
}
`;
}

/**
 * Shader of R2L's last layer: from hidden rows to pixels.
 *
 * @param {Scene} scene
 * @param {Layer} tail
 * @param {string} T
 */
export function tailShader(scene, tail, T) {
  const { encoding: e, outputs } = scene.student;
  const composited = e.kind === "composited";
  const [k4, n4] = [Math.ceil(tail.inputs / 4), tail.padded / 4];
  return /* wgsl */ `
${T === "f16" ? "enable f16;" : ""}
${rays(scene)}
${FRAME}
@group(0) @binding(3) var picture: texture_storage_2d<rgba8unorm, write>;
@group(0) @binding(4) var<storage, read_write> depths: array<f32>;
@group(0) @binding(5) var<uniform> chunk: vec4u;
@group(1) @binding(0) var<storage, read> input: array<vec4<${T}>>;
@group(1) @binding(1) var<storage, read> matrix: array<vec4f>;
${composited ? "@group(1) @binding(2) var<storage, read> found: array<f32>;" : ""}
${painting(scene, outputs === 5)}

@compute @workgroup_size(${TILE})
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3u) {
  let row = chunk.x + id.x;
  if (row >= atomicLoad(&counter[0])) { return; }
  var sum = array<vec4f, ${n4}>(${Array.from({ length: n4 }, (_, c) => `matrix[${4 * k4 * n4 + c}]`).join(", ")});
  for (var k = 0u; k < ${k4}u; k++) {
    let a = vec4f(input[(group.x * ${k4}u + k) * ${TILE}u + lane]);
    for (var i = 0u; i < 4u; i++) {
      for (var c = 0u; c < ${n4}u; c++) { sum[c] += a[i] * matrix[(4u * k + i) * ${n4}u + c]; }
    }
  }
  paint(vec2u(list[row] & 0xffffu, list[row] >> 16u), sum[0], sum[${n4 - 1}], ${composited ? `found[row * ${foundLength(e)}u + ${e.channels}u]` : "0.0"});
}
`;
}

/**
 * WGSL: a layer of one pixel, from vectors `name0`, `name1`, … to sums `made0`, …
 *
 * @param {string} name
 * @param {string} made
 * @param {number} inputs vectors of four
 * @param {number} outputs vectors of four
 * @param {string} matrix
 * @param {number} from where in it the layer's matrix begins, in vectors
 */
function pixelLayer(name, made, inputs, outputs, matrix, from) {
  const column = (/** @type {number} */ c) => {
    const bias = `var ${made}${c} = ${matrix}[${from + 4 * inputs * outputs + c}];`;
    const add = (/** @type {number} */ k) => `${made}${c} += ${name}${k >> 2}.${"xyzw"[k & 3]} * ${matrix}[${from + k * outputs + c}];`;
    return [bias, ...Array.from({ length: 4 * inputs }, (_, k) => add(k))].join("\n  ");
  };
  return Array.from({ length: outputs }, (_, c) => column(c)).join("\n  ");
}

/**
 * WGSL: the layers that join each pixel's composited features, from `a0`, … to `h0`, …
 *
 * @param {Layer[]} joins
 * @param {number} inputs vectors of four
 */
function joinLayers([join, ...blocks], inputs) {
  const width = join.padded / 4;
  const vectors = Array.from({ length: width }, (_, c) => c);
  let from = (4 * inputs + 1) * width;
  const size = (4 * width + 1) * width;
  const lines = [pixelLayer("a", "joined", inputs, width, "joinMatrix", 0), ...vectors.map((c) => `var h${c} = gelu(joined${c});`)];
  for (let block = 0; block < blocks.length / 2; block++) {
    const second = [
      pixelLayer("h", "first", width, width, "joinMatrix", from),
      ...vectors.map((c) => `let active${c} = max(first${c}, vec4f(0.0));`),
      pixelLayer("active", "second", width, width, "joinMatrix", from + size),
      ...vectors.map((c) => `h${c} += second${c};`),
    ];
    lines.push("{", ...second, "}");
    from += 2 * size;
  }
  return lines.join("\n  ");
}

/**
 * Shader of MobileR2L's last layers, which join each pixel's composited features.
 *
 * @param {Scene} scene
 * @param {{joins: Layer[], tail: Layer}} layers
 * @param {string} T
 */
export function finishShader(scene, { joins, tail }, T) {
  const join = joins.at(0);
  const { encoding: e, factor, margin, outputs } = scene.student;
  const composited = e.kind === "composited";
  const n4 = tail.padded / 4;
  const hidden4 = Math.ceil((join ? join.inputs - (composited ? e.channels + 1 : 0) : tail.inputs) / 4);
  const joined4 = composited ? Math.ceil((e.channels + 1) / 4) : 0;
  return /* wgsl */ `
${T === "f16" ? "enable f16;" : ""}
${rays(scene)}
${FRAME}
@group(0) @binding(3) var picture: texture_storage_2d<rgba8unorm, write>;
@group(0) @binding(4) var<storage, read_write> depths: array<f32>;
@group(1) @binding(0) var<storage, read> input: array<vec4<${T}>>;
@group(1) @binding(1) var<storage, read> matrix: array<vec4f>;
${
    join
      ? /* wgsl */ `
@group(1) @binding(2) var<storage, read> met: array<vec4f>;
@group(1) @binding(3) var<storage, read> joinMatrix: array<vec4f>;
${GELU}`
      : ""
  }
${painting(scene, outputs === 5)}

@compute @workgroup_size(${TILE})
fn main(@builtin(global_invocation_id) id: vec3u) {
  let row = id.x / ${factor * factor}u;
  if (row >= atomicLoad(&counter[0])) { return; }
  let sub = id.x % ${factor * factor}u;
  let cell = vec2i(i32(list[row] & 0xffffu), i32(list[row] >> 16u)) - ${margin};
  let place = cell * ${factor} + vec2i(i32(sub % ${factor}u), i32(sub / ${factor}u));
  if (any(place < vec2i(0)) || any(place >= vec2i(i32(camera.width), i32(camera.height)))) { return; }
  let pixel = u32(place.y) * u32(camera.width) + u32(place.x);
  ${e.spacing === "sphere" ? "if (misses(camera.position, direction(camera, vec2f(place) + 0.5))) { return; }" : ""}
  ${
    join && composited
      ? /* wgsl */ `
  let accumulation = met[pixel * ${joined4}u + ${e.channels >> 2}u][${e.channels & 3}];
  ${e.warp === "ball" ? "if (depths[pixel] == 0.0) { return; }" : ""}`
      : "let accumulation = 0.0;"
  }
  let base = (id.x / ${TILE}u) * ${hidden4 * TILE}u + id.x % ${TILE}u;
  ${Array.from({ length: hidden4 }, (_, k) => `let a${k} = vec4f(input[base + ${k * TILE}u]);`).join("\n")}
  ${join ? Array.from({ length: joined4 }, (_, k) => `let a${hidden4 + k} = met[pixel * ${joined4}u + ${k}u];`).join("\n") : ""}
  ${join ? joinLayers(joins, hidden4 + joined4) : ""}
  ${pixelLayer(join ? "h" : "a", "sum", join ? join.padded / 4 : hidden4, n4, "matrix", 0)}
  paint(vec2u(place), sum0, sum${n4 - 1}, accumulation);
}
`;
}

/** Resample the frame to the canvas: bilinear, or the mean over the area of a canvas pixel. */
export const PRESENT = /* wgsl */ `
struct Present { drawn: vec2f, canvas: vec2f, background: vec3f, transparent: f32 }
@group(0) @binding(0) var<uniform> present: Present;
@group(0) @binding(1) var picture: texture_2d<f32>;
@group(0) @binding(2) var smooth_: sampler;

@vertex
fn corner(@builtin(vertex_index) index: u32) -> @builtin(position) vec4f {
  return vec4f(f32(index & 1u) * 4.0 - 1.0, f32(index >> 1u) * 4.0 - 1.0, 0.0, 1.0);
}

@fragment
fn shade(@builtin(position) at: vec4f) -> @location(0) vec4f {
  let ratio = present.drawn / present.canvas;
  let taps = clamp(ceil(ratio - 0.01), vec2f(1.0), vec2f(4.0));
  let size = vec2f(textureDimensions(picture));
  var sum = vec4f(0.0);
  for (var y = 0.5; y < taps.y; y += 1.0) {
    for (var x = 0.5; x < taps.x; x += 1.0) {
      let place = (at.xy - 0.5 + vec2f(x, y) / taps) * ratio;
      // The texture may be larger than the frame.
      sum += textureSampleLevel(picture, smooth_, clamp(place, vec2f(0.5), present.drawn - 0.5) / size, 0.0);
    }
  }
  let color = sum / (taps.x * taps.y);
  if (present.transparent == 0.0) { return vec4f(color.rgb, 1.0); }
  return vec4f(max(color.rgb - present.background * (1.0 - color.a), vec3f(0.0)), color.a);
}
`;
