"""Where a request's parts end, and what they may take."""

import pytest

from pcae_serve.api import framing
from pcae_serve.api.framing import Framing, Part, check_headers, split_target
from pcae_serve.errors import HeadersTooLarge, MalformedHttp, TooLarge, TooMuchFraming

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n\r\n"


def pieces(framing: Framing, *received: bytes) -> list[bytes]:
    """Return what is taken of each read, until the part ends or the read does."""
    taken, part = [], framing.part
    for data in received:
        start = 0
        while start < len(data) and framing.part in (part, Part.TRAILERS):
            taken.append(framing.take(data, start))
            start += len(taken[-1])
    return taken


def test_a_head_ends_at_the_empty_line_wherever_reads_are_cut() -> None:
    data = HEAD + b"body"
    for cut in range(1, len(HEAD)):
        begun = Framing(10**9)
        assert begun.take(data[:cut], 0) == data[:cut]
        assert begun.take(data, cut) == HEAD[cut:]
    single = Framing(10**9)
    assert b"".join(single.take(HEAD[i : i + 1], 0) for i in range(len(HEAD))) == HEAD


def test_a_body_of_known_length_ends_after_it() -> None:
    known = Framing(10**9)
    known.begin_body([(b"content-length", b"6")])
    assert known.part is Part.LENGTH
    assert known.take(b"abcd", 1) == b"bcd"
    assert known.take(b"efgh", 0) == b"efg"
    none = Framing(10**9)
    none.begin_body([(b"content-length", b"0")])
    assert none.part is Part.HEAD  # the parser completes it at once


@pytest.mark.parametrize("tail", [b"0\r\n\r\n", b"0\r\nX: y\r\nZ: y\r\n\r\n", b"0;a=b\r\n\r\n"])
def test_a_chunked_body_is_never_taken_beyond_its_end(tail: bytes) -> None:
    data = b"3\r\nabc\r\n" + b"4\r\n\r\n\r\n\r\n" + tail
    for cut in range(len(data) + 1):
        chunked = Framing(10**9)
        chunked.begin_body([(b"transfer-encoding", b"chunked")])
        taken = pieces(chunked, data[:cut], data[cut:] + b"GET / HTTP/1.1")
        assert b"".join(taken) == data + b"GET / HTTP/1.1"
        ends = {sum(map(len, taken[: i + 1])) for i in range(len(taken))}
        assert len(data) in ends  # the parser can stop there


def test_a_head_of_too_many_bytes_or_headers_is_refused() -> None:
    large = Framing(10**9)
    with pytest.raises(HeadersTooLarge, match="32,768 bytes"):
        pieces(large, *[b"x" * 1000] * 33)
    many = Framing(10**9)
    for _ in range(framing.MAX_HEADERS):
        many.add_header()
    with pytest.raises(HeadersTooLarge, match="100 headers"):
        many.add_header()


def chunked(size: int, count: int, line: bytes = b"") -> Framing:
    """Return the framing of a body of `count` chunks of `size` bytes."""
    body = Framing(10**9)
    body.begin_body([(b"transfer-encoding", b"chunked")])
    for _ in range(count):
        body.take(b"%x%s\r\n%s\r\n" % (size, line, b"x" * size), 0)
        body.add_payload(size)
        body.check_chunks()
    return body


def test_chunks_may_be_small_or_many_but_not_both() -> None:
    chunked(1, 900)
    chunked(64, 50_000)
    with pytest.raises(TooMuchFraming, match="more than 1,000 chunks"):
        chunked(1, 1500)
    chunked(65_536, 300, b";chunk-signature=" + b"0" * 64)
    with pytest.raises(TooMuchFraming, match="extensions"):
        chunked(100, 1000, b";" + b"x" * 200)


def test_a_payload_of_empty_lines_is_one_chunk() -> None:
    body = Framing(10**9)
    body.begin_body([(b"transfer-encoding", b"chunked")])
    payload = b"\r\n" * 40_000
    assert len(pieces(body, b"%x\r\n%s\r\n0\r\n\r\n" % (len(payload), payload))) == 2
    body.add_payload(len(payload))
    body.check_chunks()


@pytest.mark.parametrize("size", [b"FFFFFFFFFFFFFFFF", b"3E9", b"0000000000000000000003e9"])
def test_a_chunk_that_announces_too_much_is_refused_at_once(size: bytes) -> None:
    for line in (size, size + b";name=value", size + b" "):
        for cut in range(1, len(line)):
            body = Framing(1000)
            body.begin_body([(b"transfer-encoding", b"chunked")])
            with pytest.raises(TooLarge, match="1,000 bytes"):
                pieces(body, line[:cut], line[cut:] + b"\r\nabc")


def test_chunks_announce_together() -> None:
    body = Framing(1000)
    body.begin_body([(b"transfer-encoding", b"chunked")])
    chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
    assert b"".join(pieces(body, chunk, chunk)) == 2 * chunk
    with pytest.raises(TooLarge):
        pieces(body, chunk)


def test_the_line_of_a_chunk_has_a_limit() -> None:
    body = Framing(1000)
    body.begin_body([(b"transfer-encoding", b"chunked")])
    with pytest.raises(TooMuchFraming, match="line of a chunk"):
        pieces(body, *[b"0" * 1000] * 17)


def test_what_is_no_size_is_left_to_the_parser() -> None:
    for line in (b"xyz\r\n", b"\r\n", b"-1\r\n", b"0x10\r\n"):
        body = Framing(1000)
        body.begin_body([(b"transfer-encoding", b"chunked")])
        assert pieces(body, line) == [line]


def test_what_the_parser_accepts_and_the_standard_does_not() -> None:
    host = (b"host", b"localhost:8000")
    check_headers("1.1", [host, (b"transfer-encoding", b"Chunked")])
    check_headers("1.0", [])
    for value in (b"", b"[::1]:80", b"127.0.0.1", b"a-b_c.example.", b"x:"):
        check_headers("1.1", [(b"host", value)])
    for version, headers in (
        ("2.0", [host]),
        ("0.9", []),
        ("1.1", []),
        ("1.1", [host, host]),
        ("1.0", [(b"transfer-encoding", b"chunked")]),
        ("1.1", [host, (b"transfer-encoding", b"gzip, chunked")]),
        *(
            ("1.1", [(b"host", value)])
            for value in (b"a b", b"a/b", b"u@a", b"a:b", b"a, b", b"\xff")
        ),
    ):
        with pytest.raises(MalformedHttp):
            check_headers(version, headers)


def test_targets() -> None:
    assert split_target(b"/a?b#"[:-1]) == (b"/a?b", None)
    assert split_target(b"HTTP://h:1/a?b") == (b"/a?b", b"h:1")
    assert split_target(b"https://h?b") == (b"/?b", b"h")
    assert split_target(b"//h/a") == (b"//h/a", None)
    for target in (
        b"*",
        b"h:443",
        b"/a#b",
        b"/\xff",
        b"ftp://h/",
        b"http:///a",
        b"http://u@h/",
        b"http//h",
    ):
        with pytest.raises(MalformedHttp):
            split_target(target)
