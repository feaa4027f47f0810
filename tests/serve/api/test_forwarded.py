"""Headers of a proxy: used from trusted addresses only."""

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from pcae_serve.api.forwarded import ForwardedHeaders


def prefix_of(client_address: str, trusted: str, *values: str) -> str:
    """Return the root path of a request from that address."""
    app = FastAPI()

    @app.get("/root")
    async def root(request: Request) -> str:
        return str(request.scope.get("root_path", ""))

    client = TestClient(ForwardedHeaders(app, trusted), client=(client_address, 5000))
    headers = [("X-Forwarded-Prefix", value) for value in values]
    answer: str = client.get("/root", headers=headers).json()
    return answer


@pytest.mark.parametrize(
    ("prefix", "root_path"),
    [
        ("/vision", "/vision"),
        ("/vision/", "/vision"),
        ("/a/b-1/c_2", "/a/b-1/c_2"),
        ("", ""),
        ("/", ""),
        ("vision", ""),
        ("//evil.example", ""),  # a browser would ask another host
        ("/..", ""),
        ("/a/../b", ""),
        ("/a?b", ""),
        ("/<script>", ""),
        ("https://evil.example", ""),
    ],
)
def test_a_trusted_proxy_names_its_prefix(prefix: str, root_path: str) -> None:
    assert prefix_of("127.0.0.1", "127.0.0.1", prefix) == root_path


def test_others_do_not() -> None:
    assert prefix_of("10.0.0.7", "127.0.0.1", "/vision") == ""
    assert prefix_of("10.0.0.7", "127.0.0.1,10.0.0.0/8", "/vision") == "/vision"
    assert prefix_of("10.0.0.7", "*", "/vision") == "/vision"
    assert prefix_of("127.0.0.1", "127.0.0.1", "/a", "/b") == ""  # ambiguous


def test_documents_behind_a_prefix() -> None:
    app = FastAPI()
    client = TestClient(ForwardedHeaders(app, "*"))
    headers = {"X-Forwarded-Prefix": "/vision"}
    assert "'/vision/openapi.json'" in client.get("/docs", headers=headers).text
    assert client.get("/openapi.json", headers=headers).json()["servers"] == [{"url": "/vision"}]
    assert "servers" not in client.get("/openapi.json").json()  # nothing is remembered


def test_a_configured_root_path() -> None:
    app = FastAPI()

    @app.get("/livez")
    async def livez() -> str:
        return "alive"

    client = TestClient(ForwardedHeaders(app, "*", "/vision"))
    assert "'/vision/openapi.json'" in client.get("/docs").text
    assert (
        "'/vision/openapi.json'" in client.get("/docs", headers={"X-Forwarded-Prefix": "/a"}).text
    )
    for path in ("/livez", "/vision/livez"):  # a proxy may remove the prefix or keep it
        assert client.get(path).json() == "alive"
