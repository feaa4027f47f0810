"""Write the answers of a run over many images to a file, with progress and a list of failures."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from pcae_serve.errors import PcaeError
from pcae_serve.local.contact_sheet import ContactSheet
from pcae_serve.local.overlay import overlay, overlay_name
from pcae_serve.local.progress import Progress
from pcae_serve.local.results_file import ResultsFile
from pcae_serve.local.row_formats import Row
from pcae_serve.local.run_output import failure, report, row_name, shown
from pcae_serve.local.runner import Answered
from pcae_serve.schemas import Classification

#: A picture of the first overlays, in the folder of overlays.
SHEET = "contact-sheet.png"


class FolderRun:
    """Takes what became of each image."""

    def __init__(
        self,
        results: ResultsFile,
        images: int,
        explain: Path | None,
        strict: bool,
        problems: Mapping[str, str],
    ) -> None:
        """Begin a run.

        images: that are still to be done. explain: folder of overlays, which exists. strict: any
        failure fails the run. problems: names that stand for no image, and why.
        """
        self._results, self._explain, self._strict = results, explain, strict
        self._progress = Progress(images)
        self._failures = [failure(name, why) for name, why in problems.items()]
        self._tiers = Counter[str]()
        self._sheet = ContactSheet()
        self._overlay: Image.Image | None = None  # of the image that is answered next

    def answered(self, file: str, answer: Classification, took_ms: float) -> None:
        """Write an answer."""
        if self._overlay is not None:
            label = answer.predictions[0].label
            self._sheet.add(self._overlay, f"{label} ({answer.tier})", Path(shown(file)).name)
        self._results.write(Row.of(row_name(file), answer))
        self._tiers[answer.tier] += 1
        self._progress.add(note=f"tier {answer.tier}")

    def explained(self, file: str, answered: Answered) -> None:
        """Write the overlay of an image, if there is a folder for it."""
        if self._explain is None:
            return
        path = self._explain / overlay_name(row_name(file))
        make_folder(path.parent)
        try:
            self._overlay = overlay(answered.result, answered.pixels)
            self._overlay.save(path)
        except OSError as error:
            raise PcaeError(f"--explain {path}: {error.strerror or error}") from None

    def failed(self, file: str, why: Exception | str) -> None:
        """Keep a failure for the list at the end."""
        self._failures.append(failure(file, why))
        self._progress.add(failed=True)

    def stopped(self) -> None:
        """Report that the run ends early."""
        self._progress.clear()
        self._write_sheet()
        done, path = sum(self._tiers.values()), self._results.path
        report(f"stopped after {done:,} answers; the same command continues {path}")

    def finish(self) -> bool:
        """Complete the file, list the failures and return whether the run succeeded.

        It failed if no image was answered, now or before; strict: if any image failed.
        """
        self._progress.clear()
        self._results.finish()
        self._write_sheet()
        for line in self._failures:
            report(line)
        before, now = len(self._results.finished), sum(self._tiers.values())
        parts = [f"{now:,} images at {self._progress.rate:,.1f}/s"] if now else ["no new images"]
        if len(self._tiers) > 1:
            parts[0] += f" ({', '.join(f'{n:,} {tier}' for tier, n in self._tiers.items())})"
        parts += [f"{before:,} kept from before"] * (before > 0)
        parts += [f"{len(self._failures):,} failed, listed above"] * bool(self._failures)
        report(f"{self._results.path}: {', '.join(parts)}")
        if self._failures and self._strict:
            return False
        return bool(before or now or not self._failures)

    def _write_sheet(self) -> None:
        """Write a sheet of the overlays of this run, if there are several."""
        if self._explain is not None and len(self._sheet) > 1:
            path = self._explain / SHEET
            try:
                self._sheet.draw().save(path)
            except OSError as error:
                raise PcaeError(f"--explain {path}: {error.strerror or error}") from None


def make_folder(path: Path) -> None:
    """Make a folder of overlays unless it exists. Raise PcaeError with one line."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PcaeError(f"--explain {path}: {error.strerror}") from None
