"""Readers: files of texts, pairs, triples, candidate lists and labels become typed records.

Read `records.py` for what a row must hold, `pieces.py` for how files are surveyed and cut, and `datasets.py` for the
Ray Dataset made of it (the only module here that knows Ray).
"""
