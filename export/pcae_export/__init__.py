"""Export checkpoints to verified bundles of ONNX graphs (needs torch and onnx)."""

import pcae_serve as pcae_serve  # switches usage reports off before onnxruntime is imported
