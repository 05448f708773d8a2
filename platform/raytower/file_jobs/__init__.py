"""A file in, a file out, in shares of rows: as Ray tasks or in this process; shares that are done are kept."""
