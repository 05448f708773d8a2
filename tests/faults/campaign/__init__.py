"""Faults put into running jobs, drawn by a seed, and what the jobs end with: see `__main__.py`."""
