"""List the files that an ONNX graph refers to, without the package `onnx`.

A tensor's values may lie in another file (`TensorProto.external_data`), which ONNX Runtime opens by
itself. Only the fields on the way to these are read, as protobuf's wire format defines them: a
message is a sequence of (field number, wire type, value), and a value with a length is a string or
a message.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pcae_serve.bounded_file import open_regular

#: Fields that hold messages, by message and field number (onnx.proto).
_MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse_tensor"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse_tensor",
        23: "sparse_tensor",
    },
    "sparse_tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}  # fmt: skip
_KEY, _VALUE = 1, 2  # fields of an entry, both strings
_OPERATOR = 4  # field of a node: the operator's name

#: Operators that read files named in their attributes: compiled graphs of ONNX Runtime.
_FILE_OPERATORS = (b"EPContext",)

#: Limits that a graph keeps by far: protobuf's own depth, and the time to read the fields.
MAX_DEPTH = 100
MAX_FIELDS = 3_000_000

_VARINT, _LENGTH = 0, 2  # wire types
_SIZES = {1: 8, 5: 4}  # bytes of the types with a fixed size
_DAMAGED = "it is damaged, or not an ONNX graph"


def external_files(path: Path) -> set[str]:
    """Return the locations of the external data that a graph names, relative to its folder.

    Raise ValueError if the file is not an ONNX graph or has an operator that reads files, and
    OSError if it cannot be read or is not a regular file.
    """
    with open_regular(path) as file:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _locations(content)


def _locations(content: mmap.mmap | bytes) -> set[str]:
    found, fields = set(), 0
    # messages from the outermost to the current one: kind, rest of its fields, strings of an entry
    path: list[tuple[str, Iterator[_Field], dict[int, bytes]]] = [
        ("model", _fields(content, 0, len(content)), {})
    ]
    while path:
        kind, rest, strings = path[-1]
        field = next(rest, None)
        if field is None:
            path.pop()
            if strings.get(_KEY) == b"location":
                found.add(strings.get(_VALUE, b"").decode())  # its error is a ValueError
            continue
        fields += 1
        number, begin, end = field
        inner = _MESSAGES[kind].get(number)
        if fields > MAX_FIELDS or len(path) > MAX_DEPTH:
            raise ValueError("it has too many parts for a graph")
        if inner is not None and end > begin:
            path.append((inner, _fields(content, begin, end), {}))
        elif kind == "entry":
            strings[number] = content[begin:end]
        elif kind == "node" and number == _OPERATOR and content[begin:end] in _FILE_OPERATORS:
            raise ValueError(f"operator {content[begin:end].decode()} reads other files")
    return found


class _Field(NamedTuple):
    """A field of a message: its number, and where its value is if that has a length."""

    number: int
    begin: int
    end: int


def _fields(content: mmap.mmap | bytes, begin: int, end: int) -> Iterator[_Field]:
    """Yield the fields of the message that lies between two positions."""
    at = begin
    while at < end:
        tag, at = _varint(content, at, end)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _LENGTH:
            length, at = _varint(content, at, end)
            if length > end - at:
                raise ValueError(_DAMAGED)
            yield _Field(number, at, at + length)
            at += length
        elif wire_type in _SIZES:
            at += _SIZES[wire_type]
            yield _Field(0, at, at)
        elif wire_type == _VARINT:
            _, at = _varint(content, at, end)
            yield _Field(0, at, at)
        else:
            raise ValueError(_DAMAGED)
    if at > end:
        raise ValueError(_DAMAGED)


def _varint(content: mmap.mmap | bytes, at: int, end: int) -> tuple[int, int]:
    """Return the integer at a position, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at == end:
            break
        byte = content[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError(_DAMAGED)
