import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcae_serve.bundle import graph_files
from pcae_serve.bundle.graph_files import external_files
from pcae_serve.bundle.reader import demo_path
from tests.support.protobuf import field, tensor

GRAPH, NODE, ATTRIBUTE = 7, 1, 5

#: Where a tensor can be in a model, by the fields on the way to it (onnx.proto).
PLACES = {
    "initialiser": (GRAPH, 5),
    "sparse initialiser": (GRAPH, 15, 1),
    "indices of a sparse initialiser": (GRAPH, 15, 2),
    "attribute": (GRAPH, NODE, ATTRIBUTE, 5),
    "list attribute": (GRAPH, NODE, ATTRIBUTE, 10),
    "sparse attribute": (GRAPH, NODE, ATTRIBUTE, 22, 1),
    "sparse list attribute": (GRAPH, NODE, ATTRIBUTE, 23, 1),
    "branch of an If": (GRAPH, NODE, ATTRIBUTE, 6, 5),
    "list of graphs": (GRAPH, NODE, ATTRIBUTE, 11, NODE, ATTRIBUTE, 5),
    "function": (25, 7, ATTRIBUTE, 5),
    "default of a function's attribute": (25, 11, 5),
    "training": (20, 1, 5),
    "training step": (20, 2, NODE, ATTRIBUTE, 5),
}


def write(folder: Path, content: bytes) -> Path:
    file = folder / "graph.onnx"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("place", PLACES)
def test_a_location_is_found_wherever_it_is(tmp_path: Path, place: str) -> None:
    content = tensor("somewhere.bin") + tensor("12", key="offset")
    for number in reversed(PLACES[place]):
        content = field(number, content)
    other = b"\x08\x0a" + field(2, b"producer")  # ir_version, a number, before it
    assert external_files(write(tmp_path, other + content)) == {"somewhere.bin"}
    assert external_files(write(tmp_path, content + other)) == {"somewhere.bin"}


def test_the_demos_graphs_name_their_weights() -> None:
    graphs = list(demo_path().rglob("*.onnx"))
    assert len(graphs) == 5
    for graph in graphs:
        assert external_files(graph) == {"model.safetensors"}


def test_the_last_of_two_locations_counts_as_in_protobuf_and_so_does_the_first(
    tmp_path: Path,
) -> None:
    two = field(GRAPH, field(5, tensor("a.bin") + tensor("b.bin")))
    assert external_files(write(tmp_path, two)) == {"a.bin", "b.bin"}
    merged = field(13, field(1, b"location") + field(2, b"a.bin") + field(2, b"b.bin"))
    assert external_files(write(tmp_path, field(GRAPH, field(5, merged)))) == {"b.bin"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"graph", "not an ONNX graph"),
        (b"\x3a\x05ab", "damaged"),  # longer than the file
        (b"\x3a" + b"\xff" * 12, "damaged"),  # a number without an end
        (b"\x3b", "damaged"),  # a group, which ONNX does not use
        (b"\x09abc", "damaged"),  # eight bytes are announced
        (field(GRAPH, field(NODE, field(4, b"EPContext"))), "reads other files"),
        (field(GRAPH, field(5, tensor("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"))
                            .replace(b"\xc3\xbf", b"\xff\xff"))), "utf-8|codec"),
    ],
)  # fmt: skip
def test_what_is_not_a_graph_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        external_files(write(tmp_path, content))


def test_deep_nesting_and_endless_fields_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tensor("x")
    for _ in range(60):  # graphs in attributes of nodes of graphs
        content = field(NODE, field(ATTRIBUTE, field(6, content)))
    with pytest.raises(ValueError, match="too many parts"):
        external_files(write(tmp_path, field(GRAPH, content)))
    monkeypatch.setattr(graph_files, "MAX_FIELDS", 1000)
    for empty in (b"\x08\x01", field(2, b""), field(NODE, b"")):
        with pytest.raises(ValueError, match="too many parts"):
            external_files(write(tmp_path, field(GRAPH, empty * 2000)))


@given(st.binary(max_size=40))
def test_bytes_of_any_kind_are_read_or_refused(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        graph_files._locations(raw)
