"""Simulation and load generation; the serving path does not import it."""
