"""Supervision of students: sampled cameras, a ring of teacher views, hard rays, photos."""
