"""What takes the outcomes of a run over images, and how names and errors are written."""

import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # without them, a call that asks a server starts faster
    from pcae_serve.local.runner import Answered
    from pcae_serve.schemas import Classification


class RunOutput(Protocol):
    """Takes what became of each image, in order."""

    def answered(self, file: str, answer: "Classification", took_ms: float) -> None:
        """Take an answer."""
        ...

    def explained(self, file: str, answered: "Answered") -> None:
        """Take what an answer was computed from, before `answered`; only from this process."""
        ...

    def failed(self, file: str, why: Exception | str) -> None:
        """Take an image that has no answer."""
        ...

    def finish(self) -> bool:
        """Complete the output. Return whether the run succeeded."""
        ...


def report(line: str) -> None:
    """Print a line to standard error."""
    print(f"pcae-serve: {line}", file=sys.stderr, flush=True)


def failure(file: str, why: Exception | str) -> str:
    """Return in one line why an image has no answer."""
    text = why if isinstance(why, str) else getattr(why, "strerror", None) or str(why)
    return f"{shown(file)}: {text}"


def shown(name: str) -> str:
    """Return a file name as printable text, even if its bytes are not valid UTF-8."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def row_name(name: str) -> str:
    """Return a file name as UTF-8 text, different for different names."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
