"""A bundle in this process: the same pixels and answers as from a server."""

import io
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pcae_serve
from pcae_serve import Model
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import (
    BudgetTooSmall,
    BundleError,
    DeadlineExceeded,
    EngineFailed,
    InvalidParameter,
    PcaeError,
    RequestError,
    StartError,
    TaskNotSupported,
    TooLarge,
    UnreadableImage,
    UnsupportedType,
)
from pcae_serve.local.runner import Runner
from pcae_serve.runtime.build import build_service
from pcae_serve.schemas import Classification
from pcae_serve.settings import Settings
from tests.support.apps import serving, wait_until
from tests.support.bundles import backbone, write_bundle
from tests.support.hub import Hub
from tests.support.images import image_bytes
from tests.support.odd_images import CASES, exif, photo, save

ROOT = Path(__file__).parents[3]
SAMPLES = sorted((ROOT / "docs" / "samples").glob("*.png"))


class Recorder(SimulatedEngine):
    """Records the batches, and fails or waits if it has to."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, seconds=lambda tier, batch: 1e-4)
        self.batches: list[tuple[str, Pixels]] = []
        self.before: Callable[[], None] = lambda: None
        self.closed = 0
        self._alone = threading.Lock()

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        assert self._alone.acquire(blocking=False), "calls overlap"
        try:
            return self._run(tier, pixels)
        finally:
            self._alone.release()

    def _run(self, tier: Tier, pixels: Pixels) -> Output:
        self.before()
        self.batches.append((tier.name, pixels.copy()))
        return super().run(tier, pixels)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def engine(small_bundle: Bundle) -> Recorder:
    return Recorder(small_bundle)


@pytest.fixture
def model(small_bundle: Bundle, engine: Recorder, tmp_path: Path) -> Iterator[Model]:
    """The simulated engine; a dark image is "dark", a bright one "bright"."""
    runner = Runner(small_bundle, engine, max_batch=4, cache_dir=tmp_path, profile_s=0.05)
    with Model(runner) as model:
        yield model


@pytest.fixture(scope="module")
def demo() -> Iterator[Model]:
    with pcae_serve.load() as model:
        yield model


def label(answer: Classification) -> str:
    return answer.predictions[0].label


def test_the_same_probabilities_as_a_server(demo: Model, tmp_path: Path) -> None:
    service = build_service(Settings(cache_dir=tmp_path, profile_s=0.1))
    with serving(service) as client:
        for tier in load_bundle(demo_path()).tiers:
            query = f"/classify?tier={tier.name}&top_k=10&budget_ms=600000&explain=true"
            for sample in SAMPLES:
                served = Classification(**client.post(query, content=sample.read_bytes()).json())
                ours = demo.classify(sample, tier=tier.name, top_k=10, explain=True)
                assert ours.predictions == served.predictions
                same = ("tier", "keep_ratio", "tokens", "kept")
                assert [getattr(ours, n) for n in same] == [getattr(served, n) for n in same]


@pytest.mark.filterwarnings("ignore::Warning:PIL")
def test_the_same_pixels_as_a_servers_from_files(model: Model, engine: Recorder) -> None:
    bodies = [make() for make, status in CASES.values() if status == 200]
    bodies += [save(photo(203, 141), "JPEG", exif=exif(turn)) for turn in range(1, 9)]
    model.classify(bodies)
    seen = np.concatenate([pixels for _, pixels in engine.batches])
    preprocess = load_bundle(model._runner.bundle.root).preprocess
    np.testing.assert_array_equal(seen, [preprocess(body) for body in bodies])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "I;16"])
def test_a_pillow_image_has_the_pixels_that_a_client_sends(
    mode: str, model: Model, engine: Recorder
) -> None:
    from pcae_serve.client import image_file

    source = Image.effect_noise((21, 17), 80)
    noise = Image.merge("RGB", [source, source.rotate(90), source.rotate(180)])
    if mode == "I;16":
        image = Image.fromarray(np.asarray(source).astype(np.uint16) * 255)
    elif mode == "PA":
        image = noise.convert("P").convert("PA")
    else:
        image = noise.convert(mode)
    image.info["transparency"] = b"\0" if mode == "P" else image.info.get("transparency")
    image.info = {name: value for name, value in image.info.items() if value is not None}
    info = dict(image.info)
    model.classify([image, image_file(image)])
    [(_, pixels)] = engine.batches
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert image.info == info


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_pillow_image_is_turned_upright(
    kind: str, turn: int, model: Model, engine: Recorder
) -> None:
    body = save(photo(12, 10), kind, exif=exif(turn))
    model.classify([body, Image.open(io.BytesIO(body))])
    [(_, pixels)] = engine.batches
    np.testing.assert_array_equal(pixels[0], pixels[1])


def test_every_kind_of_image_gives_the_same_answer(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(image_bytes(200))
    array = np.full((8, 8, 3), 200, np.uint8)
    body = path.read_bytes()
    images: list[Any] = [path, str(path), body, bytearray(body), memoryview(body)]
    images += [array, array[:, :, 0], array[:, ::-1], Image.fromarray(array), Image.open(path)]
    answers = model.classify(images)
    assert [label(answer) for answer in answers] == ["bright"] * len(images)
    for image in images:
        assert model.classify(image).predictions == answers[0].predictions


def test_one_image_gives_one_answer_and_several_a_list_or_an_iterator(model: Model) -> None:
    dark, bright = image_bytes(0), image_bytes(255)
    assert isinstance(model.classify(dark), Classification)
    for images in ([dark, bright], (dark, bright)):
        answers = model.classify(images)
        assert isinstance(answers, list)
        assert [label(answer) for answer in answers] == ["dark", "bright"]
    stack: Any = np.stack([np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)])
    assert [label(answer) for answer in model.classify(stack)] == ["dark", "bright"]
    lazy = model.classify(image for image in [dark, bright] * 5)
    assert isinstance(lazy, Iterator)
    assert [label(answer) for answer in lazy] == ["dark", "bright"] * 5
    assert model.classify([]) == []
    assert list(model.classify(iter(()))) == []


def test_an_iterable_is_read_a_few_batches_ahead(model: Model, engine: Recorder) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield image_bytes(0)

    answers = model.classify(endless())
    assert taken == 0
    for _ in range(8):
        next(answers)
    assert 8 <= taken <= 4 * 4
    batches = [len(pixels) for _, pixels in engine.batches]  # the third has begun
    assert batches[:2] == [4, 4]
    assert len(batches) <= 3
    answers.close()  # type: ignore[attr-defined]


def test_the_device_runs_while_the_caller_handles_answers(model: Model, engine: Recorder) -> None:
    """The next batch begins before the answers of one are given."""
    answers = iter(model.classify(iter([image_bytes()] * 12)))
    next(answers)
    wait_until(lambda: len(engine.batches) == 2)
    third = threading.Event()
    engine.before = third.set
    assert not third.wait(0.05)  # nor does it run further ahead
    assert len([next(answers) for _ in range(4)]) == 4
    assert third.wait(10)


def test_images_before_one_that_is_none_are_answered(model: Model) -> None:
    """Also those of a batch that ran when the fault was found."""
    answers = iter(model.classify(iter([image_bytes(0)] * 9 + [3])))  # type: ignore[arg-type]
    assert [label(next(answers)) for _ in range(8)] == ["dark"] * 8
    with pytest.raises(TypeError):
        next(answers)


def test_tiers_and_what_is_known_of_them(model: Model, engine: Recorder) -> None:
    assert [tier.name for tier in model.tiers().tiers] == ["fast", "balanced", "full"]
    assert model.tiers().tiers[0].latency_ms is None
    answer = model.classify(image_bytes())
    assert (answer.tier, answer.budget_ms, answer.met_budget) == ("full", inf, True)
    assert answer.reason == "no budget: the most accurate tier"
    assert model.classify(image_bytes(), tier="fast").reason == "the caller names this tier"
    assert [tier for tier, _ in engine.batches] == ["full", "fast"]
    model.classify(image_bytes(), budget_ms=600_000)
    latency_ms = model.tiers().tiers[0].latency_ms
    assert latency_ms is not None
    assert latency_ms[1] > 0


def test_a_budget_is_planned_by_the_servers_policy(model: Model) -> None:
    answer = model.classify(image_bytes(), budget_ms=600_000, min_tier="balanced")
    assert answer.tier in ("balanced", "full")
    assert answer.met_budget
    assert answer.budget_ms == 600_000
    answers = model.classify([image_bytes(level) for level in (0, 255) * 5], budget_ms=600_000)
    assert [label(each) for each in answers] == ["dark", "bright"] * 5
    lazy = model.classify(iter([image_bytes(0), image_bytes(255)]), budget_ms=600_000)
    assert [label(each) for each in lazy] == ["dark", "bright"]
    pinned = model.classify(image_bytes(), budget_ms=600_000, tier="full")
    assert (pinned.tier, pinned.reason) == ("full", "the caller names this tier")


def test_a_budget_below_the_fastest_tier_is_refused(model: Model, engine: Recorder) -> None:
    model.classify(image_bytes(), budget_ms=600_000)
    engine.batches.clear()
    with pytest.raises(BudgetTooSmall, match="'fast', the fastest allowed, needs"):
        model.classify(image_bytes(), budget_ms=1e-6)
    assert not engine.batches


def test_images_that_are_too_late_are_not_computed(
    model: Model, engine: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is busy with another thread's batch until the budget has passed."""
    model.classify(image_bytes(), budget_ms=600_000)
    engine.batches.clear()
    running, finish = threading.Event(), threading.Event()

    def hold() -> None:
        running.set()
        assert finish.wait(60)

    engine.before = hold
    other = threading.Thread(target=lambda: model.classify(image_bytes()))
    other.start()
    assert running.wait(60)
    threading.Timer(0.7, finish.set).start()
    with pytest.raises(DeadlineExceeded, match="the budget of 500 ms"):
        model.classify([image_bytes(), image_bytes()], budget_ms=500)
    other.join()
    assert len(engine.batches) == 1


