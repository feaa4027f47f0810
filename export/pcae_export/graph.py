"""Convert the model to ONNX graphs: trace it once, then derive the form that each runtime needs.

    trace         token counts as an input, products in float16, attention as one operator
    make_elastic  the same in a given precision, attention fused or in plain operators
    make_static   an elastic graph with constant token counts

Plain float32 is for ONNX Runtime on a CPU and for other ONNX tools; plain half precision for
TensorRT, which fuses attention itself; fused half precision for ONNX Runtime on a GPU, which has
kernels for it. In half precision, norms, softmax, ranking, pooling and the head stay in float32.

Until `bind_weights`, the weights are inputs of the graph, so that constant folding cannot change
them; afterwards they are references to the weights' file.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Literal, cast

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from pcae_export.weights import Place
from pcae_serve.bundle.manifest import PATCHES, WEIGHTS
from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.block import Attention, Block
from pcae_training.evaluate import normalise
from pcae_training.model import VisionTransformer
from pcae_training.reduction import fixed_order, reduce_tokens
from pcae_training.rotary import Rotation

OPSET = 20
BFLOAT16_OPSET = 22  # the first whose convolution supports bfloat16

logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
# it warns that torchvision is missing, which is not used here

#: Modules of a model that stay in float32, for they cost little: all after the last block.
TOP = ("norm", "fc_norm", "attn_pool", "projection", "head", "head_dist")

_MODEL = "model."  # prefix that `Elastic` adds to the names of weights
_ATTENTION = "pcae::Attention"  # occurs only in a traced graph

Precision = Literal["float32", "float16", "bfloat16"]
_TYPES: dict[Precision, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


class Elastic(nn.Module):
    """A VisionTransformer whose token counts are an input: one graph for every keep ratio."""

    order: Tensor

    def __init__(
        self,
        model: VisionTransformer,
        preprocess: Preprocess,
        dtype: torch.dtype = torch.float16,
        attention: type[Attention] | None = None,
        dense: bool = False,
    ) -> None:
        """Wrap a model.

        dtype: of products. attention: its implementation; by default symbolic, which only
        `torch.onnx.export` can run. dense: also return the patch grid.
        """
        super().__init__()
        self.model = to_half_products(model, dtype, attention or _NamedAttention)
        self.preprocess, self.dtype, self.dense = preprocess, dtype, dense
        if model.config.reduction == "random":
            patches = model.config.geometry.patches
            self.register_buffer("order", fixed_order(patches), persistent=False)

    def forward(self, pixels: Tensor, token_counts: Tensor) -> tuple[Tensor, ...]:
        """Return logits [N, classes] or features [N, D], then per stage kept int32 [N, m_i].

        The last output of a dense graph is the patch grid, float32 [N, H, W, D].

        pixels uint8 [N, H, W, 3]; token_counts int64 [stages]. A stage that drops nothing only
        permutes the patches, to which blocks and pooling are invariant.
        """
        model = self.model
        images = pixels.float().permute(0, 3, 1, 2)  # cast first: TensorRT cannot transpose uint8
        x = model.embed(normalise(images, self.preprocess).to(self.dtype))
        tokens = model.tokens(x, dense=self.dense)
        left = torch.tensor(tokens.patches)
        kept: list[Tensor] = []
        for i, block in enumerate(model.blocks):
            reduces, scores = i in model.config.reduction_points, None
            if reduces:
                scores = model.scores(cast(Block, block), tokens, getattr(self, "order", None))
            x = block(tokens.x, bias=tokens.attention_bias, rotation=tokens.rotation)
            tokens = tokens._replace(x=x)
            if reduces:
                count = token_counts[len(kept)]
                dropped = left - count  # a tensor: a number would specialise the graph to one case
                m = _number(count, 2, tokens.patches)  # 2: for torch's broadcasting; 1 runs
                some = _number(dropped.clamp(max=1), 0, 1)  # 0 if nothing is dropped
                tokens = reduce_tokens(tokens, m, dropped, model.config.reduction, scores, some)
                kept.append(tokens.position.int())
                left = count
        patches = [model.patch_grid(tokens)] if self.dense else []
        return model.pool(tokens._replace(x=tokens.x.float())), *kept, *patches


def _number(value: Tensor, low: int, high: int) -> int:
    """Return a one-element tensor as a size, with the bounds that tracing needs."""
    number = cast(int, value.item())
    torch._check(number >= low)  # type: ignore[no-untyped-call]
    torch._check(number <= high)  # type: ignore[no-untyped-call]
    return number


def to_half_products(
    model: VisionTransformer, dtype: torch.dtype, attention: type[Attention]
) -> VisionTransformer:
    """Return a copy with products in `dtype`; norms, softmax, ranking and head stay in float32."""
    model = deepcopy(model)
    tops = [getattr(model, name, None) for name in TOP]
    top = {module for found in tops if found is not None for module in found.modules()}
    for module in model.modules():
        if module in top:
            continue
        if isinstance(module, nn.LayerNorm):
            module.__class__ = _Float32Norm
            continue
        if isinstance(module, Attention):
            module.__class__ = attention
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    return model


class _Float32Norm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class _NamedAttention(Attention):
    """Attention as one symbolic operator, which `_plain` and `_fused` expand."""

    def forward(
        self, x: Tensor, bias: Tensor | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        if rotation is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)  # each [B, N, D], heads concatenated
        else:
            q, k, v = (part.flatten(2) for part in self.project(x, rotation))
        mixed = torch.onnx.ops.symbolic(
            _ATTENTION,
            [q, k, v] if bias is None else [q, k, v, bias],
            {"num_heads": self.heads, "head_size": x.shape[-1] // self.heads},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return cast(Tensor, self.proj(mixed))


def trace(model: VisionTransformer, preprocess: Preprocess, dense: bool = False) -> ir.Model:
    """Trace the network (about 30 s for a ViT-B). Its weights become inputs: see `bind_weights`.

    dense: with PATCHES as the last output.
    """
    size, stages = model.config.image_size, len(model.config.reduction_points)
    example = (
        torch.zeros(2, size, size, model.config.channels, dtype=torch.uint8),
        torch.tensor(model.config.geometry.counts(1), dtype=torch.int64),  # may be ()
    )
    answer = "logits" if model.config.classes else "features"
    with warnings.catch_warnings():
        # torch.onnx 2.13 uses a deprecated part of torch.utils._pytree
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
        program = torch.onnx.export(
            Elastic(model, preprocess, dense=dense).eval(),
            example,
            dynamo=True,
            optimize=False,  # keeps every weight unchanged, under its own name
            opset_version=OPSET,
            verbose=False,
            input_names=["pixels", "token_counts"],
            output_names=[answer, *(f"kept_{i}" for i in range(stages)), *[PATCHES] * dense],
            dynamic_shapes={"pixels": {0: torch.export.Dim.DYNAMIC}, "token_counts": None},
        )
    assert program is not None  # None only with dynamo=False
    traced: ir.Model = program.model
    graph, weights = traced.graph, {f"{_MODEL}{name}" for name in model.state_dict()}
    for name, value in list(graph.initializers.items()):
        if name in weights:  # constants, such as the angles of rotary positions, stay
            del graph.initializers[name]
            value.name, value.const_value = name.removeprefix(_MODEL), None
            graph.inputs.append(value)
    pixels, *_ = graph.inputs
    pixels.shape = ir.Shape(["batch", size, size, model.config.channels])
    vectors, *kept = graph.outputs
    if dense:
        side = model.config.grid
        kept.pop().shape = ir.Shape(["batch", side, side, model.config.width])
    vectors.shape = ir.Shape(["batch", model.config.classes or model.config.features])
    for i, output in enumerate(kept):
        output.shape = ir.Shape(["batch", f"patches_{i}"])
    return traced


def make_elastic(
    traced: ir.Model, precision: Precision = "float32", fused: bool = False
) -> ir.Model:
    """Return a traced graph in a precision, with attention in plain operators or fused.

    Graphs in half precision do not return PATCHES.
    """
    model, dtype = traced.clone(), _TYPES[precision]
    if precision != "float32" and model.graph.outputs[-1].name == PATCHES:
        model.graph.outputs.pop()
    _retype(model.graph, dtype)
    if dtype == ir.DataType.BFLOAT16:
        model.graph.opset_imports[""] = BFLOAT16_OPSET
    domain, _, operator = _ATTENTION.partition("::")
    for node in [node for node in model.graph if node.op_type == operator]:
        tape = ir.tape.Tape()
        mixed = _fused(tape, node, dtype) if fused else _plain(tape, node, dtype)
        model.graph.insert_before(node, tape.nodes)
        ir.convenience.replace_all_uses_with(node.outputs[0], mixed)
        model.graph.remove(node, safe=True)
    model.graph.opset_imports.pop(domain, None)
    if fused:
        model.graph.opset_imports["com.microsoft"] = 1
    return _tidy(model)


def _retype(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Change everything traced in float16 to `dtype`, and remove casts that became no-ops."""
    half = ir.DataType.FLOAT16
    if dtype == half:
        return
    for value in [*graph.inputs, *graph.initializers.values()]:
        assert value.const_value is None or value.dtype != half  # constants are traced in float32
        if value.dtype == half:
            value.type = ir.TensorType(dtype)  # a new object: copies of a graph share their types
    for node in list(graph):
        for value in node.outputs:
            if value.dtype == half:
                value.type = ir.TensorType(dtype)
        if node.op_type != "Cast":
            continue
        if node.attributes["to"].as_int() == half:
            node.attributes["to"] = ir.AttrInt64("to", dtype)
        (given,) = node.inputs
        if given is not None and given.dtype == node.attributes["to"].as_int():
            ir.convenience.replace_all_uses_with(node.outputs[0], given)
            graph.remove(node, safe=True)


