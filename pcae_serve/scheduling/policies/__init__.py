"""Policies: choose which waiting requests run next, and on which tier."""
