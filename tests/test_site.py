"""The site of the documents: navigation, links, no other hosts, and what its commands need."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import no_network

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("site_builder", ROOT / ".ci" / "site.py")
assert SPEC is not None
assert SPEC.loader is not None
site: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)

#: A word of a command that does not run on every machine, and the mark that it needs.
MARKS = {
    r"--gpus|cuda|tensorrt|\[gpu|profile gpu": "an NVIDIA GPU",
    r"\bkubectl\b|\bsbatch\b|\bserve deploy\b": "a cluster",
    r"hf://|\b(facebook|google|timm)/": "the Hugging Face hub",
}


#: A flag at the start of a row of a generated table.
FLAG = re.compile(r"(?<=^\| )`--[a-z-]+", re.MULTILINE)


def text(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages from which the site is built."""
    folder: Path = tmp_path_factory.mktemp("site") / "pages"
    site.write_pages(ROOT, folder)
    return folder


def in_navigation(entries: Any) -> Iterator[str]:
    for entry in entries:
        [value] = entry.values()
        yield from [value] if isinstance(value, str) else in_navigation(value)


def test_every_document_has_one_place_in_the_navigation() -> None:
    settings = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    documents = [each.name for each in (ROOT / "docs").glob("*.md")]
    assert sorted(in_navigation(settings["nav"])) == sorted([*documents, *site.NAMED.values()])


def test_pages_stand_in_the_order_in_which_people_need_them() -> None:
    settings = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    order = [page.removesuffix(".md") for page in in_navigation(settings["nav"])]
    needed = ["start", "export", "classes", "training", "tiers", "operations", "capacity", "gpu"]
    needed += ["reduction", "scheduling", "rest", "python", "commands", "paper", "errors"]
    assert sorted(needed, key=order.index) == needed


def test_a_link_out_of_docs_leads_to_a_copy(pages: Path) -> None:
    assert "(repository/docker/Dockerfile.md)" in (pages / "containers.md").read_text()
    assert (pages / "repository/docker/Dockerfile.md").read_text().count("``````") == 2
    assert "(reduction.md)" in (pages / "start.md").read_text()  # of README.md
    assert "(start.md#start)" in (pages / "index.md").read_text()
    for page in pages.rglob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", site.FENCE.sub("", page.read_text())):
            assert (page.parent / link).exists(), f"{page.relative_to(pages)}: {link}"


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<a href="b.html">', "dead link b.html"),
        ('<a href="#c">', "dead anchor #c"),
        ('<a href="a.html#c">', "dead anchor a.html#c"),
        ('<img src="d.png">', "dead link d.png"),
        ('<script src="https://host.example/e.js"></script>', "loads https://host.example/e.js"),
        ('<link rel="stylesheet" href="//host.example/f.css">', "loads //host.example/f.css"),
        ('<a href="a.html"></a><a href="https://host.example/">', None),
        ('<h2 id="c"></h2><a href="a.html#c"></a><a href="?g#c">', None),
    ],
)
def test_dead_links_and_other_hosts_are_found(tmp_path: Path, html: str, fault: str | None) -> None:
    (tmp_path / "a.html").write_text(html)
    found = list(site.problems(tmp_path))
    assert [fault in each for each in found] == [True] if fault else found == []


def test_scripts_and_styles_name_no_other_host(tmp_path: Path) -> None:
    script, style = tmp_path / "a.js", tmp_path / "a.css"
    script.write_text('load("https://host.example/x.js");s="http://www.w3.org/2000/svg"')
    style.write_text("@import 'https://host.example/x.css'; a{background:url(//host.example/b)}")
    assert len(list(site.problems(tmp_path))) == 3
    site.drop_hosts(tmp_path)
    assert script.read_text() == 'load("about:blank");s="http://www.w3.org/2000/svg"'


def test_commands_state_what_they_need() -> None:
    for file in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```sh\n(.*?)```", file.read_text(), re.DOTALL):
            for part in block.split("\n\n"):
                commands = re.sub(r"(^| +)#.*", "", part, flags=re.MULTILINE)
                for words, need in MARKS.items():
                    if re.search(words, commands):
                        assert f"# needs {need}" in part, f"{file.name}: {part}"


def test_commands_have_the_flags_that_they_are_shown_with() -> None:
    flags = {word for page in ("commands", "configuration") for word in FLAG.findall(text(page))}
    for file in (ROOT / "docs").glob("*.md"):
        for block in re.findall(r"```sh\n(.*?)```", file.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if ours := re.search(r"\bpcae-(?:serve|export|train) .*", line.split("  #")[0]):
                    shown = {word for word in shlex.split(ours[0]) if word.startswith("--")}
                    assert {f"`{word.partition('=')[0]}" for word in shown} <= flags, line


@pytest.mark.slow
def test_the_simulation_shown_runs() -> None:
    [block] = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/capacity.md").read_text(), re.DOTALL)
    command = [str(Path(sys.executable).parent / "pcae-serve"), *shlex.split(block)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("azure") == 0 < done.stdout.count("poisson")


@pytest.mark.slow
def test_make_docs_builds_a_site_without_dead_links(tmp_path: Path) -> None:
    """Needs a package index, for the environment; the build itself may connect to nothing."""
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".git", ".*cache", ".venv*", "runs", "build")
    shutil.copytree(ROOT, clone, ignore=ignored)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    def make(target: str, offline: bool) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", target],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            preexec_fn=no_network.deny_sockets if offline and no_network.AVAILABLE else None,
        )

    installed = make(".venv-docs/installed", offline=False)
    assert installed.returncode == 0, installed.stderr[-2000:]
    built = make("docs", offline=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    assert list(site.problems(clone / "build" / "site")) == []
    assert (clone / "build" / "site" / "commands.html").is_file()

    page = clone / "docs" / "gpu.md"
    for link in ("lost.md", "tiers.md#lost"):
        text = page.read_text()
        page.write_text(f"{text}\n[dead]({link})\n")
        assert make("docs", offline=True).returncode != 0
        page.write_text(text)
