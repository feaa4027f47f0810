"""HEAD and trailing slashes."""

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from pcae_serve.api.health_routes import is_probe
from pcae_serve.api.request_line import NormaliseRequestLine, route_path


@pytest.fixture
def client() -> TestClient:
    app = FastAPI(redirect_slashes=False)
    app.add_middleware(NormaliseRequestLine)

    @app.get("/")
    @app.get("/health/live")
    async def get(request: Request) -> str:
        return request.method

    @app.post("/classify")
    async def post(request: Request) -> int:
        return len(await request.body())

    return TestClient(app)


@pytest.mark.parametrize("path", ["/", "/health/live", "/health/live/"])
def test_head_is_get_without_the_body(client: TestClient, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert get.status_code == head.status_code == 200
    assert get.json() == "GET"
    assert head.content == b""
    assert head.headers == get.headers  # with its content-length


@pytest.mark.parametrize(("path", "status"), [("/classify", 405), ("/none", 404)])
def test_head_of_other_routes(client: TestClient, path: str, status: int) -> None:
    response = client.head(path)
    assert response.status_code == client.get(path).status_code == status
    assert response.content == b""


@pytest.mark.parametrize("path", ["/classify", "/classify/", "/classify//"])
def test_a_trailing_slash_is_ignored(client: TestClient, path: str) -> None:
    response = client.post(path, content=b"12345", follow_redirects=False)
    assert response.json() == 5


@pytest.mark.parametrize(
    ("path", "root_path", "expected"),
    [
        ("/livez", "", "/livez"),
        ("/livez//", "", "/livez"),
        ("/", "", "/"),
        ("/vision/livez/", "/vision", "/livez"),
        ("/livez", "/vision", "/livez"),  # the proxy has removed it
        ("/visions/livez", "/vision", "/visions/livez"),
        ("/vision/", "/vision", "/"),
    ],
)
def test_the_path_that_routes_see(path: str, root_path: str, expected: str) -> None:
    scope = {"path": path, "root_path": root_path}
    assert route_path(scope) == expected
    assert is_probe(scope) == (expected == "/livez")
