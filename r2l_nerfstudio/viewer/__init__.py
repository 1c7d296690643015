"""Additions to Nerfstudio's viewer: frame times, an engine menu, and a split view with the teacher."""
