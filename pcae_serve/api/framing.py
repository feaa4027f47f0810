"""The framing of one HTTP/1.1 request: where its parts end, and how many bytes they may have.

    HEAD        request line and headers, up to an empty line
    LENGTH      a body of Content-Length bytes
    CHUNKED     a body in chunks, up to the line of the last one, whose size is 0
    TRAILERS    what follows it, up to an empty line
    COMPLETE    nothing more belongs to this request

llhttp parses the bytes, but has no limits, and reads on into the next request without reporting
where one ends. So it is fed one part at a time.
"""

import re
from collections.abc import Sequence
from enum import Enum

from pcae_serve.errors import (
    HeadersTooLarge,
    MalformedHttp,
    TargetTooLong,
    TooLarge,
    TooMuchFraming,
)

Headers = Sequence[tuple[bytes, bytes]]

#: Bytes of a request's target. RFC 9110 asks for 8,000; a query of this server has some 200.
MAX_TARGET_BYTES = 8192
#: Bytes of a request line and its headers; nginx allows 32 KiB, too.
MAX_HEAD_BYTES = 32_768
#: Headers and trailers of a request; Apache allows 100, too.
MAX_HEADERS = 100
#: The event loop calls back for each chunk, however small it is. A body may have FREE_CHUNKS chunks
#: of any size, and beyond that one for each MIN_CHUNK_BYTES on the wire.
FREE_CHUNKS = 1000
MIN_CHUNK_BYTES = 64
#: Bytes of chunk sizes, chunk extensions and trailers that a body may have, and in addition one for
#: each PAYLOAD_BYTES_PER_FRAMING_BYTE of payload.
FREE_FRAMING_BYTES = 16_384
PAYLOAD_BYTES_PER_FRAMING_BYTE = 4

#: Chunks that are parsed at a time, before they are counted.
CHUNKS_PER_PIECE = 256

_EMPTY_LINE = b"\r\n\r\n"
_SIZE = re.compile(rb"[0-9A-Fa-f]+")
#: A size that does not fit into 64 bits.
_TOO_MUCH = 1 << 64
#: Host: a name, an IPv4 address or an IPv6 address in brackets, and a port; it may be empty.
_HOST = re.compile(rb"([\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:\d*)?", re.ASCII)
_TARGET_FORMS = "the request's target must be a path, or an http:// or https:// address"


class Part(Enum):
    HEAD = "head"
    LENGTH = "length"
    CHUNKED = "chunked"
    TRAILERS = "trailers"
    COMPLETE = "complete"


