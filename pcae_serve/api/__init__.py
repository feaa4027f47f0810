"""FastAPI routes and everything else that depends on HTTP."""