@pytest.mark.parametrize(
    ("image", "error", "match"),
    [
        (b"", UnreadableImage, "the file is empty"),
        (image_bytes()[:40], UnreadableImage, "truncated"),
        (b"%PDF-1.7", UnsupportedType, "PDF"),
        ("nowhere.png", FileNotFoundError, "nowhere"),
        (".", OSError, "a folder, not a regular file"),
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"not \[8, 8, 4\]"),
        (np.zeros((8, 8, 3), np.float32), ValueError, "not float32"),
        (np.zeros((0, 8, 3), np.uint8), UnreadableImage, "no pixels"),
        (np.zeros((2, 100_001), np.uint8), TooLarge, "100001 x 2"),
        (Image.new("F", (8, 8)), UnsupportedType, "no defined range"),
        (Image.new("RGB", (0, 8)), UnreadableImage, "no pixels"),
        (Image.new("L", (100_001, 1)), TooLarge, "100001 x 1"),
        (3, TypeError, "not int"),
        ([3], TypeError, "not int"),
    ],
)
def test_what_is_not_an_image(
    model: Model, image: Any, error: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        model.classify(image)
    if isinstance(image, list | int):
        return
    good = image_bytes(0)
    with pytest.raises(error, match=match):
        model.classify([good, image, good])
    if issubclass(error, RequestError | OSError):
        first, middle, last = model.classify([good, image, good], on_error="return")
        assert (label(first), label(last)) == ("dark", "dark")
        assert isinstance(middle, error)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tier": "turbo"}, "tier 'turbo' is unknown; choose one of fast, balanced, full, auto"),
        ({"min_tier": "auto"}, "min_tier 'auto' is unknown"),
        ({"tier": "fast", "min_tier": "full"}, "is below min_tier"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"budget_ms": 0}, "budget_ms must be a number above 0"),
        ({"budget_ms": float("nan")}, "budget_ms must be a number above 0"),
    ],
)
def test_wrong_options_are_refused_before_an_image_is_taken(
    model: Model, options: dict[str, Any], match: str
) -> None:
    images = iter([image_bytes()])
    with pytest.raises(InvalidParameter, match=match):
        model.classify(images, **options)
    assert len(list(images)) == 1


