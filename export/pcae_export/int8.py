"""Quantise an elastic graph's linear layers to int8, with ONNX Runtime's dynamic quantisation.

Weights have a scale per channel; activations get theirs at run time. Only products with weights are
quantised: attention, ranking, merging and the patch embedding stay in float32, because a ranking
depends on differences that int8 cannot represent. The weights are stored inside the graph's file.

Weights take 7 of the 8 bits. Processors without VNNI add two products of 8 bits in 16, where those
of full weights overflow without a sign of it, and a bundle may be served on another processor than
it was made on. (ONNX Runtime's documentation of quantisation, "reduce range".)
"""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript import optimizer
from torch import Tensor

#: Size limit for constant folding, in bytes: no weight exceeds it, so all are transposed.
_ALL_BYTES = 2**31 - 1


def save(
    elastic: ir.Model, weights: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]
) -> None:
    """Write the int8 form of an unbound float32 elastic graph. weights: by name."""
    filled = elastic.clone()
    for value in [value for value in filled.graph.inputs if value.name in weights]:
        assert value.name is not None
        filled.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[value.name].float().numpy(), name=value.name)
        filled.graph.register_initializer(value)
    # folds transposed weights into constants: only those are quantised
    filled = optimizer.optimize(filled, input_size_limit=_ALL_BYTES, output_size_limit=_ALL_BYTES)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".int8.") as scratch:
        float32 = Path(scratch) / "float32.onnx"
        ir.save(filled, float32, external_data="float32.weights")
        level = logging.getLogger().level
        try:
            logging.getLogger().setLevel(
                logging.ERROR
            )  # hides its advice to preprocess, which is done above
            quantize_dynamic(
                float32,
                file,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                reduce_range=True,
                extra_options={"MatMulConstBOnly": True},
            )
        finally:
            logging.getLogger().setLevel(level)
    model = onnx.load(file)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, file)
    onnx.checker.check_model(file)
