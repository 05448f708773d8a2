"""Sharded, versioned FAISS indexes: planned, built by Ray tasks, published atomically, searched with one merge."""
