"""Encoding a corpus: Ray Data spreads pieces over workers; each writes its own Parquet file."""
