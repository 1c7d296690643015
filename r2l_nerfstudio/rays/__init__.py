"""How a ray becomes numbers: pinhole rays, spacing along a ray, scene contraction, ray codes, encoding. Plain torch."""
