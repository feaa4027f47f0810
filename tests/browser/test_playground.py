"""The playground in Chromium: what people do on it, and what they see."""

import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

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


def test_the_veil_covers_what_the_api_says_was_dropped(visit: Any, tmp_path: Path) -> None:
    one_look = ("--policy", "fixed:fast", "--max-looks", "1")
    with server(*one_look, cache=tmp_path) as (url, _):
        page = visit(url)
        ask(page)
        answer = httpx2.post(
            f"{url}/classify?tier=fast&explain=true&budget_ms=60000",
            content=(SAMPLES / "ankle-boot.png").read_bytes(),
        ).json()
    assert answer["tokens"][-1] < 40
    set_range(page, "After reduction", 0)
    bare = pixels(page)
    for stage, kept in enumerate(answer["kept"], start=1):
        set_range(page, "After reduction", stage)
        page.get_by_text(f"{stage} of 3: ").wait_for(timeout=WAIT_MS)
        for _ in range(WAIT_MS // 100):  # effects draw after the text
            veiled = pixels(page)
            bright = [i for i in range(196) if veiled[i] == bare[i]]
            if bright == kept:
                break
            page.wait_for_timeout(100)
        assert bright == kept


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
    assert "cannot show bad.png" in page.inner_text(".problem")


def test_an_image_is_dropped_and_another_pasted(demo: str, visit: Any) -> None:
    page = visit(demo)
    page.wait_for_selector(".drop", timeout=WAIT_MS)
    give = """([bytes, kind]) => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
        const target = kind === "drop" ? document.querySelector(".drop") : document;
        const event = kind === "drop"
            ? new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: files, bubbles: true});
        target.dispatchEvent(event);
    }"""
    for kind, sample, label in (("drop", "dress", "Dress"), ("paste", "bag", "Bag")):
        page.evaluate(give, [list((SAMPLES / f"{sample}.png").read_bytes()), kind])
        page.locator(".bars tr").first.get_by_text(label).wait_for(timeout=WAIT_MS)


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
    page.wait_for_selector("text=images answered in", timeout=WAIT_MS)
    assert "within" in page.inner_text("section[aria-labelledby=burst]")


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


def test_the_documentation_is_drawn_without_other_hosts(demo: str, visit: Any) -> None:
    page = visit(demo, "/docs")
    page.locator("#operations-Server-livez_livez_get").click(timeout=WAIT_MS)
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    page.get_by_text('"status": "alive"').first.wait_for(timeout=WAIT_MS)