def _plain(tape: ir.tape.Tape, attention: ir.Node, dtype: ir.DataType) -> ir.Value:
    """Build softmax(q kᵀ / √d + bias) v from plain operators, the form that TensorRT fuses."""
    q, k, v, *bias = attention.inputs
    heads = attention.attributes["num_heads"].as_int()
    size = attention.attributes["head_size"].as_int()
    split = tape.op("Constant", [], {"value": ir.tensor(np.array([0, 0, heads, size]))})

    def by_head(x: ir.Value | None, perm: Sequence[int]) -> ir.Value:
        return tape.op("Transpose", [tape.op("Reshape", [x, split])], {"perm": perm})

    scale = tape.op("Constant", [], {"value": _scalar(size**-0.5, dtype)})
    queries = tape.op("Mul", [by_head(q, (0, 2, 1, 3)), scale])  # before the product: no overflow
    scores = tape.op("MatMul", [queries, by_head(k, (0, 2, 3, 1))])  # [B, heads, N, N]
    if dtype != ir.DataType.FLOAT:
        scores = tape.op("Cast", [scores], {"to": ir.DataType.FLOAT})
    for added in bias:
        scores = tape.op("Add", [scores, added])
    weights = tape.op("Softmax", [scores], {"axis": -1})
    if dtype != ir.DataType.FLOAT:
        weights = tape.op("Cast", [weights], {"to": dtype})
    mixed = tape.op("MatMul", [weights, by_head(v, (0, 2, 1, 3))])
    joined = tape.op("Constant", [], {"value": ir.tensor(np.array([0, 0, heads * size]))})
    return tape.op("Reshape", [tape.op("Transpose", [mixed], {"perm": (0, 2, 1, 3)}), joined])


