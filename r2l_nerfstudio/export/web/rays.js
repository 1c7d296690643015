// Rays of an undistorted camera, as the student learnt them.

/** @import {Pose, RayConventions, Scene, Sphere} from "./types.d.ts" */

/**
 * Some cells of the picture's grid; 0, 0 is its first. A cell is `factor` x `factor` pixels.
 * @typedef {{top: number, left: number, rows: number, columns: number}} Cells
 */

/**
 * Place of a pixel in the plane one unit before the camera, x right, y up.
 *
 * @typedef {object} Plane
 * @property {(column: number) => number} x of a column in pixels; a pixel's centre has half a pixel more than its number
 * @property {(row: number) => number} y
 */

/**
 * @param {number} width of the picture in pixels
 * @param {number} height
 * @param {number} focal in pixels
 * @returns {Plane}
 */
export function plane(width, height, focal) {
  return { x: (column) => (column - width / 2) / focal, y: (row) => (height / 2 - row) / focal };
}

/**
 * Directions through cells, or through parts of them, as the student's ray encoding reads them.
 *
 * @param {Pose} pose
 * @param {Plane} where
 * @param {number} factor
 * @param {Cells} cells
 * @param {RayConventions} rays
 * @returns {Float32Array} rows from the top, three numbers each
 */
export function cellRays(pose, where, factor, cells, rays) {
  const { right, up, backward } = pose;
  const directions = new Float32Array(3 * cells.rows * cells.columns);
  let at = 0;
  for (let row = 0; row < cells.rows; row++) {
    const y = where.y((cells.top + row + rays.offset) * factor);
    for (let column = 0; column < cells.columns; column++) {
      const x = where.x((cells.left + column + rays.offset) * factor);
      const length = rays.planar ? 1 : Math.sqrt(x * x + y * y + 1);
      for (let axis = 0; axis < 3; axis++) {
        directions[at++] = (x * right[axis] + y * up[axis] - backward[axis]) / length;
      }
    }
  }
  return directions;
}

/**
 * Which rays pass by the scene, and so see its background; none where it has no bounds.
 *
 * @param {Pose} pose
 * @param {Sphere | null} sphere
 * @returns {(x: number, y: number) => boolean}
 */
export function missTest(pose, sphere) {
  if (!sphere) return () => false;
  const offset = pose.position.map((value, axis) => value - sphere.center[axis]);
  /** @param {number[]} axis */
  const along = (axis) => offset[0] * axis[0] + offset[1] * axis[1] + offset[2] * axis[2];
  const [a, b, c] = [along(pose.right), along(pose.up), along(pose.backward)];
  const beyond = offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2 - sphere.radius ** 2;
  return (x, y) => {
    const leaving = x * a + y * b - c;
    return beyond > (leaving * leaving) / (x * x + y * y + 1) || (leaving > 0 && beyond > 0);
  };
}

/**
 * The cells that see the scene, and those around them.
 *
 * @param {number} width of the picture in pixels
 * @param {number} height
 * @param {number} factor
 * @param {Plane} where
 * @param {(x: number, y: number) => boolean} misses
 * @returns {Cells | null} null where none does
 */
export function seenCells(width, height, factor, where, misses) {
  const [rows, columns] = [Math.ceil(height / factor), Math.ceil(width / factor)];
  let [top, left, bottom, right] = [rows, columns, -1, -1];
  for (let row = 0; row < rows; row++) {
    const y = where.y((row + 0.5) * factor);
    for (let column = 0; column < columns; column++) {
      if (misses(where.x((column + 0.5) * factor), y)) continue;
      [top, bottom] = [Math.min(top, row), Math.max(bottom, row)];
      [left, right] = [Math.min(left, column), Math.max(right, column)];
    }
  }
  if (bottom < 0) return null;
  [top, left] = [Math.max(0, top - 1), Math.max(0, left - 1)];
  [bottom, right] = [Math.min(rows - 1, bottom + 1), Math.min(columns - 1, right + 1)];
  return { top, left, rows: bottom - top + 1, columns: right - left + 1 };
}

/**
 * Size at which a picture is drawn on a stage of another shape.
 *
 * All of a bounded scene is shown, with more of its background; of any other no more than the student has learnt to see.
 *
 * @param {Scene} scene
 * @param {number} aspect the stage's width by its height
 * @param {number} scale of both sides
 * @returns {{width: number, height: number}} whole pixels
 */
export function drawnSize(scene, aspect, scale) {
  const { width, height } = scene.picture;
  const high = scale * (scene.sphere ? Math.max(height, width / aspect) : Math.min(height, width / aspect));
  return { width: Math.max(8, Math.round(high * aspect)), height: Math.max(8, Math.round(high)) };
}
