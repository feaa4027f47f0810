"""Engines: run one batch on one device."""
