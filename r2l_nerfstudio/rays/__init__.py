"""Ray encodings in plain PyTorch: pinhole rays, spacing along a ray, scene contraction, encoding."""
