"""No command prints a traceback because the reader of its output has left."""

import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.stand_in import reserved_port

SERVE, EXPORT, TRAIN = "pcae_serve", "pcae_export.cli", "pcae_training.cli"


#: Output is buffered, as in a shell: otherwise nothing is left for the flush at exit.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize(
    ("module", "arguments", "stream", "code"),
    [
        (SERVE, ["--help"], "stdout", 1),  # fits the buffer: fails in the flush at exit
        (SERVE, ["--port", "99999"], "stderr", 1),
        pytest.param(SERVE, ["--help"], "stderr", 0, marks=pytest.mark.slow),
        pytest.param(SERVE, ["--port", "99999"], "stdout", 2, marks=pytest.mark.slow),
        (SERVE, ["classify", "none.png"], "stderr", 1),
        pytest.param(SERVE, ["classify", "--help"], "stdout", 1, marks=pytest.mark.slow),
        pytest.param(SERVE, ["simulate", "--help"], "stdout", 1, marks=pytest.mark.slow),
        pytest.param(EXPORT, ["--help"], "stdout", 1, marks=pytest.mark.slow),
        pytest.param(EXPORT, ["verify"], "stderr", 1, marks=pytest.mark.slow),
        pytest.param(TRAIN, ["--help"], "stdout", 1, marks=pytest.mark.slow),
    ],
)
def test_the_reader_leaves_before_the_output(
    module: str, arguments: list[str], stream: str, code: int
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    streams: dict[str, Any] = {"stdout": -1, "stderr": -1} | {stream: writer}
    command = (sys.executable, "-m", module, *arguments)
    done = subprocess.run(command, stdin=-3, timeout=60, env=ENVIRONMENT, **streams)
    os.close(writer)
    told = (done.stdout or b"") + (done.stderr or b"")
    assert b"Traceback" not in told
    assert b"Exception ignored" not in told
    assert done.returncode == code


OUTPUT = """
import sys
from pydantic_settings import BaseSettings
from pcae_serve.command import config, run

class Lines(BaseSettings):
    model_config = config("lines")

    def cli_cmd(self) -> None:
        stream = getattr(sys, sys.argv.pop())
        print("first", file=stream, flush=True)
        sys.stdin.read()  # until the reader has left
        {then}

sys.exit(run(Lines, []))
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "then",
    [
        'print("more", file=stream, flush=True)',  # fails at once
        'print("more", file=stream)',  # fails at exit, for a buffered stream
        'stream.write("x" * 100_000)',  # fails while the buffer is written
        "sys.exit(3)",
    ],
    ids=["print", "flush at exit", "large", "nothing more"],
)
def test_the_reader_leaves_between_two_lines(stream: str, then: str) -> None:
    command = (sys.executable, "-c", OUTPUT.format(then=then), stream)
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, env=ENVIRONMENT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        left, stays = process.stdout, process.stderr
        if stream == "stderr":
            left, stays = stays, left
        assert left.readline() == b"first\n"
        left.close()
        process.stdin.close()
        assert stays.read() == b""
        assert process.wait(timeout=60) == (3 if "exit" in then else 1)


def test_a_broken_pipe_elsewhere_is_still_reported() -> None:
    then = "raise BrokenPipeError('a worker')"
    command = (sys.executable, "-c", OUTPUT.format(then=then), "stdout")
    done = subprocess.run(command, input=b"", capture_output=True, timeout=60)
    assert b"BrokenPipeError: a worker" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_from_the_start(closed: str) -> None:
    shell = f'exec "$@" {closed}'
    with reserved_port() as (_, port):
        url = f"http://127.0.0.1:{port}"
        command = (sys.executable, "-m", SERVE, "classify", "-", "--url", url)
        done = subprocess.run(("sh", "-c", shell, "sh", *command), capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"Traceback" not in done.stdout + done.stderr
    assert done.stdout == b""
    assert (b"cannot connect" in done.stderr) == ("2>&-" not in closed)
