"""Ranked lists in files: what a file of queries finds, and candidates put in order by a reranker."""
