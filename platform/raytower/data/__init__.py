"""Readers: files of texts, pairs, triples, candidate lists and labels become typed records.

Read `records.py` for what a row must hold, and `pieces.py` for how files are surveyed and cut.
"""
