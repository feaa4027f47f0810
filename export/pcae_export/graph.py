"""The model as ONNX graphs: one elastic (token counts are an input), static ones folded from it.

It knows the network and the graph format, nothing of tiers or accuracy. Until `bind`, the weights
are plain inputs of a graph, so that no folding can touch them; after it they are references.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from pcae_export.weights import Place
from pcae_serve.bundle import WEIGHTS
from pcae_serve.preprocess import Preprocess
from pcae_training.evaluate import normalise
from pcae_training.model import VisionTransformer
from pcae_training.reduction import reduce_patches

OPSET = 20

logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
# it warns that torchvision is missing, which nothing here uses

_MODEL = "model."  # what `Elastic` puts before the weights' own names


class Elastic(nn.Module):
    """A VisionTransformer whose token counts are an input: one graph for every budget."""

    def __init__(self, model: VisionTransformer, preprocess: Preprocess) -> None:
        super().__init__()
        self.model, self.preprocess = model, preprocess

    def forward(self, pixels: Tensor, token_counts: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes], then per stage int32 [N, m_i]: original indices of the patches left.

        pixels uint8 [N, H, W, 3]; token_counts int64 [stages]. Where a stage drops nothing, the
        patches are only put in another order, which no block and no pooling can see.
        """
        model = self.model
        images = pixels.float().permute(0, 3, 1, 2)  # cast first: TensorRT transposes no uint8
        x = model.embed(normalise(images, self.preprocess))
        prefix = model.config.prefix
        n = x.shape[1] - prefix
        left = torch.tensor(n)
        kept: list[Tensor] = []
        position = torch.arange(n).expand(x.shape[0], -1)
        for i, block in enumerate(model.blocks):
            x = block(x)  # [N, prefix + n + e, D]: CLS, patches, means of what was dropped
            if i in model.config.reduction_points:
                count = token_counts[len(kept)]
                dropped = left - count  # a tensor: as a number it would fix the graph to one case
                m = _number(count, 2, n)  # 2: torch's broadcasting asks; the graph takes 1 as well
                some = _number(dropped.clamp(max=1), 0, 1)  # 0 where nothing is dropped
                patches, mean, index = reduce_patches(x[:, prefix : prefix + n], m, dropped)
                mean = mean.narrow(1, 0, some)  # sliced away, not times zero: it may be 0 / 0
                x = torch.cat([x[:, :prefix], patches, x[:, prefix + n :], mean], dim=1)
                position = position.gather(1, index)
                kept.append(position.int())
                n, left = m, count
        return model.pool(x, x[:, prefix : prefix + n]), *kept


def _number(value: Tensor, low: int, high: int) -> int:
    """A tensor's one number as a size, with the bounds that tracing needs to be told."""
    number = cast(int, value.item())
    torch._check(number >= low)  # type: ignore[no-untyped-call]
    torch._check(number <= high)  # type: ignore[no-untyped-call]
    return number


def elastic(model: VisionTransformer, preprocess: Preprocess) -> ir.Model:
    """Trace `model`, its token counts an input. The weights become inputs too: see `bind`."""
    size, stages = model.config.image_size, len(model.config.reduction_points)
    example = (
        torch.zeros(2, size, size, model.config.channels, dtype=torch.uint8),
        torch.tensor(model.config.geometry.counts(1)),
    )
    with warnings.catch_warnings():
        # torch.onnx 2.13 uses what torch.utils._pytree has deprecated
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
        program = torch.onnx.export(
            Elastic(model, preprocess).eval(),
            example,
            dynamo=True,
            optimize=False,  # keeps every weight whole, under its own name
            opset_version=OPSET,
            verbose=False,
            input_names=["pixels", "token_counts"],
            output_names=["logits", *(f"kept_{i}" for i in range(stages))],
            dynamic_shapes={"pixels": {0: torch.export.Dim.DYNAMIC}, "token_counts": None},
        )
    assert program is not None  # it is None only for dynamo=False
    traced: ir.Model = program.model
    graph = traced.graph
    for name, value in list(graph.initializers.items()):
        if name.startswith(_MODEL):
            del graph.initializers[name]
            value.name, value.const_value = name.removeprefix(_MODEL), None
            graph.inputs.append(value)
    pixels, *_ = graph.inputs
    pixels.shape = ir.Shape(["batch", size, size, model.config.channels])
    logits, *kept = graph.outputs
    logits.shape = ir.Shape(["batch", model.config.classes])
    for i, output in enumerate(kept):
        output.shape = ir.Shape(["batch", f"patches_{i}"])
    return _tidy(traced)


def static(elastic: ir.Model, token_counts: Sequence[int]) -> ir.Model:
    """A copy of an elastic graph (not yet bound) with its token counts constant."""
    model = elastic.clone()
    counts = next(value for value in model.graph.inputs if value.name == "token_counts")
    model.graph.inputs.remove(counts)
    counts.const_value = ir.tensor(np.array(token_counts, dtype=np.int64), name=counts.name)
    model.graph.register_initializer(counts)
    for output, m in zip(model.graph.outputs[1:], token_counts, strict=True):
        output.shape = ir.Shape(["batch", m])
    return _tidy(model)


def bind(model: ir.Model, places: Mapping[str, Place]) -> ir.Model:
    """A copy whose weights are float16 tensors inside WEIGHTS, each one cast to float32."""
    model = model.clone()
    graph, casts = model.graph, []
    for value in [value for value in graph.inputs if value.name in places]:
        assert value.name is not None
        name, place = value.name, places[value.name]
        shape = ir.Shape(place.shape)
        tensor = ir.ExternalTensor(
            WEIGHTS, place.offset, place.length, ir.DataType.FLOAT16, shape=shape, name=name
        )
        graph.inputs.remove(value)
        stored = ir.Value(
            name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT16), const_value=tensor
        )
        value.name = f"{name}.float32"
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
        cast.outputs[0].name = value.name
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.register_initializer(stored)
        casts.append(cast)
    graph.insert_before(graph[0], casts)
    return model


def save(model: ir.Model, file: Path) -> None:
    """Write a bound graph beside its weights, and have it checked."""
    ir.save(model, file)
    onnx.checker.check_model(file)


def _tidy(model: ir.Model) -> ir.Model:
    """Fold constants, and drop what only a debugger reads: stack traces, shapes between nodes."""
    model = optimizer.optimize(model)
    outputs = set(model.graph.outputs)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:
                value.shape = value.type = None
    return model
