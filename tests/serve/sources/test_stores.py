"""Models at URLs: over HTTP from a real server, and in a store that stands in for S3."""

import hashlib
import importlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pcae_serve.bundle.reader import load_bundle
from pcae_serve.sources.locate import locate_bundle, locate_checkpoint
from pcae_serve.sources.names import FetchError, StoreUrl, local_name, parse_remote
from tests.support.bundles import write_bundle

fsspec = pytest.importorskip("fsspec")
REGISTRY = importlib.import_module("fsspec.registry")  # its name in the package is a mapping
WEIGHTS = b"weights" * 1000


class _Handler(SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []
    status: ClassVar[int] = 200  # of every answer that is another

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.status != 200:
            return self.send_error(self.status)
        if "/cut/model" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", str(len(WEIGHTS)))
            self.end_headers()
            self.wfile.write(WEIGHTS[:10])
            self.close_connection = True
            return None
        return super().do_GET()

    def do_HEAD(self) -> None:
        return self.send_error(self.status) if self.status != 200 else super().do_HEAD()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """The address of a web server, and its folder."""
    (tmp_path / "www" / "vit").mkdir(parents=True)
    for name, content in (
        ("config.json", b"{}"), ("model.safetensors", WEIGHTS), ("pytorch_model.bin", b"pickle"),
        ("code.py", b"raise"),
    ):  # fmt: skip
        (tmp_path / "www" / "vit" / name).write_bytes(content)
    monkeypatch.setattr(_Handler, "asked", [])
    monkeypatch.setenv("PCAE_CACHE_DIR", str(tmp_path / "cache"))
    handler = partial(_Handler, directory=str(tmp_path / "www"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "www"
    server.shutdown()
    server.server_close()
    thread.join(60)


@pytest.fixture
def bucket() -> Iterator[Any]:
    """A store in memory under s3://."""
    memory: Any = importlib.import_module("fsspec.implementations.memory")

    class Bucket(memory.MemoryFileSystem):  # type: ignore[misc]
        protocol = "s3"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("s3://").strip("/")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY._registry, "s3", Bucket)
        yield Bucket()


def locate(name: str, lines: list[str] | None = None) -> Path:
    return locate_checkpoint(name, ([] if lines is None else lines).append)


def refused(name: str) -> str:
    with pytest.raises(FetchError) as error:
        locate(name)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket", StoreUrl("s3://bucket")),
        ("s3://bucket/models/vit/", StoreUrl("s3://bucket/models/vit")),
        ("https://x.org/a/vit.pth", StoreUrl("https://x.org/a", "vit.pth")),
        ("https://x.org/a.onnx?sig=1/2", StoreUrl("https://x.org", "a.onnx", "?sig=1/2")),
        ("gs://b/timm.in21k", StoreUrl("gs://b/timm.in21k")),
    ],
)
def test_urls(text: str, url: StoreUrl) -> None:
    assert parse_remote(text) == url


def test_urls_in_messages_and_names() -> None:
    secret = parse_remote("https://me:word@x.org/a/vit.pth?sig=1")
    assert str(secret) == "https://x.org/a/vit.pth"
    assert local_name("s3://bucket/models/vit/") == "vit"
    assert local_name("https://x.org/a/vit.pth?sig=1") == "vit.pth"
    with pytest.raises(FetchError, match="is a folder, and has a query"):
        parse_remote("https://x.org/a?x=1")


def test_a_folder_over_http(served: tuple[str, Path]) -> None:
    url, www = served
    lines: list[str] = []
    folder = locate(f"{url}/vit", lines)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert lines[0].startswith(f"{url}/vit, SHA-256 ")
    _Handler.asked.clear()
    assert locate(f"{url}/vit/") == folder
    assert "/vit/model.safetensors" not in _Handler.asked  # it has not changed
    (www / "vit" / "model.safetensors").write_bytes(b"other")
    assert (locate(f"{url}/vit") / "model.safetensors").read_bytes() == b"other"


def test_a_file_over_http(served: tuple[str, Path]) -> None:
    url, www = served
    (www / "m.onnx").write_bytes(b"graph")
    lines: list[str] = []
    file = locate(f"{url}/m.onnx?sig=secret", lines)
    assert file.read_bytes() == b"graph"
    assert lines == [f"{url}/m.onnx, SHA-256 {hashlib.sha256(b'graph').hexdigest()}"]
    assert "/m.onnx?sig=secret" in _Handler.asked


def test_what_cannot_be_fetched_over_http(
    served: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, www = served
    assert refused(f"{url}/none") == (
        f"{url}/none: there are no weights, neither model.safetensors nor pytorch_model.bin, whole"
        " or in shards"
    )
    assert refused(f"{url}/none.pth") == f"{url}/none.pth: there is no file none.pth"
    closed = "http://127.0.0.1:9/vit"
    assert refused(closed).startswith(f"{closed}: cannot fetch config.json (Client")
    (www / "cut").mkdir()
    (www / "cut" / "model.safetensors").write_bytes(WEIGHTS)
    message = refused(f"{url}/cut/model.safetensors?sig=secret")
    assert message.startswith(f"{url}/cut/model.safetensors: cannot fetch model.safetensors (")
    assert "secret" not in message
    assert not list((tmp_path / "cache" / "files").iterdir())
    monkeypatch.setattr(_Handler, "status", 403)
    assert refused(f"{url}/vit").endswith("or in shards (access denied)")
    monkeypatch.setattr(_Handler, "status", 503)
    message = refused(f"{url}/vit.pth?sig=secret")
    assert message.startswith(f"{url}/vit.pth: cannot fetch vit.pth (ClientResponseError: 503")
    assert "secret" not in message


def test_a_bundle_in_a_bucket(bucket: Any, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "made")
    bucket.put(f"{bundle}/", "s3://mine/bundles/one/", recursive=True)
    lines: list[str] = []
    found = locate_bundle("s3://mine/bundles/one", tmp_path / "cache", lines.append)
    assert load_bundle(found).digest == load_bundle(bundle).digest == found.name
    assert lines[0].startswith("s3://mine/bundles/one, SHA-256 ")
    with pytest.raises(FetchError, match=r"^s3://mine/bundles: there is no bundle\.json"):
        locate_bundle("s3://mine/bundles", tmp_path / "cache", lines.append)


def test_a_full_disk(bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket.pipe("s3://mine/vit.pth", WEIGHTS)
    monkeypatch.setenv("PCAE_CACHE_DIR", str(tmp_path / "cache"))

    def full(_: str, file: str) -> None:
        raise OSError(28, "No space left on device", file)

    monkeypatch.setattr(type(bucket), "get_file", staticmethod(full))
    message = refused("s3://mine/vit.pth")
    assert message == (
        f"s3://mine/vit.pth: cannot keep it in {tmp_path / 'cache'} (No space left on device)"
    )
    assert not list((tmp_path / "cache" / "files").iterdir())


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("s3://b/vit", "s3fs", "s3fs is not installed: pip install 'fsspec[s3]'"),
        ("gs://b/vit", "gcsfs", "gcsfs is not installed: pip install 'fsspec[gs]'"),
        ("https://x.org/vit", "aiohttp", "aiohttp is not installed: pip install 'fsspec[http]'"),
        ("https://x.org/vit", "fsspec", "fsspec is not installed: pip install '.[hub]'"),
    ],
)
def test_a_missing_extra_is_named(
    name: str, package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.setattr(REGISTRY, "_registry", {})
    assert refused(name) == f"{name}: {message}"
