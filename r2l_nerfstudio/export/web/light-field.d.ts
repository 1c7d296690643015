/** A neural light field: `<light-field src="folder/">`, or without `src` the scene beside this module. */
export declare class LightField extends HTMLElement {
  /** The view in the form of the address after its #: angles in degrees, lengths in the scene's unit. */
  view: string;
}

declare global {
  interface HTMLElementTagNameMap {
    "light-field": LightField;
  }
}
