"""Nerfstudio models around the students: the only place where a camera becomes a student's input."""
