"""Indexes: documents in a Lance table, FAISS shards derived from it, versions over both."""

import os
import warnings

# Read when Lance is imported. Its warnings are for programmers: that a data set will be created, for one.
os.environ.setdefault("LANCE_LOG", "error")
# Ray forks and executes another program at once, which is safe.
warnings.filterwarnings("ignore", message="lance is not fork-safe")
