"""Encode, recall, rerank: what the jobs and the server share, and the command that asks one question."""
