"""The export command, run in process."""

from pathlib import Path

import pytest

from pcae_export.commands import Export
from pcae_export.verify import MIN_IMAGES
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.command import run

PREPROCESS = Preprocess(16, 16, mean=(0.5, 0.4, 0.3), std=(0.5, 0.3, 0.4))


def bundled(source: Path | None, out: Path, *flags: object) -> Bundle:
    """Export a checkpoint with the command, verified on few images, and load the bundle."""
    words = ["bundle", *([source] if source else []), out, "--parity-images", MIN_IMAGES, *flags]
    assert run(Export, [str(word) for word in words]) == 0
    return load_bundle(out)


def fails(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> str:
    """Run the command, check the exit code, and return its one line on stderr."""
    assert run(Export, [str(word) for word in argv]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "pcae-export:" in line]  # not progress
    assert len(lines) == 1
    return lines[0]
