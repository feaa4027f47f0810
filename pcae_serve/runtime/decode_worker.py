"""A decoder process: a program that reads image files from standard input and writes their pixels.

    request   REQUEST: lengths and limits · Preprocess as JSON · image file
    reply     REPLY: kind and length · pixels uint8 [H, W, 3], or text of an error

It imports nothing but the decoding code, limits its own CPU time and memory for each image, and
ends when its input ends. Its parent does not trust it: a reply is plain bytes.
"""

import contextlib
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import RequestError, TooLarge, UnreadableImage, UnsupportedType
from pcae_serve.runtime.decode_call import decode_image

#: Lengths of the JSON and of the image file, maximum pixels, needed bytes, CPU seconds.
REQUEST = struct.Struct("<IQQQd")
#: Kind of the reply and length of what follows.
REPLY = struct.Struct("<IQ")
#: Kinds of replies: pixels, lack of memory, and ERRORS from FIRST_ERROR on.
PIXELS, NO_MEMORY, FIRST_ERROR = range(3)
ERRORS: tuple[type[RequestError], ...] = (UnreadableImage, UnsupportedType, TooLarge)

#: Added to the nice value: small images, which threads decode, go first.
NICENESS = 10
#: Address space for an image: this many times the predicted bytes, and a constant.
SPACE_FACTOR, SPACE_BYTES = 2, 256 << 20


class Request(NamedTuple):
    """An image file to decode, and the limits of doing so."""

    preprocess: Preprocess
    body: bytes
    max_pixels: int
    needed_bytes: int
    cpu_s: float

    def to_bytes(self) -> tuple[bytes, bytes]:
        """Return what is sent before the image file, and the file itself."""
        text = json.dumps(asdict(self.preprocess)).encode()
        head = REQUEST.pack(
            len(text), len(self.body), self.max_pixels, self.needed_bytes, self.cpu_s
        )
        return head + text, self.body

    @classmethod
    def read(cls, file: BinaryIO) -> "Request | None":
        """Read a request; None at the end of the file."""
        head = file.read(REQUEST.size)
        if len(head) < REQUEST.size:
            return None
        text_bytes, body_bytes, max_pixels, needed_bytes, cpu_s = REQUEST.unpack(head)
        preprocess = Preprocess(**json.loads(file.read(text_bytes)))
        return cls(preprocess, file.read(body_bytes), max_pixels, needed_bytes, cpu_s)


def answer(request: Request) -> tuple[int, bytes]:
    """Return kind and content of the reply to a request."""
    try:
        with _limited(request):
            pixels = decode_image(
                request.preprocess, request.body, request.max_pixels, request.needed_bytes
            )
        return PIXELS, pixels.tobytes()
    except MemoryError:
        return NO_MEMORY, b""
    except ERRORS as error:
        kind = next(i for i, each in enumerate(ERRORS) if isinstance(error, each))
        return FIRST_ERROR + kind, str(error).encode()


@contextmanager
def _limited(request: Request) -> Iterator[None]:
    """Limit CPU time and address space for one image. The kernel kills what exceeds the first."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = ceil(used.ru_utime + used.ru_stime + request.cpu_s) + 1
    space = _address_space_bytes()
    space_bytes = space and space + SPACE_FACTOR * request.needed_bytes + SPACE_BYTES
    limits = {resource.RLIMIT_CPU: cpu_s, resource.RLIMIT_AS: space_bytes}
    before = {limit: resource.getrlimit(limit) for limit in limits}
    try:
        for limit, value in limits.items():
            soft, hard = before[limit]
            bounds = [each for each in (soft, value) if each not in (0, resource.RLIM_INFINITY)]
            resource.setrlimit(limit, (min(bounds, default=soft), hard))
        yield
    finally:
        for limit, pair in before.items():
            resource.setrlimit(limit, pair)


def _address_space_bytes() -> int:
    """Return the size of this process's address space, 0 if unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Answer requests until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides when it ends
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    # a file that ends its decoder must not fill the disk
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    while (request := Request.read(requests)) is not None:
        kind, content = answer(request)
        del request
        with contextlib.suppress(BrokenPipeError):
            replies.write(REPLY.pack(kind, len(content)) + content)
            replies.flush()
