"""Serve vision transformers under a latency budget."""

__version__ = "0.1.0"
