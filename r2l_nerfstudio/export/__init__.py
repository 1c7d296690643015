"""Exports: students in files that other programs open, ONNX and formats built on it."""
