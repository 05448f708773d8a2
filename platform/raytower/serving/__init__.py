"""Serving recall-then-rerank over HTTP under Ray Serve."""
