"""Other people's serving platforms."""
