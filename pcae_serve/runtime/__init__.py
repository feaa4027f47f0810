"""A bundle in service: decoding, queueing, batches, tier health."""
