"""What a finished student is worth: measurements, and the files that show them."""
