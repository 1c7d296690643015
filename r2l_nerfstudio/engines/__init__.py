"""How a trained student runs: one module per engine, one protocol, one rule that picks.

The compiled unit is the network alone: fp32 code in, fp32 values out. Rays and their encoding stay in fp32 torch.
"""
