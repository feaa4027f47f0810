"""pcae-serve classify: classify image files, in this process or on a running server.

names -> ImageFiles -> classify_here or classify_on_server -> Printer, or FolderRun with --out
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_settings import CliUnknownArgs

from pcae_serve import keys_file
from pcae_serve.errors import PcaeError
from pcae_serve.flags import Metavar
from pcae_serve.local.image_files import ImageFiles
from pcae_serve.local.run_output import RunOutput, failure, report, row_name, shown
from pcae_serve.sources.names import ModelName
from pcae_serve.version import install_command

if TYPE_CHECKING:  # the parts that not every call needs are imported when they are used
    from pcae_serve.local.runner import Answered
    from pcae_serve.schemas import Classification

STDIN = "-"
KEY_VARIABLE = "PCAE_API_KEY"
#: The server's variables that are read, too: the bundle and the cache of this machine.
BUNDLE_VARIABLE, CACHE_VARIABLE = "PCAE_BUNDLE", "PCAE_CACHE_DIR"

#: Flags that are used only in this process, only with a server, and only with --out.
HERE_ONLY = ("bundle", "device", "backend", "threads", "total_time", "explain")
SERVER_ONLY = ("api_key_file",)
OUT_ONLY = ("overwrite", "strict", "explain", "total_time")


class Classify(BaseModel):
    """Classify image files, in this process or, with --url, on a running server.

    Print one line for each image, in the given order, or write --out. A folder stands for the
    images in it, and a quoted pattern for the files that match. The exit code is 1 if any image
    failed; with --out, if none was answered, or with --strict if any failed.
    """

    # not CliPositionalArg, which splits a file name at its commas and drops its quotes
    files: Annotated[CliUnknownArgs, Metavar("FILE")] = Field(
        description="image files, folders or patterns; - is standard input"
    )
    url: str | None = Field(
        None, description="address of a server to ask, such as http://127.0.0.1:8000"
    )
    bundle: Annotated[ModelName | None, Metavar("DIR")] = Field(
        None,
        description="folder of the bundle that answers in this process, or its name, as for the"
        f" server; default: that in the variable {BUNDLE_VARIABLE}, else the demo",
    )
    device: Annotated[str, Metavar("auto|cpu|cuda:N")] = Field(
        "auto", pattern=r"^(auto|cpu|cuda:\d+)$", description="device to run on, in this process"
    )
    backend: Literal["auto", "tensorrt", "cuda", "onnxruntime", "simulated"] = Field(
        "auto", description="inference engine, in this process"
    )
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads; 0: one for each usable core. They share a batch, or each has its"
        " own if there are 16 images or more and no --budget-ms",
    )
    tier: str = Field(
        "auto", description="name of a tier, or auto: the most accurate one that meets the budget"
    )
    budget_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="milliseconds until an image's answer is needed, counted from when its file is"
        " read; a request that a busy server refuses is repeated within this time; default: none,"
        " or the server's own budget, without repeats",
    )
    min_tier: str | None = Field(
        None,
        description="cheapest tier that auto may use; if it cannot meet the budget, the image is"
        " refused",
    )
    top_k: int = Field(1, ge=1, description="number of classes or labels to print for each image")
    json_: bool = Field(
        False, alias="json", description="print JSON lines with the server's complete answers"
    )
    api_key_file: Path | None = Field(
        None,
        description="keys file in the server's format (one key a line; empty lines and lines that"
        " begin with # are ignored); its first key is used; default: the key"
        f" in the variable {KEY_VARIABLE}",
    )

    out: Annotated[Path | None, Metavar("FILE")] = Field(
        None,
        description="write a table (.csv, .jsonl or .parquet) instead of printing; run again, the"
        " command continues the file",
    )
    overwrite: bool = Field(False, description="begin a new --out, and delete the old one")
    strict: bool = Field(False, description="with --out: exit 1 if any image failed")
    total_time: Annotated[str | None, Metavar("TIME")] = Field(
        None,
        description="time for all images, such as 90s, 10m or 1h30m: each batch runs on the most"
        " accurate tier that finishes in time",
    )
    explain: Annotated[Path | None, Metavar("DIR")] = Field(
        None,
        description="write a PNG for each image to this folder, with the dropped patches veiled,"
        " and a contact sheet of the first ones",
    )

    @field_validator("total_time")
    @classmethod
    def _is_duration(cls, total_time: str | None) -> str | None:
        if total_time is not None:
            from pcae_serve.local.time_plan import parse_duration

            parse_duration(total_time)
        return total_time

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        given = self.model_fields_set
        wrong = [name for name in (SERVER_ONLY if self.url is None else HERE_ONLY) if name in given]
        if wrong:
            rule = "needs --url" if self.url is None else "cannot be used with --url"
            raise ValueError(f"--{wrong[0].replace('_', '-')} {rule}")
        if self.out is None and (wrong := [name for name in OUT_ONLY if name in given]):
            raise ValueError(f"--{wrong[0].replace('_', '-')} needs --out")
        if self.out is not None and (self.json_ or STDIN in self.files):
            what = "--json" if self.json_ else "standard input (-)"
            raise ValueError(f"{what} cannot be used with --out")
        if self.total_time is not None and (self.budget_ms is not None or self.tier != "auto"):
            other = "--tier" if self.budget_ms is None else "--budget-ms"
            raise ValueError(f"--total-time cannot be used with {other}")
        return self

    @model_validator(mode="after")
    def _names(self) -> Self:
        at = self.files.index("--") if "--" in self.files else len(self.files)
        flags = [name for name in self.files[:at] if name.startswith("-") and name != STDIN]
        if flags:
            raise ValueError(f"unrecognized arguments: {' '.join(flags)}")
        self.files = self.files[:at] + self.files[at + 1 :]
        if not self.files:
            raise ValueError("name the images: pcae-serve classify FILE…")
        if self.files.count(STDIN) > 1:
            raise ValueError("standard input (-) can be read only once")
        return self

    def cli_cmd(self) -> None:
        if self.out is not None:
            from pcae_serve.local.results_file import check_suffix

            check_suffix(self.out)
        images = ImageFiles(self.files, output=self.explain)
        if (line := images.left_out_line()) is not None:
            report(line)
        if not (self._here(images) if self.url is None else self._on_server(images, self.url)):
            raise SystemExit(1)

    def _here(self, images: ImageFiles) -> bool:
        """Classify in this process. Return whether the run succeeded."""
        from pcae_serve.bundle.reader import demo_path, load_bundle
        from pcae_serve.commands.classify_here import classify_here
        from pcae_serve.sources.cache_folder import cache_folder
        from pcae_serve.sources.locate import locate_bundle

        logging.basicConfig(format="pcae-serve: %(message)s")
        root = self.bundle or os.environ.get(BUNDLE_VARIABLE)
        folder = locate_bundle(root, cache_folder(), report) if root else demo_path()
        bundle = load_bundle(folder)
        if bundle.output == "features":
            raise PcaeError(f"{root}: this bundle's models compute features and have no classes")
        bundle.allowed_tiers(self.tier, self.min_tier)  # or raise
        if not root:
            report("the demo bundle answers; --bundle names another one, --url a server")
        with self._output(images, {"bundle": bundle.digest}) as (output, names):
            if names:
                classify_here(self, bundle, names, output)
            return output.finish()

    def _on_server(self, images: ImageFiles, url: str) -> bool:
        """Classify on a server. Return whether the run succeeded."""
        try:
            from pcae_serve.client import AsyncClient
        except ImportError as error:
            if error.name != "httpx2":
                raise
            raise PcaeError(
                f"pcae-serve classify --url needs httpx2: {install_command('client')}"
            ) from None
        from pcae_serve.commands.classify_on_server import classify_on_server

        client = AsyncClient(url, api_key=self._key())
        with self._output(images, {"server": url}) as (output, names):
            classify_on_server(self, client, names, output)
            return output.finish()

    def _key(self) -> str | None:
        if self.api_key_file is None:
            return os.environ.get(KEY_VARIABLE) or None
        try:
            lines = keys_file.read_keys(self.api_key_file)
        except (OSError, ValueError) as error:
            raise PcaeError(
                f"--api-key-file {self.api_key_file}: {getattr(error, 'strerror', None) or error}"
            ) from None
        if not lines:
            raise PcaeError(f"--api-key-file {self.api_key_file}: the file contains no key")
        return lines[0].key

    @contextmanager
    def _output(
        self, images: ImageFiles, answered_by: dict[str, str]
    ) -> Iterator[tuple[RunOutput, Sequence[str]]]:
        """Yield what takes the answers, and the names of the images that are still to be done."""
        if self.out is None:
            printer = _Printer(self._line)
            for name, why in images.problems.items():
                printer.failed(name, why)
            yield printer, images.names
            return
        from pcae_serve.local.folder_run import FolderRun, make_folder
        from pcae_serve.local.results_file import ResultsFile

        settings = answered_by | {
            "tier": self.tier,
            "min_tier": self.min_tier,
            "budget_ms": self.budget_ms,
            "top_k": self.top_k,
            "total_time": self.total_time is not None,
        }
        if self.explain is not None:
            make_folder(self.explain)
        with ResultsFile(self.out, settings, self.top_k, overwrite=self.overwrite) as results:
            once = dict.fromkeys(images.names)
            names = [name for name in once if row_name(name) not in results.finished]
            run = FolderRun(results, len(names), self.explain, self.strict, images.problems)
            try:
                yield run, names
            except BaseException:
                run.stopped()
                raise

    def _line(self, name: str, answer: "Classification", took_ms: float) -> str:
        if self.json_:
            line: dict[str, Any] = {"file": name, "took_ms": round(took_ms, 2)}
            line |= answer.model_dump()
            if answer.budget_ms == inf:  # JSON has no infinity
                line["budget_ms"] = None
            return json.dumps(line)
        classes = ", ".join(f"{p.label} {p.probability:.4f}" for p in answer.predictions)
        late = "" if answer.met_budget and took_ms <= (self.budget_ms or took_ms) else ", late"
        return f"{shown(name)}  {classes}  ({answer.tier}, {took_ms:.0f} ms{late})"


class _Printer:
    """Prints a line for each image: answers on standard output, failures on standard error."""

    def __init__(self, line: Callable[[str, "Classification", float], str]) -> None:
        self._line, self._all_answered = line, True

    def answered(self, file: str, answer: "Classification", took_ms: float) -> None:
        print(self._line(file, answer, took_ms), flush=True)

    def explained(self, file: str, answered: "Answered") -> None:
        """Do nothing: overlays need --out."""

    def failed(self, file: str, why: Exception | str) -> None:
        report(failure(file, why))
        self._all_answered = False

    def finish(self) -> bool:
        return self._all_answered