class Framing:
    """The progress of one request, and its limits."""

    def __init__(self, max_body_bytes: int) -> None:
        """max_body_bytes: limit of the sizes that chunks announce, together."""
        self._max_body_bytes = max_body_bytes
        self.part = Part.HEAD
        self._headers = 0
        self._head_bytes = 0
        self._remaining_bytes = 0  # of a body with Content-Length
        self._wire_bytes = 0  # of a chunked body, as is all that follows
        self._payload_bytes = 0
        self._chunks = 0
        self._size_line = b""  # the start of a chunk's line
        self._chunk_bytes = 0  # of the current chunk that have not been taken, with its line end
        self._announced_bytes = 0
        self._last = b""  # the last bytes before those that `take` is given

    def take(self, data: bytes, start: int) -> bytes:
        """Return bytes of `data` from `start` on that do not pass the end of the current part.

        Raise HeadersTooLarge if they exceed the limit of a head, and TooLarge or TooMuchFraming if
        a chunk announces too much.
        """
        if self.part is Part.LENGTH:
            piece = data[start : start + self._remaining_bytes]
            self._remaining_bytes -= len(piece)
            return piece
        if self.part is Part.CHUNKED:
            piece = data[start : self._find_chunks_end(data, start)]
            self._wire_bytes += len(piece)
            return piece
        known = self._last + data[start:] if self._last else data
        begin = 0 if self._last else start
        found = known.find(_EMPTY_LINE, begin)
        end = start + found + len(_EMPTY_LINE) - begin - len(self._last) if found >= 0 else None
        piece = data[start:end]
        self._last = (self._last + piece[-3:])[-3:]
        if self.part is Part.HEAD:
            self._head_bytes += len(piece)
            if self._head_bytes > MAX_HEAD_BYTES:
                raise HeadersTooLarge(
                    f"the request's head has more than {MAX_HEAD_BYTES:,} bytes; send fewer headers"
                )
        else:
            self._wire_bytes += len(piece)
        return piece

    def _find_chunks_end(self, data: bytes, start: int) -> int:
        """Return where the chunks in `data` from `start` on end, at most CHUNKS_PER_PIECE of them.

        llhttp accepts chunks of 2^64 bytes, and does not report their size.
        """
        at = start
        for _ in range(CHUNKS_PER_PIECE):
            step = min(self._chunk_bytes, len(data) - at)
            at += step
            self._chunk_bytes -= step
            if self._chunk_bytes or at == len(data):
                return at
            end = data.find(b"\n", at) + 1
            self._size_line += data[at : end or len(data)]
            at = end or len(data)
            if len(self._size_line) > FREE_FRAMING_BYTES:
                raise TooMuchFraming(
                    f"the line of a chunk has more than {FREE_FRAMING_BYTES:,} bytes"
                )
            if not end:
                return at
            digits, self._size_line = self._size_line.partition(b";")[0].strip(), b""
            if not _SIZE.fullmatch(digits):
                return at  # the parser refuses it
            size = int(digits, 16)
            if size >= _TOO_MUCH:
                return at  # the parser refuses it
            self._announced_bytes += size
            if self._announced_bytes > self._max_body_bytes:
                raise TooLarge(
                    f"the body is over the limit of {self._max_body_bytes:,} bytes; send a smaller"
                    " image"
                )
            if size == 0:
                self.part, self._last = Part.TRAILERS, b"\r\n"
                return at
            self._chunk_bytes = size + len(b"\r\n")
        return at

    def begin_body(self, headers: Headers) -> None:
        """Leave the head; `headers` have passed `check_headers` and the parser."""
        fields = dict(headers)
        if b"transfer-encoding" in fields:
            self.part = Part.CHUNKED
        elif length := int(fields.get(b"content-length", b"0")):
            self.part, self._remaining_bytes = Part.LENGTH, length
        self._last = b""

    def complete(self) -> None:
        self.part = Part.COMPLETE

    def add_header(self) -> None:
        """Count a header or a trailer. Raise HeadersTooLarge if there are too many."""
        self._headers += 1
        if self._headers > MAX_HEADERS:
            raise HeadersTooLarge(
                f"the request has more than {MAX_HEADERS} headers; send fewer headers"
            )

    def add_payload(self, size: int) -> None:
        """Count `size` bytes of a body, which are a chunk or a part of one."""
        self._payload_bytes += size
        self._chunks += 1

    def check_chunks(self) -> None:
        """Raise TooMuchFraming if a chunked body costs more than its payload justifies."""
        if not self._wire_bytes:
            return
        framing_bytes = self._wire_bytes - self._payload_bytes
        if self._chunks > FREE_CHUNKS + self._wire_bytes // MIN_CHUNK_BYTES:
            raise TooMuchFraming(
                f"the body has more than {FREE_CHUNKS:,} chunks, of less than {MIN_CHUNK_BYTES}"
                " bytes on average; send larger chunks, or Content-Length"
            )
        if framing_bytes > (
            FREE_FRAMING_BYTES + self._payload_bytes // PAYLOAD_BYTES_PER_FRAMING_BYTE
        ):
            raise TooMuchFraming(
                f"chunk sizes, extensions and trailers take {framing_bytes:,} bytes for"
                f" {self._payload_bytes:,} of the body; send larger chunks, or Content-Length"
            )


def check_target_length(target: bytes) -> None:
    """Raise TargetTooLong above MAX_TARGET_BYTES."""
    if len(target) > MAX_TARGET_BYTES:
        raise TargetTooLong(
            f"the request's path and query have more than {MAX_TARGET_BYTES:,} bytes; shorten them"
        )


def check_headers(version: str, headers: Headers) -> None:
    """Raise MalformedHttp for what llhttp accepts and RFC 9112 does not.

    headers: (name in lower case, value) in order.
    """
    if version not in ("1.0", "1.1"):
        raise MalformedHttp(f"HTTP/{version} is not supported; send HTTP/1.1")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 and (hosts or version == "1.1"):
        raise MalformedHttp(f"the request has {len(hosts)} Host headers; send one")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise MalformedHttp("the Host header is not a host name or address with an optional port")
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and (version == "1.0" or codings != [b"chunked"]):
        raise MalformedHttp(
            "the only Transfer-Encoding that is supported is 'chunked', with HTTP/1.1"
        )


def split_target(target: bytes) -> tuple[bytes, bytes | None]:
    """Return the path with its query, and the host of a target in absolute form, else None.

    Raise MalformedHttp if the target is neither a path nor an http address.
    """
    if not target.isascii():
        raise MalformedHttp("the request's target has bytes beyond ASCII; percent-encode them")
    if b"#" in target:
        raise MalformedHttp("the request's target has a fragment; leave out '#' and what follows")
    if target.startswith(b"/"):
        return target, None
    scheme, separator, rest = target.partition(b"://")
    host, path = re.match(rb"([^/?]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    known = separator and scheme.lower() in (b"http", b"https")
    if not known or not host or not _HOST.fullmatch(host):
        raise MalformedHttp(_TARGET_FORMS)
    return (path if path.startswith(b"/") else b"/" + path), host
