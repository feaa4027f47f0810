"""The language check of `make lint` finds what it should, and only that."""

import subprocess
import sys
from pathlib import Path

CHECK = Path(__file__).parents[1] / ".ci" / "language.py"

MODULE = '''
"""Read a bundle.

Raises BundleError where the folder is missing.
"""

# comments are not read: nobody, whoever
LIMIT = "so long as there is no limit, it is no longer checked, besides"
ERROR = f"{LIMIT} is no bundle"
NAME = "nobody"  # lint: language
TEXT = """nobody
and whoever"""  # lint: language
'''
DOCUMENT = "Requests are dropped.\\nNobody is told.\\nThe user nobody. <!-- lint: language -->\\n"


def test_it_reads_strings_and_documents_but_no_comments(tmp_path: Path) -> None:
    module, document = tmp_path / "module.py", tmp_path / "document.md"
    module.write_text(MODULE)
    document.write_text(DOCUMENT.replace("\\n", "\n"))
    command = (sys.executable, CHECK, module, document)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = [
        line.removeprefix(f"{tmp_path}/").split(": write")[0] for line in done.stdout.splitlines()
    ]
    assert found == [
        "module.py:4: 'Raises BundleError where'",
        "module.py:9: 'is no'",
        "document.md:2: 'Nobody'",
        "document.md:2: 'told'",
    ]


def test_no_match_exits_with_0(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("Requests are dropped.\n")
    assert subprocess.run([sys.executable, CHECK, document]).returncode == 0
