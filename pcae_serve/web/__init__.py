"""Pages of the server: files as they are sent, and what they may load."""
