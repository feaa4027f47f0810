"""Build the site from docs/ into build/site, and check it: `make docs` runs it.

    .ci/site.py              build and check
    .ci/site.py --pages      only write build/pages, from which the site is built

Pages link to files outside docs/ (records, Dockerfile, manifests). Those become pages, too, so that
the site is complete without the repository. The build fails if a link or an anchor has no target,
or if a page would load a script, a style, a font or a picture from another host.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from os.path import relpath
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
DOCS, PAGES, SITE = ROOT / "docs", ROOT / "build" / "pages", ROOT / "build" / "site"

#: Documents outside docs/ that have a page of their own in the navigation.
NAMED = {
    "README.md": "start.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
#: Files that are copied as they are; other files become a page with their text.
COPIED = {".png", ".svg", ".css", ".json", ".csv", ".jsonl"}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```|~~~).*?^\1$", re.MULTILINE | re.DOTALL)


def main(arguments: list[str]) -> int:
    """Write the pages, build the site and check it. Return the exit code."""
    write_pages(ROOT, PAGES)
    if "--pages" in arguments:
        return 0
    shutil.rmtree(SITE, ignore_errors=True)
    zensical = Path(sys.executable).with_name("zensical")
    done = subprocess.run([zensical, "build", "--clean", "--strict"], cwd=ROOT)
    if done.returncode:
        return done.returncode
    drop_hosts(SITE)
    faults = [*problems(SITE)]
    print(*faults, sep="\n", file=sys.stderr)
    if not faults:
        print(f"open {relpath(SITE / 'index.html')}")
    return bool(faults)


def write_pages(root: Path, pages: Path) -> None:
    """Copy docs/ and whatever its pages link to, with links between the copies."""
    shutil.rmtree(pages, ignore_errors=True)
    docs = root / "docs"
    waiting = [*docs.rglob("*"), *(root / name for name in NAMED)]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        if source.is_dir() and docs in source.parents:
            continue
        target = pages / page_of(source, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix in COPIED:
            shutil.copy(source, target)
            continue
        text, linked = page(source, root)
        target.write_text(text)
        waiting += linked - seen
        seen |= linked


def page_of(source: Path, root: Path) -> Path:
    """Return where a file or folder of the repository is in the site, relative to its root."""
    name = source.relative_to(root)
    if str(name) in NAMED:
        return Path(NAMED[str(name)])
    if name.parts[0] == "docs":
        return name.relative_to("docs")
    if source.is_dir():
        return "repository" / name / "index.md"
    if source.suffix == ".md":
        return "repository" / name.with_name(name.name.replace("README", "index"))
    return "repository" / (name if name.suffix in COPIED else name.with_name(f"{name.name}.md"))


def page(source: Path, root: Path) -> tuple[str, set[Path]]:
    """Return a file or folder as Markdown, and the files that it links to."""
    if source.is_dir():
        files = sorted(each for each in source.iterdir() if not each.name.startswith((".", "_")))
        if readme := [each for each in files if each.name == "README.md"]:
            return page(readme[0], root)
        text = f"# {source.relative_to(root)}\n\n" + "".join(
            f"- [{each.name}]({each.name})\n" for each in files
        )
        return relinked(text, source / "index.md", root)
    if source.suffix == ".md":
        return relinked(source.read_text(), source, root)
    body, fence = source.read_text(), "`" * 6
    kind = {"": "docker" if source.name == "Dockerfile" else "text"}.get(
        source.suffix, source.suffix[1:]
    )
    return f"# {source.relative_to(root)}\n\n{fence}{kind}\n{body.rstrip()}\n{fence}\n", set()


def relinked(text: str, source: Path, root: Path) -> tuple[str, set[Path]]:
    """Return a page with links to the copies of files, and those files. Code stays as it is."""
    linked: set[Path] = set()
    here = page_of(source, root) if source.exists() else page_of(source.parent, root)

    def replace(match: re.Match[str]) -> str:
        if urlsplit(match[1]).scheme:
            return match[0]
        target = (source.parent / unquote(match[1])).resolve()
        if not target.exists() or root not in target.parents:
            return match[0]  # the strict build reports it
        linked.add(target)
        return relpath(page_of(target, root), here.parent) + (match[2] or "")

    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [LINK.sub(replace, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(replace, text[end:])]), linked


#: Addresses that the theme's scripts name (editors, diagrams, galleries), and imports of styles.
ELSEWHERE = re.compile(r"""(?<=["'`])https?://(?!www\.w3\.org/)[^"'`]+""")
IMPORTED = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')]+)""")


def drop_hosts(site: Path) -> None:
    """Remove the addresses from which the theme would load features that these pages do not use."""
    for script in site.rglob("*.js"):
        script.write_text(ELSEWHERE.sub("about:blank", script.read_text()))


class Page(HTMLParser):
    """The anchors and links of a built page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors = {""}
        self.links: list[str] = []  # what a reader may follow
        self.loads: list[str] = []  # what a browser fetches with the page
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record one element."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link":
            kind = self.links if values.get("rel") in ("canonical", "next", "prev") else self.loads
            kind.append(values.get("href", ""))
        self.loads += [values[name] for name in ("src", "data", "poster") if values.get(name)]


def problems(site: Path) -> Iterator[str]:
    """Yield each dead link, each dead anchor, and whatever would be fetched from another host."""
    pages = {file: Page(file.read_text()) for file in sorted(site.rglob("*.html"))}
    for file, built in pages.items():
        name = file.relative_to(site)
        if name.name == "404.html":  # its links start at the server's root
            continue
        for address in built.loads:
            if urlsplit(address).netloc:
                yield f"{name}: loads {address} from another host"
        for address in [*built.links, *built.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{name}: dead link {address}"
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name}: dead anchor {address}"
    for suffix, pattern in (("js", ELSEWHERE), ("css", IMPORTED)):
        for file in sorted(site.rglob(f"*.{suffix}")):
            for address in pattern.findall(file.read_text()):
                yield f"{file.relative_to(site)}: loads {address} from another host"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
