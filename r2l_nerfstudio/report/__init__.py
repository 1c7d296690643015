"""Reports: measurements of a finished student, and the files that show them."""
