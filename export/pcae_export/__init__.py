"""Export checkpoints to verified bundles of ONNX graphs (needs torch and onnx)."""
