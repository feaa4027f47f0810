"""A bundle in this process: no server, and the server's own decoder, engines and tier choice."""
