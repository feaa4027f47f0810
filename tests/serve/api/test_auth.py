"""API keys: their file, and what the routes ask for."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from pcae_serve.api.app import create_app
from pcae_serve.api.auth import Keys, read_keys
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import StartError
from pcae_serve.observability.logs import RequestId
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings
from tests.support.apps import batch, fail, problem, quick, wait_until
from tests.support.images import image_bytes
from tests.support.inference_requests import INFER, files

ALICE, BOB, ROOT = "alice-0123456789ab", "bob-0123456789abcd", "root-0123456789abc"


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    path.chmod(0o600)
    return path


def test_a_file_holds_one_key_a_line(tmp_path: Path) -> None:
    keys = Keys.read(write(tmp_path / "keys", f"# ours\n\n  {ALICE} \r\n{BOB}\n"))
    assert ALICE in keys
    assert BOB in keys
    for other in ("", "#", "# ours", ALICE[:-1], ALICE + "x", "schlüssel", "\udcff"):
        assert other not in keys
    assert not Keys.read(None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("# none\n", "contains no API key"),
        (f"{ALICE}\nshort-secret\n", "line 2: a key needs at least 16 characters"),
        (f"# ours\n{ALICE}\nshort-secret-ungültig\n", "line 3: a key must be ASCII"),
        (
            f"{ALICE}\n{BOB} short-secret\n",
            "line 2: only name=…, weight=…, rate=… may follow a key",
        ),
    ],
)
def test_an_unusable_keys_file_is_reported_without_its_keys(
    tmp_path: Path, content: str, words: str
) -> None:
    with pytest.raises(StartError, match=words) as raised:
        Keys.read(write(tmp_path / "keys", content))
    assert "short-secret" not in str(raised.value)


def test_a_caller_has_the_same_terms_in_both_files(
    tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    api = write(tmp_path / "keys", f"{ALICE} name=ops rate=5\n")
    admin = write(tmp_path / "admin", f"{ROOT} name=ops rate=9\n")
    with pytest.raises(StartError, match="admin: name=ops has another weight= or rate= in"):
        read_keys(settings(api_keys_file=api, admin_keys_file=admin))
    write(admin, f"{ROOT} name=ops rate=5\n")
    keys, admin_keys = read_keys(settings(api_keys_file=api, admin_keys_file=admin))
    assert keys.callers == admin_keys.callers


def test_a_missing_keys_file(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot read the API keys"):
        Keys.read(tmp_path / "keys")


def test_a_keys_file_that_every_user_can_read_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys", ALICE)
    Keys.read(path)
    assert not caplog.records
    path.chmod(0o644)
    Keys.read(path)
    assert "chmod o-r" in caplog.text
    assert ALICE not in caplog.text


@pytest.fixture
def guarded(small_bundle: Bundle, settings: Callable[..., Settings]) -> Iterator[TestClient]:
    service = Service(settings(), small_bundle, [SimulatedEngine(small_bundle, seconds=quick)])
    keys, admin_keys = Keys(frozenset((ALICE, BOB))), Keys(frozenset((ROOT,)))
    app = create_app(service, fail, keys, admin_keys)
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_until(lambda: service.ready)
        yield client


def test_every_route_but_health_and_documentation_asks_for_a_key(guarded: TestClient) -> None:
    open_to_all = {"/livez", "/readyz", "/docs", "/openapi.json", "/v2/health/live"}
    open_to_all |= {"/v2/health/ready"}
    paths = guarded.get("/openapi.json").json()["paths"]
    assert len(paths) >= 8
    for path, methods in paths.items():
        for method in methods:
            status = guarded.request(method, path).status_code
            if path in open_to_all:
                assert status == 200, path
            else:
                assert status == 401, path


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": ALICE},
        {"X-API-Key": BOB},
        {"Authorization": f"Bearer {BOB}"},
        {"authorization": f"bearer {ROOT}"},
    ],
)
def test_a_known_key_is_accepted(guarded: TestClient, headers: dict[str, str]) -> None:
    assert guarded.post("/classify", content=image_bytes(), headers=headers).status_code == 200


def test_a_missing_key_is_401_and_an_unknown_one_403(guarded: TestClient) -> None:
    without = guarded.post("/classify", content=image_bytes())
    assert "X-API-Key" in problem(without, 401)["detail"]
    assert without.headers["www-authenticate"] == "Bearer"
    wrong = guarded.post("/classify", content=b"x", headers={"X-API-Key": "mallory-123456789"})
    assert "mallory" not in problem(wrong, 403)["detail"]
    basic = guarded.post("/classify", content=b"x", headers={"Authorization": f"Basic {ALICE}"})
    problem(basic, 401)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": ALICE, "Authorization": "Bearer mallory"},
        {"X-API-Key": "", "Authorization": f"Bearer {ALICE}"},
        {"X-API-Key": "mallory", "Authorization": f"Bearer {ALICE}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer"},
        {"Authorization": ALICE},
        {"Authorization": f"BEARER  {ALICE}"},
        {"Authorization": ""},
    ],
)
def test_classify_reads_keys_as_routes_of_fastapi_do(
    guarded: TestClient, headers: dict[str, str]
) -> None:
    status = guarded.post("/classify", content=image_bytes(), headers=headers).status_code
    assert status == guarded.get("/tiers", headers=headers).status_code


def test_admin_routes_accept_only_admin_keys(guarded: TestClient) -> None:
    problem(guarded.post("/admin/reload"), 401)
    problem(guarded.post("/admin/reload", headers={"X-API-Key": ALICE}), 403)
    # this service was given nothing that makes engines
    response = guarded.post("/admin/reload", headers={"X-API-Key": ROOT})
    assert "the old bundle stays in service" in problem(response, 422)["detail"]


def test_admin_routes_are_disabled_without_admin_keys(
    small_bundle: Bundle, settings: Callable[..., Settings]
) -> None:
    service = Service(settings(), small_bundle, [SimulatedEngine(small_bundle, seconds=quick)])
    with TestClient(create_app(service, fail)) as client:
        refused = problem(client.post("/admin/reload", headers={"X-API-Key": ROOT}), 403)
    assert "--admin-keys-file" in refused["detail"]


def test_no_cors_headers_are_sent(guarded: TestClient) -> None:
    """CORS is off: a browser shows no answer to a page from elsewhere, and sends no key for it."""
    page = {"Origin": "https://elsewhere.example", "X-API-Key": ALICE}
    answered = guarded.post("/classify", content=image_bytes(), headers=page)
    before = guarded.options("/classify", headers=page | {"Access-Control-Request-Method": "POST"})
    assert before.status_code == 405
    for response in (answered, before):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("mode", "with_keys", "expected"),
    [
        ("auto", True, "ingest"),
        ("auto", False, "192.0.2.7"),
        ("key", True, "ingest"),
        ("address", True, "192.0.2.7"),
        ("off", True, ""),
        ("off", False, ""),
    ],
)
def test_who_shares_the_server(
    small_bundle: Bundle,
    settings: Callable[..., Settings],
    tmp_path: Path,
    mode: str,
    with_keys: bool,
    expected: str,
) -> None:
    """By the key's name or by address; on every route that takes images."""
    keys = Keys.read(write(tmp_path / "keys", f"{ALICE} name=ingest weight=2\n{BOB}\n"))
    file = tmp_path / "keys" if with_keys else None
    log = tmp_path / "events"
    chosen = settings(callers=mode, api_keys_file=file, event_log=log)
    service = Service(chosen, small_bundle, [SimulatedEngine(small_bundle, seconds=quick)])
    app = create_app(service, fail, keys if with_keys else None)
    headers = {"X-API-Key": ALICE}
    with TestClient(app, client=("192.0.2.7", 1)) as client:
        wait_until(lambda: service.ready)
        for response in (
            client.post("/classify", content=image_bytes(), headers=headers),
            client.post("/classify", files=batch(image_bytes()), headers=headers),
            client.post("/classify/batch", files=batch(image_bytes()), headers=headers),
            client.post(INFER, json=files(image_bytes()), headers=headers),
        ):
            assert response.status_code == 200, response.text
        metrics = client.get("/metrics", headers=headers).text
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0]["weights"] == ({"ingest": 2.0} if with_keys else {})
    callers = [event["request"]["caller"] for [[kind, event], _] in lines[1:] if kind == "Arrived"]
    assert callers == [expected] * 4
    counted = 'pcae_caller_requests_total{caller="ingest",outcome="in_time"} 4.0' in metrics
    assert counted == with_keys
    assert ('pcae_caller_compute_seconds_total{caller="key-2"} 0.0' in metrics) == with_keys
    assert ALICE not in metrics


