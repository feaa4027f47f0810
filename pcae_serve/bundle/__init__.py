"""The bundle: what the exporter writes and the server reads."""
