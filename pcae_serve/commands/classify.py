"""pcae-serve classify: image files to a running server, a line for each to standard output.

It knows names of files, lines and exit codes; what is asked, and how often, is up to `client`.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator
from pydantic_settings import CliUnknownArgs

from pcae_serve.errors import PcaeError
from pcae_serve.flags import Metavar
from pcae_serve.version import install_command

if TYPE_CHECKING:  # an extra, and serving does not need it
    from pcae_serve.client import AsyncClient
    from pcae_serve.schemas import Classification

#: Images under way at the same time.
AT_ONCE = 8
STDIN = "-"
KEY_VARIABLE = "PCAE_API_KEY"


class Classify(BaseModel):
    """Classify images on a running server: pcae-serve classify FILE… (- is standard input).

    A line for each, in the order given; exit code 1 if any of them failed.
    """

    # not CliPositionalArg: that would split a name at its commas and drop its quotes
    files: Annotated[CliUnknownArgs, Metavar("FILE")] = Field(
        description="images; - is standard input"
    )
    url: str = Field("http://127.0.0.1:8000", description="of the server")
    tier: str = Field("auto", description="a tier's name, or auto")
    budget_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="how long each image can wait, from reading it on; a busy server is asked again"
        " within it. Left out: as the server says, asked once",
    )
    min_tier: str | None = Field(None, description="refuse rather than go below this tier")
    top_k: int = Field(1, ge=1, description="classes to tell")
    json_: bool = Field(False, alias="json", description="lines of JSON, all that the server says")
    api_key_file: Path | None = Field(
        None, description=f"file with the server's API key; else the variable {KEY_VARIABLE}"
    )

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
            raise ValueError("standard input (-) can be read once only")
        return self

    def cli_cmd(self) -> None:
        try:
            from pcae_serve.client import AsyncClient
        except ImportError as error:
            if error.name != "httpx":
                raise
            raise PcaeError(
                f"pcae-serve classify needs httpx: {install_command('client')}"
            ) from None
        key = self._key()
        # here, and not in a thread: one that waits for a terminal would outlive Ctrl-C
        stdin = sys.stdin.buffer.read() if STDIN in self.files else b""
        try:
            whole = asyncio.run(self._classify(AsyncClient(self.url, api_key=key), stdin))
        except BrokenPipeError:  # who reads has read enough
            whole = False
        if not whole:
            raise SystemExit(1)

    def _key(self) -> str | None:
        if self.api_key_file is None:
            return os.environ.get(KEY_VARIABLE) or None
        try:
            key = self.api_key_file.read_text().strip()
        except (OSError, UnicodeError) as error:
            raise PcaeError(f"--api-key-file {self.api_key_file}: {_words(error)}") from None
        if not key:
            raise PcaeError(f"--api-key-file {self.api_key_file}: there is no key in it")
        return key

    async def _classify(self, client: "AsyncClient", stdin: bytes) -> bool:
        """Print what becomes of every file; whether all were answered."""
        room, whole = asyncio.Semaphore(AT_ONCE), True
        async with client:
            tasks = [
                asyncio.create_task(self._one(client, room, name, stdin)) for name in self.files
            ]
            try:
                for name, task in zip(self.files, tasks, strict=True):
                    result = await task
                    if isinstance(result, Exception):
                        print(f"pcae-serve: {_shown(name)}: {_words(result)}", file=sys.stderr)
                        whole = False
                    else:
                        print(self._line(name, *result), flush=True)
            finally:  # interrupted, or nobody reads: the client closes after the last of them
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return whole

    async def _one(
        self, client: "AsyncClient", room: asyncio.Semaphore, name: str, stdin: bytes
    ) -> "tuple[Classification, float] | Exception":
        """The answer and how many milliseconds it took, or what kept it from coming."""
        async with room:
            start_s = time.perf_counter()
            try:
                answer = await client.classify(
                    stdin if name == STDIN else Path(name),
                    tier=self.tier,
                    budget_ms=self.budget_ms,
                    min_tier=self.min_tier,
                    top_k=self.top_k,
                )
            except (PcaeError, OSError) as error:
                return error
            return answer, (time.perf_counter() - start_s) * 1e3

    def _line(self, name: str, answer: "Classification", took_ms: float) -> str:
        if self.json_:
            told: dict[str, Any] = {"file": name, "took_ms": round(took_ms, 2)}
            return json.dumps(told | answer.model_dump())
        classes = ", ".join(f"{p.label} {p.probability:.4f}" for p in answer.predictions)
        late = "" if answer.met_budget and took_ms <= (self.budget_ms or took_ms) else ", late"
        return f"{_shown(name)}  {classes}  ({answer.tier}, {took_ms:.0f} ms{late})"


def _shown(name: str) -> str:
    """A file's name as text, also where its bytes are none."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _words(error: Exception) -> str:
    if isinstance(error, IsADirectoryError):
        return "a folder: name the images in it"
    return getattr(error, "strerror", None) or str(error)
