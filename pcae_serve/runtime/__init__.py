"""A bundle in service: admission, decoding, batching, devices, reload."""
