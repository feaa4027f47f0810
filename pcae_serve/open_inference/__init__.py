"""The Open Inference Protocol (v2, as in KServe and Triton), independent of its transport."""
