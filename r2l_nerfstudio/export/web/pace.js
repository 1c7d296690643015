// Chooses the render resolution so that frames keep up with the camera, and measures the frame rate.

const AIM_MS = 40;
const SMALLEST = 0.18;
const PATIENCE_MS = 1500;

/** Chooses the scale of the next frame from the time of the last ones. */
export class Pace {
  /**
   * @param {number | null} fixed the only possible scale; null if the student renders at any
   * @param {number} pixels of a picture at scale 1
   * @param {number} largest scale
   */
  constructor(fixed, pixels, largest) {
    this.fixed = fixed;
    this.pixels = pixels;
    this.largest = largest;
    /** @type {number | null} */
    this.perPixel = null;
    /** @type {number[]} */
    this.times = [];
    this.milliseconds = 0;
  }

  /**
   * @param {number} pixels drawn
   * @param {number} milliseconds that it took
   * @param {number} now
   */
  took(pixels, milliseconds, now) {
    const found = milliseconds / pixels;
    this.perPixel = this.perPixel === null ? found : 0.7 * this.perPixel + 0.3 * found;
    this.milliseconds = milliseconds;
    this.times = [...this.times.filter((time) => now - time < 1000), now];
  }

  /** Scale while the camera moves. */
  moving() {
    if (this.fixed !== null) return this.fixed;
    if (this.perPixel === null) return SMALLEST;
    const scale = Math.sqrt(AIM_MS / (this.perPixel * this.pixels));
    // In steps, since every new size costs the runtime work and flickers.
    const stepped = 2 ** (Math.floor(4 * Math.log2(scale)) / 4);
    return Math.min(this.largest, Math.max(SMALLEST, stepped));
  }

  /**
   * Scale once the camera rests, limited by the time that it would take.
   *
   * @param {number} shown scale of what is on the stage
   */
  resting(shown) {
    if (this.fixed !== null) return this.fixed;
    let scale = this.largest;
    while (scale > 2 * shown && (this.perPixel ?? 0) * this.pixels * scale ** 2 > PATIENCE_MS) scale /= 2;
    return Math.max(scale, Math.min(shown, this.largest));
  }

  /** Frames in the last second. @param {number} now */
  framesPerSecond(now) {
    return this.times.filter((time) => now - time < 1000).length;
  }
}
