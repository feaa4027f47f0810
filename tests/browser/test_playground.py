"""The playground in Chromium: what people do on it, and what they see."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.reader import demo_path, load_bundle
from tests.support.bundles import copy_demo
from tests.support.server_process import server

pytestmark = pytest.mark.slow

SAMPLES = Path(__file__).parents[2] / "docs" / "samples"
WAIT_MS = 60_000  # the machine may be busy


def ask(page: Any, sample: str = "ankle boot") -> None:
    """Choose a sample, and wait for its answer."""
    page.click(f"button:has(img[alt='{sample}'])", timeout=WAIT_MS)
    page.wait_for_selector(".answer", timeout=WAIT_MS)


def set_range(page: Any, label: str, value: int) -> None:
    page.get_by_label(label).fill(str(value))


def pixels(page: Any) -> list[list[int]]:
    """Return red, green, blue and opacity at the middle of each patch of the image."""
    found: list[list[int]] = page.evaluate(
        """() => {
            const canvas = document.querySelector(".answer canvas");
            const context = canvas.getContext("2d"), cell = canvas.width / 14;
            return Array.from({length: 196}, (_, i) => [...context.getImageData(
                (i % 14 + 0.5) * cell, (Math.floor(i / 14) + 0.5) * cell, 1, 1).data]);
        }"""
    )
    return found


def test_a_sample_is_answered_with_tier_reason_and_times(demo: str, visit: Any) -> None:
    page = visit(demo)
    ask(page)
    text = page.inner_text(".answer")
    assert "Ankle boot" in text
    assert "compute" in text
    assert "keep ratio" in text
    assert page.locator(".tier.chosen").count() == 1


ONE_LOOK = ("--policy", "fixed:fast", "--max-looks", "1")


def check_veil(page: Any, answer: dict[str, Any]) -> None:
    """Move through the stages; the patches without a veil are those that the API keeps."""
    assert answer["tokens"][-1] < 40
    set_range(page, "After reduction", 0)
    page.get_by_text("0 of 3: all patches").wait_for(timeout=WAIT_MS)
    page.wait_for_timeout(300)  # effects draw after the text
    bare = pixels(page)
    explained = page.get_by_text("Veiled patches were dropped")
    assert explained.count() == 0
    for stage, kept in enumerate(answer["kept"], start=1):
        set_range(page, "After reduction", stage)
        explained.wait_for(timeout=WAIT_MS)
        page.get_by_text(f"{stage} of 3: ").wait_for(timeout=WAIT_MS)
        for _ in range(WAIT_MS // 100):
            veiled = pixels(page)
            bright = [i for i in range(196) if veiled[i] == bare[i]]
            if bright == kept:
                break
            page.wait_for_timeout(100)
        assert bright == kept


def kept_by(url: str, image: bytes) -> dict[str, Any]:
    query = "tier=fast&explain=true&budget_ms=60000"
    answer: dict[str, Any] = httpx2.post(f"{url}/classify?{query}", content=image).json()
    return answer


def test_the_veil_covers_what_the_api_says_was_dropped(visit: Any, tmp_path: Path) -> None:
    with server(*ONE_LOOK, cache=tmp_path) as (url, _):
        page = visit(url)
        ask(page)
        check_veil(page, kept_by(url, (SAMPLES / "ankle-boot.png").read_bytes()))


def scene(kind: str, orientation: int | None = None) -> bytes:
    """A wide image of large areas in several colours, stored with an EXIF orientation."""
    image = Image.new("RGB", (900, 600), "navy")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 450, 250), fill="orange")
    draw.rectangle((600, 300, 900, 600), fill="white")
    draw.ellipse((250, 200, 550, 500), fill="green")
    exif = Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    with BytesIO() as file:
        image.save(file, kind, quality=95, exif=exif)
        return file.getvalue()


#: Both sides are scaled to 32 pixels, and the middle 28 are taken.
SQUASH = {"size": {"height": 32, "width": 32}}


@pytest.mark.parametrize("processor", [None, SQUASH], ids=["shorter side", "squash"])
def test_the_page_shows_the_pixels_that_the_model_sees(
    processor: dict[str, Any] | None, visit: Any, tmp_path: Path
) -> None:
    bundle = load_bundle(copy_demo(tmp_path / "bundle", processor))
    assert bundle.preprocess.squash == (processor is not None)
    flags = ("--bundle", str(bundle.root), *ONE_LOOK)
    with server(*flags, cache=tmp_path / "cache") as (url, _):
        page = visit(url)
        for name, content in {
            "plain.jpg": scene("JPEG"),
            "turned.jpg": scene("JPEG", 6),
            "mirrored.jpg": scene("JPEG", 5),
            "turned.webp": scene("WebP", 8),
            "mirrored.webp": scene("WebP", 7),
            "turned.png": scene("PNG", 3),
        }.items():
            file = {"name": name, "mimeType": "", "buffer": content}
            page.get_by_label("Choose an image").set_input_files(file, timeout=WAIT_MS)
            page.get_by_role("img", name=name).wait_for(timeout=WAIT_MS)
            check_veil(page, kept_by(url, content))
            set_range(page, "After reduction", 0)
            page.wait_for_timeout(200)
            check_pixels(page, bundle.preprocess, content)


def check_pixels(page: Any, preprocess: Preprocess, content: bytes) -> None:
    """Compare the middle of each patch with what the server decodes; edges are blurred there."""
    seen = np.array(pixels(page))[:, :3]
    cells = preprocess(content).reshape(14, 2, 14, 2, 3).astype(float)
    flat = np.ptp(cells, axis=(1, 3)).max(axis=-1).ravel() < 20
    assert flat.sum() > 100
    expected = cells.mean(axis=(1, 3)).reshape(196, 3)
    assert np.abs(seen - expected)[flat].max() < 30


def test_a_small_budget_buys_a_cheaper_tier_and_a_tiny_one_an_explanation(
    demo: str, visit: Any
) -> None:
    page = visit(demo)
    ask(page)
    set_range(page, "Latency budget", 0)
    page.wait_for_selector(".problem", timeout=WAIT_MS)
    assert re.search(r"budget.*1 ms|needs? .* ms", page.inner_text(".problem"))
    set_range(page, "Latency budget", 200)
    page.wait_for_selector(".answer", timeout=WAIT_MS)
    assert page.locator(".problem").count() == 0


def test_a_file_of_ones_own_and_one_that_is_no_image(demo: str, visit: Any, tmp_path: Path) -> None:
    page = visit(demo)
    wide, bad = tmp_path / "wide.png", tmp_path / "bad.png"
    picture = Image.new("RGB", (90, 30), "black")
    picture.paste("white", (30, 0, 60, 30))
    picture.save(wide)
    bad.write_bytes(b"no image")
    chooser = page.get_by_label("Choose an image")
    chooser.set_input_files(str(wide), timeout=WAIT_MS)
    page.wait_for_selector(".answer", timeout=WAIT_MS)
    set_range(page, "After reduction", 0)
    page.wait_for_timeout(100)
    assert {tuple(each[:3]) for each in pixels(page)} == {(255, 255, 255)}  # the centre alone
    chooser.set_input_files(str(bad))
    page.wait_for_selector(".problem", timeout=WAIT_MS)
    detail = httpx2.post(f"{demo}/classify", content=b"no image").json()["detail"]
    assert detail in page.inner_text(".problem")
    assert "cannot show it" in page.inner_text(".note")


def test_what_the_browser_cannot_show_the_server_may_still_answer(demo: str, visit: Any) -> None:
    page = visit(demo)
    with BytesIO() as content:
        Image.new("RGB", (50, 40), "white").save(content, "TIFF")
        tiff = content.getvalue()
    heic = b"\0\0\0\x18ftypheic" + bytes(500)
    chooser = page.get_by_label("Choose an image")
    chooser.set_input_files({"name": "p.tif", "mimeType": "", "buffer": tiff}, timeout=WAIT_MS)
    page.wait_for_selector(".answer", timeout=WAIT_MS)
    assert "cannot show it" in page.inner_text(".note")
    chooser.set_input_files({"name": "p.heic", "mimeType": "image/heic", "buffer": heic})
    page.wait_for_selector(".problem", timeout=WAIT_MS)
    assert "HEIC" in page.inner_text(".problem")


def test_large_transparent_and_long_named_files(demo: str, visit: Any) -> None:
    page = visit(demo, viewport={"width": 360, "height": 740})
    chooser = page.get_by_label("Choose an image")
    files = {
        "hidden.png": Image.new("RGBA", (60, 60), (200, 30, 30, 0)),
        "name" * 60 + ".png": Image.new("RGB", (60, 60), "white"),
        "photograph.jpg": Image.effect_noise((5200, 3900), 80).convert("RGB"),
    }
    for name, image in files.items():
        with BytesIO() as content:
            image.save(content, "PNG" if name.endswith("png") else "JPEG")
            file = {"name": name, "mimeType": "", "buffer": content.getvalue()}
        set_range(page, "Latency budget", 200)  # decoding a photograph takes its time
        chooser.set_input_files(file, timeout=WAIT_MS)
        page.get_by_text(name[:14]).first.wait_for(timeout=WAIT_MS)
        page.wait_for_selector(".answer", timeout=WAIT_MS)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        assert ("partly transparent" in page.inner_text(".note")) == (name == "hidden.png")
    assert "5200 \N{MULTIPLICATION SIGN} 3900 pixels" in page.inner_text(".note")
    assert "28 pixels wide" in page.inner_text("section[aria-labelledby=burst]")


def test_an_image_is_dropped_and_another_pasted(demo: str, visit: Any) -> None:
    page = visit(demo)
    page.wait_for_selector(".drop", timeout=WAIT_MS)
    give = """([bytes, kind]) => {
        const files = new DataTransfer();
        const text = new File(["text"], "a.txt", {type: "text/plain"});
        if (kind === "paste two") files.items.add(text);
        files.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
        const place = {drop: ".drop", "drop outside": "footer"}[kind];
        const target = place ? document.querySelector(place) : document;
        const event = place
            ? new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: files, bubbles: true});
        target.dispatchEvent(event);
    }"""
    for kind, sample, label in (
        ("drop", "dress", "Dress"),
        ("paste", "bag", "Bag"),
        ("drop outside", "trouser", "Trouser"),
        ("paste two", "dress", "Dress"),
    ):
        page.evaluate(give, [list((SAMPLES / f"{sample}.png").read_bytes()), kind])
        page.locator(".bars tr").first.get_by_text(label).wait_for(timeout=WAIT_MS)
    assert "of 2 files, only this one" in page.inner_text(".note")


def test_the_front_marks_the_tier_that_answered(demo: str, visit: Any, tmp_path: Path) -> None:
    tiers = []
    with server(*ONE_LOOK, cache=tmp_path / "cache") as (cheapest, _):
        for url in (demo, cheapest):
            page = visit(url)
            set_range(page, "Latency budget", 200)
            assert page.locator("section[aria-labelledby=front] .chosen").count() == 0
            with page.expect_response(lambda got: "/classify" in got.url) as answered:
                ask(page)
            tiers.append(answered.value.json()["tier"])
            page.wait_for_selector("svg.front g.chosen", timeout=WAIT_MS)
            [title] = page.locator("svg.front g.chosen title").all_text_contents()
            assert title.startswith(f"{tiers[-1]}: ")
            row = page.locator("section[aria-labelledby=front] tr.chosen th")
            assert row.all_inner_texts() == [f"{tiers[-1]} (answered)"]
    assert tiers[1] == "fast" != tiers[0]


def test_all_tiers_side_by_side(demo: str, visit: Any) -> None:
    page = visit(demo)
    ask(page)
    page.click("text=Compare all tiers")
    tiers = httpx2.get(f"{demo}/tiers").json()["tiers"]
    rows = page.locator("section[aria-labelledby=compare] tbody tr")
    page.wait_for_function(
        "n => document.querySelectorAll('section[aria-labelledby=compare] tbody tr').length === n",
        arg=len(tiers), timeout=WAIT_MS,
    )  # fmt: skip
    assert [rows.nth(i).locator("th").inner_text() for i in range(len(tiers))] == [
        tier["name"] for tier in tiers
    ]


def test_a_burst_is_drawn_and_summed_up(demo: str, visit: Any) -> None:
    page = visit(demo)
    ask(page)
    page.click("text=Send a burst")
    page.wait_for_selector(".chart rect", timeout=WAIT_MS)
    assert "most are refused" not in page.inner_text("section[aria-labelledby=burst]")
    page.wait_for_selector("text=images answered in", timeout=WAIT_MS)
    assert "within" in page.inner_text("section[aria-labelledby=burst]")
    set_range(page, "Latency budget", 40)  # less than one image takes
    page.get_by_text("most are refused").wait_for(timeout=WAIT_MS)


def test_a_key_is_asked_for_and_kept_in_memory_alone(visit: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-some-length\n")
    keys.chmod(0o600)
    with server("--api-keys-file", str(keys), cache=tmp_path / "cache") as (url, _):
        page = visit(url)
        page.wait_for_selector(".problem", timeout=WAIT_MS)
        assert "API key" in page.inner_text(".problem")
        page.get_by_label("API key").fill("a-key-of-some-length")
        page.click("text=Use key")
        ask(page)
        assert page.evaluate("() => localStorage.length + sessionStorage.length") == 0
        page.reload()
        page.wait_for_selector(".problem", timeout=WAIT_MS)


def test_a_server_that_has_gone(visit: Any, tmp_path: Path) -> None:
    with server(cache=tmp_path / "cache") as (url, _):
        page = visit(url)
        ask(page)
    set_range(page, "Latency budget", 150)
    page.wait_for_selector(".problem", timeout=WAIT_MS)
    assert "cannot be reached" in page.inner_text(".problem")


@contextmanager
def flood(url: str) -> Iterator[None]:
    """Fill the queue with images that can wait, until the block ends."""
    ended = threading.Event()
    image = (SAMPLES / "bag.png").read_bytes()
    files = [("image", ("i.png", image, "image/png")) for _ in range(32)]

    def send() -> None:
        while not ended.is_set():
            httpx2.post(f"{url}/classify/batch?tier=full&budget_ms=60000", files=files, timeout=120)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_a_server_that_has_too_much_to_do(visit: Any, tmp_path: Path) -> None:
    flags = ("--queue-limit", "4", "--max-batch", "1")
    with server(*flags, cache=tmp_path / "cache") as (url, _):
        page = visit(url)
        with flood(url):
            page.click("button:has(img[alt='dress'])", timeout=WAIT_MS)
            for _ in range(WAIT_MS // 500):  # a place in the queue may be free
                page.locator(".answer, .problem").first.wait_for(timeout=WAIT_MS)
                if page.locator(".problem").count():
                    break
                page.click("button:has(img[alt='dress'])")
                page.wait_for_timeout(500)
            assert "busy" in page.inner_text(".problem") or "queue" in page.inner_text(".problem")
        page.click("text=Try again")
        page.wait_for_selector(".answer", timeout=WAIT_MS)
        assert page.locator(".problem").count() == 0


def test_a_second_look_is_shown_and_can_be_forbidden(visit: Any, tmp_path: Path) -> None:
    with server("--policy", "fixed:fast", cache=tmp_path / "cache") as (url, _):
        assert httpx2.get(f"{url}/tiers").json()["max_looks"] == 2
        page = visit(url)
        ask(page)  # on `fast`, its first class is hardly more probable than the second
        text = page.inner_text(".answer")
        assert re.search(r"fast → (brisk|balanced|full)", text)
        assert "a second look: on tier 'fast'" in text
        assert "two looks" in text
        assert page.inner_text(".tier.first") == "fast"
        page.get_by_label("A second look if the first is unsure").uncheck()
        page.get_by_text("one look").wait_for(timeout=WAIT_MS)
        assert page.inner_text(".result").startswith("fast, keep ratio 0.2")
    with server("--max-looks", "1", cache=tmp_path / "cache") as (url, _):
        page = visit(url)
        ask(page)
        assert page.get_by_text("A second look").count() == 0


def test_independent_labels_and_several_models(visit: Any, tmp_path: Path) -> None:
    known = json.loads((demo_path() / "bundle.json").read_text())
    model = known["models"]["vit"] | {"answers": "labels"}
    tiers = [{**tier, "accuracy": None} for tier in known["tiers"]]
    tiers[0]["model"] = "second"
    root = copy_demo(
        tmp_path / "bundle", models={"vit": model, "second": model}, tiers=tiers,
        files=known["files"]
        | {name.replace("/vit/", "/second/"): known["files"][name] for name in known["files"]},
    )  # fmt: skip
    (root / "models" / "second").symlink_to(root / "models" / "vit")
    with server("--bundle", str(root), cache=tmp_path / "cache") as (url, _):
        page = visit(url)
        chooser = page.get_by_label("Choose an image")
        chooser.set_input_files(str(SAMPLES / "dress.png"), timeout=WAIT_MS)
        page.wait_for_selector(".answer", timeout=WAIT_MS)
        assert "Most probable labels" in page.inner_text(".answer")
        page.click("text=Compare all tiers")
        rows = page.locator("section[aria-labelledby=compare] tbody tr")
        rows.nth(len(tiers) - 1).wait_for(timeout=WAIT_MS)


def test_on_a_phone_nothing_is_cut_off(demo: str, visit: Any) -> None:
    page = visit(demo, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    ask(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_and_use_it(demo: str, visit: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = visit(demo, color_scheme=scheme)
    ask(page)
    page.click("text=Compare all tiers")
    page.wait_for_selector("section[aria-labelledby=compare] tbody tr", timeout=WAIT_MS)
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_keyboard_reaches_everything(demo: str, visit: Any) -> None:
    page = visit(demo)
    ask(page)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.outerHTML.slice(0, 300)"))
    text = "".join(reached)
    for needed in (
        'type="file"',
        'type="range"',
        "ankle boot",
        "Compare all tiers",
        "Send a burst",
    ):
        assert needed in text


def test_the_map_shows_how_similar_patches_are(dense: str, visit: Any) -> None:
    page = visit(dense)
    content = scene("PNG")
    chooser = page.get_by_label("Choose an image")
    chooser.set_input_files({"name": "a.png", "mimeType": "", "buffer": content}, timeout=WAIT_MS)
    turned = scene("PNG", 3)
    second = {"name": "b.png", "mimeType": "", "buffer": turned}
    page.get_by_label("Choose a second image").set_input_files(second, timeout=WAIT_MS)
    page.get_by_text("second image: b.png").wait_for(timeout=WAIT_MS)

    def grid(body: bytes) -> Any:
        query = "patches=true&normalize=true&tier=full&budget_ms=60000"
        answer = httpx2.post(f"{dense}/embed?{query}", content=body).json()
        return np.array(answer["patches"]).reshape(64, -1)

    page.locator("canvas.choice").click(position={"x": 5, "y": 5})  # the first patch
    page.get_by_text("Chosen: row 1, column 1.").wait_for(timeout=WAIT_MS)
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    page.get_by_text("Chosen: row 1, column 2.").wait_for(timeout=WAIT_MS)
    own, other = grid(content), grid(turned)
    nearest = page.locator("table.nearest tbody tr")
    for image, vectors in (("first", own), ("second", other)):
        cosines = vectors @ own[1]
        order = [i for i in np.argsort(-cosines) if image == "second" or i != 1]
        found = nearest.filter(has=page.get_by_role("rowheader", name=image)).all_inner_texts()
        expected = [
            f"{image} row {i // 8 + 1}, column {i % 8 + 1} {cosines[i]:.3f}" for i in order[:3]
        ]
        assert [" ".join(text.split()) for text in found] == expected


def test_colours_of_the_map_rise_with_similarity(dense: str, visit: Any) -> None:
    """Over a black image, green rises from the least to the most similar patch."""
    page = visit(dense)
    with BytesIO() as file:
        Image.new("RGB", (64, 64)).save(file, "PNG")
        black = file.getvalue()
    chooser = page.get_by_label("Choose an image")
    for tier in ("full", "low"):
        chooser.set_input_files({"name": "a.png", "mimeType": "", "buffer": black}, timeout=WAIT_MS)
        page.locator("section[aria-labelledby=patches] select").select_option(tier)
        query = f"patches=true&normalize=true&tier={tier}&budget_ms=60000"
        answer = httpx2.post(f"{dense}/embed?{query}", content=black).json()
        vectors = np.array(answer["patches"]).reshape(64, -1)
        cosines = vectors @ vectors[36]  # the middle is chosen at first
        mean = f"First image: mean {cosines.mean():.3f}"
        page.get_by_text(mean).wait_for(timeout=WAIT_MS)
        page.wait_for_timeout(200)
        green = np.array(page.evaluate(MIDDLES))[:, 1]
        order = np.argsort(cosines)
        assert (np.diff(green[order]) >= -1).all()
        assert green[order[0]] < 5 < 150 < green[order[-1]]


#: Colours at the middle of each of 64 patches.
MIDDLES = """() => {
    const canvas = document.querySelector("canvas.choice"), cell = canvas.width / 8;
    const context = canvas.getContext("2d");
    return Array.from({length: 64}, (_, i) => [...context.getImageData(
        (i % 8 + 0.5) * cell, (Math.floor(i / 8) + 0.5) * cell, 1, 1).data]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_the_map(dense: str, visit: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = visit(dense, color_scheme=scheme, viewport={"width": 360, "height": 740})
    chooser = page.get_by_label("Choose an image")
    for name in ("a.png", "name" * 40):  # the one before is the second image
        file = {"name": name, "mimeType": "image/png", "buffer": scene("PNG")}
        chooser.set_input_files(file, timeout=WAIT_MS)
        page.get_by_text(f"first image: {name}").wait_for(timeout=WAIT_MS)
    page.get_by_text("second image: a.png").wait_for(timeout=WAIT_MS)
    page.wait_for_selector("table.nearest")
    page.wait_for_selector("section[aria-labelledby=similar] table", timeout=WAIT_MS)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_documentation_is_drawn_without_other_hosts(demo: str, visit: Any) -> None:
    page = visit(demo, "/docs")
    page.locator("#operations-Server-livez_livez_get").click(timeout=WAIT_MS)
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    page.get_by_text('"status": "alive"').first.wait_for(timeout=WAIT_MS)
