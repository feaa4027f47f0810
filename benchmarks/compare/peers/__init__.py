"""Handlers of the other servers; each runs in its own environment, without this project."""
