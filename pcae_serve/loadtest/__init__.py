"""Simulation and load generation; the serving path never imports it."""
