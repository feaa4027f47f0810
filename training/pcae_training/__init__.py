"""Train vision transformers: model, pretraining, fine-tuning and evaluation (needs torch)."""

import pcae_serve as pcae_serve  # switches usage reports off before datasets is imported
