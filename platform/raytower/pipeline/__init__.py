"""Several jobs from one file, one after the other."""
