"""Payloads from files, a folder and parquet; nothing is decoded, so any bytes will do."""

from pathlib import Path

import pytest

from pcae_serve.errors import StartError
from pcae_serve.loadtest.payloads import Payloads

KNOWN = ("dark", "bright")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes as folders; the first in order is the second in the server's list."""
    for name in ("bright/1.png", "bright/2.JPG", "dark/3.webp", "dark/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def table(folder: Path, text: str) -> str:
    """A file of labels."""
    (folder / "labels.csv").write_text(text)
    return str(folder / "labels.csv")


def labels(payloads: Payloads) -> list[int]:
    assert payloads.labels is not None
    return [int(label) for label in payloads.labels]


def test_the_default_is_a_sample() -> None:
    images = Payloads.load(None, None, KNOWN)
    assert [body[:4] for body in images.bodies] == [b"\x89PNG"]
    assert images.labels is None


def test_a_folder_is_all_images_below_it_in_order(folder: Path) -> None:
    images = Payloads.load(folder, None, KNOWN)
    assert images.bodies == [b"bright/1.png", b"bright/2.JPG", b"dark/3.webp"]
    assert Payloads.load(folder / "dark" / "3.webp", None, KNOWN).bodies == [b"dark/3.webp"]


def test_folders_are_labels(folder: Path) -> None:
    assert labels(Payloads.load(folder, "folders", KNOWN)) == [1, 1, 0]
    assert labels(Payloads.load(folder / "dark" / "3.webp", "folders", KNOWN)) == [0]


def test_a_file_of_labels_names_images_below_the_folder(folder: Path) -> None:
    lines = "\ufefflabel,file\n0,bright/1.png\nbright,bright/2.JPG\ndark,dark/3.webp\nx,other.png\n"
    assert labels(Payloads.load(folder, table(folder, lines), KNOWN)) == [0, 1, 0]
    one = table(folder, "file,label\n3.webp,bright\n")
    assert labels(Payloads.load(folder / "dark" / "3.webp", one, KNOWN)) == [1]


def test_a_label_that_is_a_number_is_the_servers_name_for_it_first(folder: Path) -> None:
    lines = table(folder, "file,label\n3.webp,1\n")  # digits may be named so, in any order
    assert labels(Payloads.load(folder / "dark" / "3.webp", lines, ("1", "0"))) == [0]


def test_parquet_is_read_as_hugging_face_writes_it(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": b"one", "path": None}, {"bytes": b"two", "path": "2.png"}]
    file = tmp_path / "test.parquet"
    parquet.write_table(pyarrow.table({"image": images, "label": [1, 0]}), file)
    assert Payloads.load(file, None, KNOWN).bodies == [b"one", b"two"]
    assert Payloads.load(file, None, KNOWN).labels is None
    assert labels(Payloads.load(file, "column", KNOWN)) == [1, 0]
    with pytest.raises(StartError, match="--labels column"):
        Payloads.load(file, "folders", KNOWN)
    parquet.write_table(pyarrow.table({"picture": images}), file)
    with pytest.raises(StartError, match=r"cannot read images from .*test\.parquet"):
        Payloads.load(file, None, KNOWN)


@pytest.mark.parametrize(
    ("path", "flag", "words"),
    [
        ("nowhere.png", None, "cannot read the images"),
        ("nowhere.parquet", None, "cannot read images"),
        ("empty", None, r"contains no images \(\.bmp"),
        ("", "column", "needs a parquet file"),
        ("dark", "nowhere.csv", "cannot read the images"),
        ("dark", "unnamed.csv", "no column 'label'"),
        ("dark", "other.csv", "no line for 3.webp"),
        ("grey", "folders", "no label 'grey'; its labels are dark, bright$"),
    ],
)
def test_errors(folder: Path, path: str, flag: str | None, words: str) -> None:
    (folder / "empty").mkdir()
    (folder / "grey").mkdir()
    (folder / "grey" / "4.png").write_text("grey")
    (folder / "unnamed.csv").write_text("file,class\n3.webp,dark\n")
    (folder / "other.csv").write_text("file,label\n4.webp,dark\n")
    flag = str(folder / flag) if flag and flag.endswith(".csv") else flag
    with pytest.raises(StartError, match=words):
        Payloads.load(folder / path, flag, KNOWN)


def test_of_many_labels_a_few_are_named(folder: Path) -> None:
    with pytest.raises(StartError, match=r"its labels are a, b, c, d, e, …$"):
        Payloads.load(folder, "folders", tuple("abcdef"))
