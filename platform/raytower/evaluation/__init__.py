"""Measuring an index on judged queries, and the reports of it."""
