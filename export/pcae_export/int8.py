"""An elastic graph whose linear layers multiply in int8, by ONNX Runtime's dynamic quantisation.

Weights are scaled per channel, activations as they come. Only products with weights are quantised:
attention, ranking, merging and the patch embedding stay in float32, since a ranking decides by
differences that int8 cannot hold. The weights lie inside the file. It knows graphs and tensors,
nothing of tiers.
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

#: No weight is larger than this, in bytes: folding transposes all of them.
_ALL_BYTES = 2**31 - 1


def save(
    elastic: ir.Model, weights: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]
) -> None:
    """Write the int8 form of a float32 elastic graph that is not yet bound; `weights` by name."""
    whole = elastic.clone()
    for value in [value for value in whole.graph.inputs if value.name in weights]:
        assert value.name is not None
        whole.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[value.name].float().numpy(), name=value.name)
        whole.graph.register_initializer(value)
    whole = optimizer.optimize(  # transposed weights become weights: only those are quantised
        whole, input_size_limit=_ALL_BYTES, output_size_limit=_ALL_BYTES
    )
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".int8.") as scratch:
        float32 = Path(scratch) / "float32.onnx"
        ir.save(whole, float32, external_data="float32.weights")
        level = logging.getLogger().level
        try:
            logging.getLogger().setLevel(logging.ERROR)  # it advises to preprocess: done above
            quantize_dynamic(
                float32,
                file,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
        finally:
            logging.getLogger().setLevel(level)
    model = onnx.load(file)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, file)
    onnx.checker.check_model(file)
