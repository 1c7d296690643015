"""Students in files that other programs open: ONNX, and what is built on it."""