def test_the_access_log_has_the_name_of_the_key(
    small_bundle: Bundle,
    settings: Callable[..., Settings],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = Keys.read(write(tmp_path / "keys", f"{ALICE} name=ingest rate=0.01\n{BOB}\n"))
    admin_keys = Keys.read(write(tmp_path / "admin", f"\n{ROOT}\n"), "admin-key")
    service = Service(settings(), small_bundle, [SimulatedEngine(small_bundle, seconds=quick)])
    app = RequestId(create_app(service, fail, keys, admin_keys))
    with TestClient(app) as client, caplog.at_level("INFO", "pcae_serve.access"):
        wait_until(lambda: service.ready)

        def classify(key: str) -> Response:
            return client.post("/classify", content=image_bytes(), headers={"X-API-Key": key})

        assert [classify(key).status_code for key in (ALICE, BOB, ROOT)] == [200, 200, 200]
        refused = classify(ALICE)
        client.post("/admin/reload", headers={"X-API-Key": ROOT})
    assert problem(refused, 429)["type"] == "urn:pcae-serve:rate-limited"
    assert 90 < int(refused.headers["retry-after"]) <= 100
    logged = [record.__dict__["fields"] for record in caplog.records if hasattr(record, "fields")]
    callers = ["ingest", "key-2", "admin-key-2", "ingest", "admin-key-2"]
    assert [fields["caller"] for fields in logged] == callers
    assert logged[-2]["outcome"] == "rejected_rate"
    for key in (ALICE, BOB, ROOT):
        assert key not in caplog.text
