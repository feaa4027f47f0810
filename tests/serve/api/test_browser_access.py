"""Web pages and names of other sites, on a server that trusts its machine."""

from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from pcae_serve.api.browser_access import browser_access, split_host
from pcae_serve.settings import Settings
from tests.support.apps import problem
from tests.support.faulty_server import serving

OWN = "localhost:8000"
PREFLIGHT = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "x-api-key,x-latency-budget-ms",
}


async def answer(_: Request) -> PlainTextResponse:
    return PlainTextResponse("ok", headers={"X-Request-ID": "1"})


def client(host: str = OWN, *, proxied: bool = False, **settings: Any) -> TestClient:
    """Return a client of an application that answers every path, with the checks around it."""
    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    checked = browser_access(app, Settings(**settings), proxied=proxied)
    return TestClient(checked, base_url=f"http://{host}")


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "localhost:8000", "LOCALHOST:8000", "localhost.", "app.localhost:8000",
        "127.0.0.1", "127.0.0.1:8000", "127.9.9.9", "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]:1",
        "", "localhost:",
    ],
)  # fmt: skip
def test_names_of_this_machine_are_accepted(host: str) -> None:
    assert client().post("/classify", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
        "10.0.0.1:8000", "0.0.0.0:8000", "[fe80::1]:8000", "localhost:8000:80", "evillocalhost",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_names_are_refused_but_not_to_probes(host: str, method: str) -> None:
    headers = {"Host": host}
    document = problem(client().request(method, "/tiers", headers=headers), 403)
    assert document["type"] == "urn:pcae-serve:unknown-host"
    assert host in document["detail"]
    assert client().get("/livez", headers=headers).status_code == 200
    assert client().get("/v2/health/ready", headers=headers).status_code == 200


def test_names_may_be_allowed() -> None:
    allowed = client(allowed_hosts="Vision.Example, 10.0.0.1")
    for host in ("vision.example", "VISION.example:443", "10.0.0.1:8000", OWN):
        assert allowed.get("/tiers", headers={"Host": host}).status_code == 200
    assert allowed.get("/tiers", headers={"Host": "www.vision.example"}).status_code == 403
    anything = client(allowed_hosts="*")
    assert anything.get("/tiers", headers={"Host": "evil.example"}).status_code == 200
    configured = client(host="127.0.0.1:8000", allowed_hosts="a.example")
    assert configured.get("/tiers").status_code == 200


@pytest.mark.parametrize(
    "settings",
    [{"api_keys_file": Path("keys")}, {"host": "0.0.0.0", "open_access": True}],
)
def test_with_keys_or_for_other_machines_names_and_sites_are_not_checked(
    settings: dict[str, Any],
) -> None:
    open_to_all = TestClient(browser_access(_app(), Settings(**settings)), base_url="http://pod")
    page = {"Host": "10.1.2.3:8000", "Origin": "https://evil.example"}
    assert open_to_all.post("/classify", headers=page).status_code == 200
    named = Settings(**settings, allowed_hosts="vision.example")
    checked = TestClient(browser_access(_app(), named), base_url="http://pod")
    assert checked.post("/classify", headers=page).status_code == 403
    assert checked.get("/readyz", headers=page).status_code == 200


def _app() -> Starlette:
    return Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])


def test_behind_another_process_only_what_is_set_is_checked() -> None:
    page = {"Host": "vision.example", "Origin": "https://evil.example"}
    assert client(proxied=True).post("/classify", headers=page).status_code == 200
    named = client(proxied=True, allowed_hosts="vision.example")
    assert named.post("/classify", headers=page).status_code == 200
    assert named.post("/classify", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},  # curl, and every client that is not a browser
        {"Origin": "http://localhost:8000"},
        {"Origin": "http://LOCALHOST:8000"},
        {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://localhost", "Host": "localhost:80"},
        {"Origin": "https://localhost", "Host": "localhost:443"},
        {"Origin": "http://[::1]:8000", "Host": "[::1]:8000"},
        # a proxy that sends a Host of its own: the browser knows where the page came from
        {"Origin": "https://vision.example", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_requests_of_own_pages_and_other_clients_pass(headers: dict[str, str]) -> None:
    assert client().post("/classify", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"},
        {"Origin": "https://localhost:8000", "Host": "localhost:8001"},
        {"Origin": "http://127.0.0.1:8000"},  # a site of its own, whatever it resolves to
        {"Origin": "null"},
        {"Origin": "http://localhost:8000@evil.example"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "nonsense"},
    ],
)
def test_requests_of_other_pages_are_refused(headers: dict[str, str]) -> None:
    document = problem(client().post("/classify", headers=headers), 403)
    assert document["type"] == "urn:pcae-serve:cross-site-request"
    assert "--allowed-origins" in document["detail"]
    assert client().get("/tiers", headers=headers).status_code == 200  # unreadable to the page


def test_a_refusal_under_v2_has_the_protocols_form() -> None:
    refused = client().post("/v2/models/x/infer", headers={"Origin": "https://evil.example"})
    assert (refused.status_code, list(refused.json())) == (403, ["error"])


def test_pages_of_allowed_origins_may_send_and_read() -> None:
    allowed = client(allowed_origins="https://App.example, http://localhost:3000,null")
    for origin in ("https://app.example", "http://localhost:3000", "null"):
        page = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
        response = allowed.post("/classify", headers=page)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin
        assert "X-Request-ID" in response.headers["access-control-expose-headers"]
        assert "Origin" in response.headers["vary"]
    assert allowed.post("/classify", headers={"Origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize("keys", [None, Path("keys")])
def test_a_browser_may_ask_first_without_a_key(keys: Path | None) -> None:
    allowed = client(allowed_origins="https://app.example", api_keys_file=keys)
    private = {"Access-Control-Request-Private-Network": "true"}
    granted = allowed.options("/classify", headers=PREFLIGHT | private)
    assert granted.status_code == 200
    assert granted.headers["access-control-allow-origin"] == "https://app.example"
    assert granted.headers["access-control-allow-headers"] == "x-api-key,x-latency-budget-ms"
    assert "POST" in granted.headers["access-control-allow-methods"]
    refused = allowed.options("/classify", headers=PREFLIGHT | {"Origin": "https://evil.example"})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


def test_every_origin_may_be_allowed() -> None:
    allowed = client(allowed_origins="*")
    response = allowed.post("/classify", headers={"Origin": "https://any.example"})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"


def test_hosts_are_split_from_ports() -> None:
    assert split_host("A.example.:80") == ("a.example", 80)
    assert split_host("[::1]:80") == ("::1", 80)
    assert split_host("[::1]") == ("::1", None)
    assert split_host("a:") == ("a", None)
    assert split_host("") == ("", None)


@pytest.mark.parametrize(
    "settings",
    [
        {"allowed_hosts": "https://a.example"},
        {"allowed_hosts": "a.example:80"},
        {"allowed_origins": "a.example"},
        {"allowed_origins": "https://a.example/"},
        {"allowed_origins": "https://a.example, https://b/c"},
    ],
)
def test_names_and_origins_of_another_form_are_not_taken(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is not an origin|is not a host name"):
        Settings(**settings)  # type: ignore[arg-type]


def test_a_started_server_checks_both(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        assert running.ask().status_code == 200
        page = {"Origin": "https://evil.example"}
        assert problem(running.ask(headers=page), 403)["type"].endswith("cross-site-request")
        name = {"Host": "evil.example"}
        assert problem(running.ask(headers=name), 403)["type"].endswith("unknown-host")
        assert running.ask(headers={"Origin": running.url}).status_code == 200
