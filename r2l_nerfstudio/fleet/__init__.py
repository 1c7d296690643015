"""Fleets: many captures, each through teacher, students, reports and exports, on the machines of a Ray cluster."""
