"""pcae-serve classify: send image files to a running server and print one line for each."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator
from pydantic_settings import CliUnknownArgs

from pcae_serve import keys_file
from pcae_serve.errors import PcaeError
from pcae_serve.flags import Metavar
from pcae_serve.version import install_command

if TYPE_CHECKING:  # needs an extra, which serving does not
    from pcae_serve.client import AsyncClient
    from pcae_serve.schemas import Classification

#: Images in flight at the same time.
MAX_IN_FLIGHT = 8
STDIN = "-"
KEY_VARIABLE = "PCAE_API_KEY"


class Classify(BaseModel):
    """Classify image files on a running server.

    Print one line for each image, in the given order. The exit code is 1 if any image failed.
    """

    # not CliPositionalArg, which splits a file name at its commas and drops its quotes
    files: Annotated[CliUnknownArgs, Metavar("FILE")] = Field(
        description="image files; - is standard input"
    )
    url: str = Field("http://127.0.0.1:8000", description="address of the server")
    tier: str = Field(
        "auto", description="name of a tier, or auto: the most accurate one that meets the budget"
    )
    budget_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="milliseconds until an image's answer is needed, counted from when its file is"
        " read; a request that a busy server refuses is repeated within this time; default: the"
        " server's own budget, without repeats",
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
        try:
            from pcae_serve.client import AsyncClient
        except ImportError as error:
            if error.name != "httpx2":
                raise
            raise PcaeError(
                f"pcae-serve classify needs httpx2: {install_command('client')}"
            ) from None
        key = self._key()
        # not in a thread: one that waits for a terminal would outlive Ctrl-C
        stdin = sys.stdin.buffer.read() if STDIN in self.files else b""
        if not asyncio.run(self._classify(AsyncClient(self.url, api_key=key), stdin)):
            raise SystemExit(1)

    def _key(self) -> str | None:
        if self.api_key_file is None:
            return os.environ.get(KEY_VARIABLE) or None
        try:
            lines = keys_file.read_keys(self.api_key_file)
        except (OSError, ValueError) as error:
            raise PcaeError(f"--api-key-file {self.api_key_file}: {_words(error)}") from None
        if not lines:
            raise PcaeError(f"--api-key-file {self.api_key_file}: the file contains no key")
        return lines[0].key

    async def _classify(self, client: "AsyncClient", stdin: bytes) -> bool:
        """Print the result of every file. Return whether all were answered."""
        slots, all_answered = asyncio.Semaphore(MAX_IN_FLIGHT), True
        async with client:
            tasks = [
                asyncio.create_task(self._classify_one(client, slots, name, stdin))
                for name in self.files
            ]
            try:
                for name, task in zip(self.files, tasks, strict=True):
                    result = await task
                    if isinstance(result, Exception):
                        print(f"pcae-serve: {_shown(name)}: {_words(result)}", file=sys.stderr)
                        all_answered = False
                    else:
                        print(self._line(name, *result), flush=True)
            finally:  # interrupted, or the reader left: end the tasks before the client is closed
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return all_answered

    async def _classify_one(
        self, client: "AsyncClient", slots: asyncio.Semaphore, name: str, stdin: bytes
    ) -> "tuple[Classification, float] | Exception":
        """Return the answer and the milliseconds it took, or the error."""
        async with slots:
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
            line: dict[str, Any] = {"file": name, "took_ms": round(took_ms, 2)}
            return json.dumps(line | answer.model_dump())
        classes = ", ".join(f"{p.label} {p.probability:.4f}" for p in answer.predictions)
        late = "" if answer.met_budget and took_ms <= (self.budget_ms or took_ms) else ", late"
        return f"{_shown(name)}  {classes}  ({answer.tier}, {took_ms:.0f} ms{late})"


def _shown(name: str) -> str:
    """Return a file name as printable text, even if its bytes are not valid UTF-8."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _words(error: Exception) -> str:
    if isinstance(error, IsADirectoryError):
        return "is a folder; name the images in it"
    return getattr(error, "strerror", None) or str(error)
