"""Published checkpoints as run folders: read without running anything, placed in a capture's frame, compared,
written."""
