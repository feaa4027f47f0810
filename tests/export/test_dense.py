"""Bundles whose graphs return the state of every patch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import pcae_serve
from pcae_export import pack
from pcae_export.feature_fidelity import measure_features
from pcae_export.images import generate
from pcae_export.pack import PackError, Part
from pcae_export.torch_reference import Reference, run_torch
from pcae_export.verify import ParityError, check_parity, compare_outputs
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Output
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from tests.support.exporting import bundled

Tiny = Callable[..., Checkpoint]
#: In half precision a model this small would differ by chance.
FLAGS = ("--dense", "--tier", "low=0.5", "--tier", "full=1", "--tier", "rough=0.5:int8")


@pytest.fixture(scope="module")
def backbone(tiny: Tiny) -> Checkpoint:
    return replace(tiny(classes=0, pooling="cls"), labels=[])


@pytest.fixture(scope="module", params=["ptr", "merged"])
def dense(
    request: pytest.FixtureRequest, backbone: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """A dense bundle of a tiny backbone, verified by the command, graphs for GPUs included."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoints.save(backbone, folder / "checkpoint")
    return bundled(folder / "checkpoint", folder / "out", *FLAGS, "--reduction", request.param)


@pytest.mark.slow
def test_the_engine_returns_torchs_grid_if_it_is_asked_for(dense: Bundle) -> None:
    assert dense.patch_grid == (8, 8, 32)
    stored, pixels = checkpoints.load(dense.root / "models" / "vit"), generate(16, 16)
    engine = OnnxRuntimeEngine(dense)
    for tier in dense.tiers:
        plain, found = engine.run(tier, pixels), engine.run_densely(tier, pixels)
        assert plain.patches is None
        np.testing.assert_allclose(plain.vectors, found.vectors, atol=1e-5)
        if tier.precision == "float32":
            expected = run_torch(stored, pixels, tier.token_counts, dense=True)
            clear = (expected.margin > 1e-5).numpy()
            assert expected.patches is not None
            assert found.patches is not None
            np.testing.assert_allclose(
                found.patches[clear], expected.patches.numpy()[clear], atol=1e-3
            )
    with pcae_serve.load(dense.root, backend="onnxruntime") as model:
        answer = model.embed(pixels[0], tier="full", patches=True)
        assert np.array(answer.patches).shape == dense.patch_grid


@pytest.mark.slow
def test_graphs_for_gpus_do_not_return_the_grid(dense: Bundle) -> None:
    names = {}
    for kind in ("elastic", "full", "full.cuda", "full.tensorrt"):
        session = ort.InferenceSession(dense.file("vit", f"{kind}.onnx"))
        names[kind] = [output.name for output in session.get_outputs()]
    assert names["elastic"] == names["full"] == [*names["full.cuda"], "patches"]
    assert (
        names["full.cuda"] == names["full.tensorrt"] == ["features", "kept_0", "kept_1", "kept_2"]
    )


def test_models_with_a_head_or_other_grids_are_refused(
    tiny: Tiny, backbone: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(PackError, match="model 'vit' has a head, and only POST /embed returns"):
        pack.write_bundle({"vit": Part(tiny())}, tmp_path / "out", dense=True)
    wide = replace(tiny(classes=0, pooling="cls", patch_size=4), labels=[])
    with pytest.raises(PackError, match="whose patch grids have one shape"):
        pack.check_dense({"a": Part(backbone), "b": Part(wide)})


def outputs(checkpoint: Checkpoint, counts: tuple[int, ...]) -> tuple[Output, Reference]:
    """Torch's own outputs, in place of a graph's, and torch's."""
    expected = run_torch(checkpoint, PIXELS, counts, dense=True)
    kept = tuple(stage.int().numpy() for stage in expected.kept)
    assert expected.patches is not None
    found = Output(expected.vectors.numpy(), kept, patches=expected.patches.numpy().copy())
    return found, expected


PIXELS = np.random.default_rng(3).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
COUNTS = (38, 22, 13)


@pytest.mark.parametrize(
    ("precision", "damage", "message"),
    [
        ("float32", lambda grid: grid[:, 0, 0].__iadd__(0.1), "a patch differs from torch by 0.1"),
        ("int8", lambda grid: grid.__imul__(-1), "int8 patches have a mean cosine of -1.00000"),
        ("float32", lambda grid: grid.fill(np.nan), "some patches are not finite"),
    ],
)
def test_a_wrong_grid_does_not_pass(
    backbone: Checkpoint, precision: Any, damage: Callable[[Any], Any], message: str
) -> None:
    found, expected = outputs(backbone, COUNTS)
    right = compare_outputs(found, expected, backbone, PIXELS, "low", "elastic", precision)
    check_parity(right, found, expected, "ptr", "here")
    damage(found.patches)

    def judge(output: Output) -> None:
        row = compare_outputs(output, expected, backbone, PIXELS, "low", "elastic", precision)
        check_parity(row, output, expected, "ptr", "here")

    with pytest.raises(ParityError, match=message):
        judge(found)
    with pytest.raises(ParityError, match="patches have shape None"):
        judge(found._replace(patches=None))


def test_fidelity_of_each_kind_of_features(backbone: Checkpoint) -> None:
    full, low = measure_features(backbone, PIXELS, [(64, 64, 64), COUNTS])
    assert low.images == len(PIXELS)
    assert set(low.cosines) == {"cls", "mean", "dense"}
    for kind, cosines in low.cosines.items():
        assert torch.allclose(torch.from_numpy(full.cosines[kind]), torch.ones(16))
        assert cosines.shape == (16,)
        assert cosines.mean() < 0.9999
