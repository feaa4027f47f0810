"""One image file, three programs: training's evaluation, export's verification and the server."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from pcae_export import images
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.preprocess import Preprocess, decode_image
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings
from pcae_training.data import LabelledImages, load
from tests.support.apps import serving
from tests.support.bundles import write_bundle
from tests.support.odd_images import CASES, exif, noise, photo, save

pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")


class Recorder(SimulatedEngine):
    """Record the pixels of each batch."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, seconds=lambda tier, batch: 0.001)
        self.seen: list[Pixels] = []

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        self.seen.append(pixels.copy())
        return super().run(tier, pixels)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of classes with odd but readable images, and large JPEGs."""
    folder = tmp_path_factory.mktemp("files")
    bodies = {name: make() for name, (make, status) in CASES.items() if status == 200}
    for orientation in range(1, 9):
        whole = photo(203, 141)
        bodies[f"large-{orientation}"] = save(whole, "JPEG", exif=exif(orientation))
    bodies["large-noise"] = save(noise(200), "JPEG", quality=95)
    for label in ("a", "b"):
        (folder / "test" / label).mkdir(parents=True)
    for i, (name, body) in enumerate(sorted(bodies.items())):
        # the extension is ignored: the type is detected from the bytes
        (folder / "test" / "ab"[i % 2] / f"{name}.png").write_bytes(body)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_bundle(tmp_path_factory.mktemp("served") / "bundle"))


@pytest.fixture(scope="module")
def evaluated(files: Path, served: Bundle) -> LabelledImages:
    return load(str(files), "test", served.preprocess)


@pytest.fixture(scope="module")
def engine(served: Bundle) -> Recorder:
    return Recorder(served)


@pytest.fixture(scope="module")
def client(
    served: Bundle, engine: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    cache = tmp_path_factory.mktemp("cache")
    with serving(Service(Settings(cache_dir=cache, profile_s=0.1), served, [engine])) as client:
        yield client


def test_evaluation_export_and_serving_see_the_same(
    evaluated: LabelledImages, client: TestClient, engine: Recorder
) -> None:
    rows = range(len(evaluated))
    batches = [pixels for pixels, _ in evaluated.batches(rows, 16)]  # as evaluate.scores reads
    ours = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in batches])
    np.testing.assert_array_equal(ours, images.decode(evaluated, rows))
    for row in rows:
        engine.seen.clear()
        response = client.post("/classify?budget_ms=600000", content=evaluated.body(row))
        assert response.status_code == 200, response.text
        np.testing.assert_array_equal(engine.seen[-1][0], ours[row])
    assert len(rows) > 60


def test_some_were_decoded_at_a_reduced_scale(evaluated: LabelledImages) -> None:
    """Otherwise the test above would not cover it."""
    preprocess = evaluated.preprocess
    bodies = [evaluated.body(row) for row in range(len(evaluated))]
    changed = [not np.array_equal(preprocess(b), preprocess.crop(decode_image(b))) for b in bodies]
    assert sum(changed) > 5


def test_a_trainers_larger_source_is_the_same_picture(evaluated: LabelledImages) -> None:
    """Training crops from `resize` pixels, decoded at the same scale as the input of the model."""
    own = Preprocess(image_size=8, resize=12, mean=(0.5,) * 3, std=(0.5,) * 3)
    source = replace(own, image_size=own.resize)
    for row in range(len(evaluated)):
        body = evaluated.body(row)
        difference = source(body)[2:10, 2:10].astype(int) - own(body)
        assert np.abs(difference).max() <= 1  # box corners in float32
