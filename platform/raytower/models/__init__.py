"""Encoders, cross-encoders, the batch planner and the forward engine. Nothing here imports Ray."""
