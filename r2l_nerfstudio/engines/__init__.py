"""Engines, which run a trained student: one module per engine, one protocol, one rule that selects.

The compiled unit is the network only: fp32 ray encodings in, fp32 values out. Rays and their encoding stay in fp32 PyTorch.
"""
