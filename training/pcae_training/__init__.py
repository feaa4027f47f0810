"""Train vision transformers: model, pretraining, fine-tuning and evaluation (needs torch)."""