def test_features_come_from_bundles_without_a_head(model: Model, tmp_path: Path) -> None:
    with pytest.raises(TaskNotSupported, match="models compute logits; call classify"):
        model.embed(image_bytes())
    root = write_bundle(tmp_path / "features", labels=[])
    manifest = (
        (root / "bundle.json").read_text().replace('"pooling"', '"answers":"features","pooling"')
    )
    (root / "bundle.json").write_text(manifest)
    with pcae_serve.load(root, backend="simulated") as features:
        assert len(features.embed(image_bytes()).features) == 8
        assert [len(each.features) for each in features.embed([image_bytes()] * 2)] == [8, 8]
        unit = features.embed(image_bytes(), normalize=True, dtype="float16").features
        assert sorted(unit) == [0, 0, 0, 0, 0, 0, 0, 1]
        with pytest.raises(InvalidParameter, match="dtype is float32 or float16, not 'int8'"):
            features.embed(image_bytes(), dtype="int8")  # type: ignore[call-overload]
        with pytest.raises(TaskNotSupported, match="export it again with --dense"):
            features.embed(image_bytes(), patches=True)
        with pytest.raises(TaskNotSupported, match="models compute features; call embed"):
            features.classify(image_bytes())


def test_patches_come_from_dense_bundles(tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "dense", **backbone(patch_width=6))
    with pcae_serve.load(root, backend="simulated", cache_dir=tmp_path) as dense:
        for budget_ms in (None, 60_000):
            answer = dense.embed(image_bytes(), patches=True, budget_ms=budget_ms)
            assert np.array(answer.patches).shape == (4, 4, 6)
        assert dense.embed(image_bytes()).patches is None


