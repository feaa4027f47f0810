"""Images to checkpoint: the model, its fine-tuning and its evaluation (needs torch)."""
