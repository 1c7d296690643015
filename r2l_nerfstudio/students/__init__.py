"""The student networks: plain `torch.nn`, without Nerfstudio."""
