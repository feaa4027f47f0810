"""FastAPI routes, and everything else that speaks HTTP."""
