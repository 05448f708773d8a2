"""Training objectives in plain torch, one idea a file. Nothing here imports Ray."""
