"""Adapters for other serving platforms."""
