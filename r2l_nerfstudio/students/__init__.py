"""The student networks: plain `torch.nn`, numbers in, numbers out, nothing of Nerfstudio."""
