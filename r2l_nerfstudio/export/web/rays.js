// Rays of an undistorted camera, with the student's conventions.

/** @import {Pose, RayConventions, Scene, Sphere} from "./types.d.ts" */

/**
 * A rectangle of cells of the image; (0, 0) is the first. A cell is `factor` x `factor` pixels.
 * @typedef {{top: number, left: number, rows: number, columns: number}} Cells
 */

/**
 * Position of a pixel in the plane one unit in front of the camera, x right, y up.
 *
 * @typedef {object} Plane
 * @property {(column: number) => number} x of a column in pixels; a pixel's center is at its index + 0.5
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
 * Directions of the rays through cells or parts of them, with the conventions of the student's ray encoding.
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
 * Return a test for rays that miss a bounded scene and see its background.
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
 * Return the rectangle of cells that see the scene, with a border of one cell.
 *
 * @param {number} width of the picture in pixels
 * @param {number} height
 * @param {number} factor
 * @param {Plane} where
 * @param {(x: number, y: number) => boolean} misses
 * @returns {Cells | null} null if no cell does
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
 * Size in pixels at which the scene is rendered for a stage of another aspect ratio.
 *
 * A bounded scene is shown completely, with more background. Any other is cropped to the student's field of view.
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
