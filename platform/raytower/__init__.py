"""raytower: semantic retrieval on Ray, from texts to a served recall-then-rerank search."""

import os

# No telemetry unless the user asks for it; set before anything imports Ray.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Read once, when ray.data is imported: its progress logs would drown ours.
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")

__version__ = "0.1.0"
