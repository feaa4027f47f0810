"""Scheduling policies: which queued requests run next, and on which tier."""