def _fused(tape: ir.tape.Tape, attention: ir.Node, dtype: ir.DataType) -> ir.Value:
    """Build the same as one MultiHeadAttention operator of ONNX Runtime."""
    q, k, v, *bias = attention.inputs
    inputs = [q, k, v]
    for added in bias:  # [1 or B, 1, 1, N]; the operator needs a row per query
        queries = tape.op("Shape", [q], {"start": 1, "end": 2})
        ones = tape.op("Constant", [], {"value": ir.tensor(np.array([1, 1]))})
        one = tape.op("Constant", [], {"value": ir.tensor(np.array([1]))})
        shape = tape.op("Concat", [ones, queries, one], {"axis": 0})
        cast_bias = tape.op("Cast", [tape.op("Expand", [added, shape])], {"to": dtype})
        inputs += [None, None, cast_bias]
    attributes = {"num_heads": attention.attributes["num_heads"].as_int()}
    return tape.op("MultiHeadAttention", inputs, attributes, domain="com.microsoft")


def _scalar(value: float, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(np.array(value, dtype=dtype.numpy()), dtype=dtype)


def make_static(elastic: ir.Model, token_counts: Sequence[int]) -> ir.Model:
    """Return a copy of an unbound elastic graph with constant token counts."""
    model = elastic.clone()
    counts = next(value for value in model.graph.inputs if value.name == "token_counts")
    model.graph.inputs.remove(counts)
    counts.const_value = ir.tensor(np.array(token_counts, dtype=np.int64), name=counts.name)
    model.graph.register_initializer(counts)
    kept = [output for output in model.graph.outputs[1:] if output.name != PATCHES]
    for output, m in zip(kept, token_counts, strict=True):
        output.shape = ir.Shape(["batch", m])
    return _tidy(model)


def bind_weights(model: ir.Model, places: Mapping[str, Place]) -> ir.Model:
    """Return a copy whose weights are float16 tensors in WEIGHTS, cast to the graph's types."""
    model = model.clone()
    graph, casts = model.graph, []
    for value in [value for value in graph.inputs if value.name in places]:
        assert value.name is not None
        assert value.dtype is not None
        name, place, shape = value.name, places[value.name], ir.Shape(places[value.name].shape)
        tensor = ir.ExternalTensor(
            WEIGHTS, place.offset, place.length, ir.DataType.FLOAT16, shape=shape, name=name
        )
        graph.inputs.remove(value)
        stored = ir.Value(
            name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT16), const_value=tensor
        )
        if value.dtype == ir.DataType.FLOAT16:
            ir.convenience.replace_all_uses_with(value, stored)
        else:
            value.name = f"{name}.{value.dtype.name.lower()}"
            cast = ir.node("Cast", [stored], {"to": value.dtype})
            cast.outputs[0].name = value.name
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            casts.append(cast)
        graph.register_initializer(stored)
    graph.insert_before(graph[0], casts)
    return model


def save(model: ir.Model, file: Path, metadata: Mapping[str, str]) -> None:
    """Write a bound graph with its metadata next to its weights, and check it."""
    model.metadata_props.update(metadata)
    ir.save(model, file)
    onnx.checker.check_model(file)


def _tidy(model: ir.Model) -> ir.Model:
    """Fold constants, and remove debug data: stack traces and shapes between nodes."""
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
