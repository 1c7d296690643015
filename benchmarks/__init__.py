"""Measurements behind the published figures: `python -m benchmarks --help`. Not part of the installed package."""
