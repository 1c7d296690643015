"""Published checkpoints as run folders: read without running anything, put into a capture's frame, compared, written."""
