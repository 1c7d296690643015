"""Many captures, each through teacher, students, report and exports, on the machines of a Ray cluster."""
