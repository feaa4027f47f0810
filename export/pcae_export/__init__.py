"""Checkpoint to bundle: graphs for every budget, each one proven (needs torch and onnx)."""