def test_threads_share_a_model(model: Model) -> None:
    answers: dict[int, list[str]] = {}

    def work(thread: int) -> None:
        levels = [0 if (thread >> bit) & 1 else 255 for bit in range(6)]
        budget_ms = 600_000 if thread % 2 else None
        answers[thread] = [
            label(each)
            for each in model.classify([image_bytes(n) for n in levels], budget_ms=budget_ms)
        ]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(16):
        assert answers[i] == ["dark" if (i >> bit) & 1 else "bright" for bit in range(6)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_refused_at_once(model: Model) -> None:
    model.classify(image_bytes())  # its threads are running
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # if it hangs
        try:
            model.classify(image_bytes())
        except PcaeError as error:
            os.write(writing, str(error).encode())
        model.close()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as message:
        assert "before this process was forked" in message.read()
    assert os.waitpid(child, 0)[1] == 0
    assert label(model.classify(image_bytes(0))) == "dark"  # here it still works


def test_closing_releases_the_engine_once(model: Model, engine: Recorder) -> None:
    lazy = model.classify(iter([image_bytes()]))
    model.close()
    model.close()
    assert engine.closed == 1
    for call in (lambda: model.classify(image_bytes()), lambda: next(lazy), model.tiers):
        with pytest.raises(PcaeError, match="the model is closed"):
            call()


def test_closing_ends_an_iteration(model: Model) -> None:
    lazy = model.classify(iter([image_bytes()] * 40))
    next(lazy)
    model.close()
    with pytest.raises(PcaeError, match="the model is closed"):
        list(lazy)


def test_an_engine_that_fails_ends_the_call(model: Model, engine: Recorder) -> None:
    def fail() -> None:
        raise RuntimeError("no such operator")

    engine.before = fail
    with pytest.raises(EngineFailed, match="the model failed on this batch: no such operator"):
        model.classify([image_bytes()], on_error="return")
    engine.before = lambda: None
    assert label(model.classify(image_bytes(0))) == "dark"


def test_the_python_shown_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/local.md").read_text(), re.DOTALL)
    exec(code.replace("budget_ms=500", "budget_ms=60000"), {})
    assert capsys.readouterr().out.splitlines() == ["Bag full", "['Bag', 'Dress']"]


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        pcae_serve.load(tmp_path)
    with pytest.raises(StartError, match="runs on the CPU"):
        pcae_serve.load(backend="onnxruntime", device="cuda:0")


@pytest.mark.slow
def test_a_bundle_by_name(hub: Hub, tmp_path: Path) -> None:
    hub.add("me/demo", demo_path())
    with pcae_serve.load("hf://me/demo", backend="simulated", cache_dir=tmp_path) as model:
        assert model.tiers().digest == load_bundle(demo_path()).digest
    with pytest.raises(PcaeError, match=r"hf://me/none: the hub has no model of this name"):
        pcae_serve.load("hf://me/none", cache_dir=tmp_path)
