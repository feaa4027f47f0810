"""Check that what users read is plain technical English: `make lint` runs it.

    .ci/language.py [FILE…]      default: string literals of the packages, and all documents

Comments of Python files are not read. If one of the words is right, a comment `lint: language` on
the same line (or on the last line of the string) allows it. CONTRIBUTING.md has the rule itself.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Regular expression, and what to write in its place.
PATTERNS = {
    r"told|tells?(?! \w+ apart)|telling": "report, return, log, show, state",
    r"nobody|no one|whoever": "no client, no request, anyone who",
    r"anew": "again, or a verb: recreate, restart",
    r"in vain": "wasted",
    r"for ever": "without a time limit",
    r"of no account": "ignored",
    r"lets? go": "drop, release",
    r"in hand": "in flight, queued, accepted",
    r"so (?:many|much|long)(?! as\b| that\b)": "a number, or N",
    r"(?:of|for) the moment": "current",
    r"beside": "alongside, next to, in addition to",
    r"knows?\b[^.]*\bnothing of": "leave it out: import-linter checks what a module may know",
    r"raises \w+ where": "Raises X if",
    r"(?<!there )is no(?! longer| more| less)": "is not a",
    r"(?:where|if) left out": "by default, if omitted",
    r"made-up": "generated",
}
WORDS = re.compile("|".join(rf"\b(?P<p{i}>{each})\b" for i, each in enumerate(PATTERNS)), re.I)
MARK = "lint: language"

#: Files that are read by default; records and the demo's card are documents of their day.
DOCUMENTS = ("*.md", ".github/**/*.md", "docs/*.md", "pcae_serve/loadtest/**/*.md")
PACKAGES = ("pcae_serve", "export", "training")
TEXTS = ("Makefile", "pyproject.toml", "docker/**/*.y*ml", "docker/Dockerfile", "docker/*.sh")


def main(names: list[str]) -> int:
    """Print each match as FILE:LINE, and return 1 if there is any."""
    files = [Path(name).resolve() for name in names] or list(default_files())
    found = [(file, *match) for file in files for match in matches(file)]
    for file, line, words, instead in found:
        shown = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        print(f"{shown}:{line}: {words!r}: write {instead}")
    return bool(found)


def default_files() -> Iterator[Path]:
    for pattern in (*DOCUMENTS, *TEXTS, *(f"{package}/**/*.py" for package in PACKAGES)):
        yield from sorted(ROOT.glob(pattern))


def matches(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, words and what to write instead, for each pattern found in a file."""
    source = file.read_text()
    lines = source.splitlines()
    texts = strings(source) if file.suffix == ".py" else plain(lines)
    for first, last, text in texts:
        if any(MARK in line for line in lines[first - 1 : last]):
            continue
        for match in WORDS.finditer(text):
            instead = next(PATTERNS[p] for i, p in enumerate(PATTERNS) if match[f"p{i}"])
            line = min(first + text.count("\n", 0, match.start()), last)
            yield line, match[0], instead


def plain(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """Yield each line of a document as (line, line, text)."""
    for number, line in enumerate(lines, 1):
        yield number, number, line


def strings(source: str) -> Iterator[tuple[int, int, str]]:
    """Yield each string literal of a Python file as (first line, last line, text)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.end_lineno or node.lineno, node.value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
