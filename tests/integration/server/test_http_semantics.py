"""What HTTP says besides JSON: methods, bodies that are judged last, encodings, other origins, a sub-path."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from lucid_compute.server.settings import Settings
from lucid_compute.wire import MAX_FAULTS
from tests.api import ADMIN_KEY, Api, error_code, open_api
from tests.express_client import Entrance
from tests.factories import GUIDE_PASSPORT
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import chat_answer

CHAT = "/v1/chat/completions"
ORIGIN = "https://chat.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.fixture
async def api(database_url: str, settings: Settings, entrance: Entrance) -> AsyncIterator[Api]:
    """A replica that is asked at either entrance of the lanes."""
    async with open_api(database_url, settings) as opened:
        yield entrance(opened)


@pytest.fixture
async def open_to_browsers(database_url: str, entrance: Entrance) -> AsyncIterator[Api]:
    """The same, for pages of one origin and below a sub-path."""
    settings = Settings(bootstrap_admin_key=ADMIN_KEY, cors_origins=f"{ORIGIN}/", root_path="/lucid/")
    async with open_api(database_url, settings) as opened:
        yield entrance(opened)


class ReadAnywayError(Exception):
    """A body was read that nobody may read."""


async def unread() -> AsyncIterator[bytes]:
    """A body that must not be read."""
    raise ReadAnywayError
    yield b""  # type: ignore[unreachable]  # makes it a generator


UNREAD: list[tuple[str, str, str | None, int]] = [
    ("POST", "/nothing", None, 404),
    ("POST", "/nothing", ADMIN_KEY, 404),
    ("PUT", "/passports", None, 405),
    ("POST", "/compute", ADMIN_KEY, 405),
    ("POST", "/passports", None, 401),
    ("POST", "/passports", "lk_live_wrong", 401),
    ("PATCH", "/passports/x", None, 401),
    ("POST", "/keys", None, 401),
    ("PUT", "/compute/models/x", None, 401),
    ("POST", "/compute/drain/x", None, 401),
    ("POST", "/match", None, 401),
    ("GET", "/compute/heartbeat", None, 405),
    ("PUT", CHAT, None, 405),
    ("POST", CHAT, None, 401),
    ("POST", "/compute/heartbeat", None, 401),
    ("GET", "/models", None, 200),
]


async def test_route_method_and_key_are_judged_before_a_byte_of_the_body(database_url: str, settings: Settings) -> None:
    """By whoever serves the path."""
    async with open_api(database_url, settings) as api:
        for method, path, key, status in UNREAD:
            answer = await api.with_key(key).http.request(method, path, content=unread())
            assert answer.status_code == status, (method, path, answer.text)


async def test_every_get_answers_head_without_a_body(api: Api) -> None:
    """Status and headers are those of GET, also of a refusal."""
    await api.add_model("m")
    for path in (
        "/healthz",
        "/readyz",
        "/models",
        "/models/m",
        "/compute",
        "/openapi.json",
        "/dashboard",
        "/v1/models",
    ):
        got, head = await api.http.get(path), await api.http.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
        assert int(head.headers["content-length"]) > 0
    for path, status in (("/nothing", 404), ("/models/none", 404), ("/compute/heartbeat", 405), ("/match", 405)):
        head = await api.http.head(path)
        assert (head.status_code, head.content) == (status, b""), path
    assert (await api.with_key(None).http.head("/compute")).status_code == 401
    assert (await api.http.post("/compute")).headers["allow"] == "GET, HEAD"


ENCODERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("encoding", ENCODERS)
async def test_compressed_bodies_are_taken_by_routes_heartbeats_and_inference(api: Api, encoding: str) -> None:
    """As if they had come plain; what a node gets is plain."""
    encode = ENCODERS[encoding]
    headers = {"Content-Encoding": encoding}
    async with FaultNode(Behaviour(answer=chat_answer())) as node:
        fields = {**GUIDE_PASSPORT, "metadata": {**GUIDE_PASSPORT["metadata"], "inferenceUrl": node.url}}
        made = await api.http.post("/passports", content=encode(json.dumps(fields).encode()), headers=headers)
        assert made.status_code == 201, made.text
        await api.add_model("m", "gguf", runtimes=["vllm"])
        beat = {
            "passportId": made.json()["id"],
            "status": "healthy",
            "load": 0.1,
            "queueDepth": 0,
            "availableModels": ["m"],
        }
        answer = await api.http.post("/compute/heartbeat", content=encode(json.dumps(beat).encode()), headers=headers)
        assert answer.status_code == 200, answer.text
        body = b'{"model": "m", "messages": []}'
        answer = await api.http.post(CHAT, content=encode(body), headers=headers)
        assert answer.status_code == 200, answer.text
        assert json.loads(node.requests[-1].body)["messages"] == []
        assert b"content-encoding" not in node.requests[-1].head.lower()


PATHS = ("/passports", "/compute/heartbeat", CHAT)


@pytest.mark.parametrize("path", PATHS)
async def test_other_encodings_are_415_and_say_which_are_taken(api: Api, path: str) -> None:
    """In the shape of the path, and in the header that says so to machines."""
    for encoding in ("zstd", "br", "gzip, deflate"):
        answer = await api.http.post(path, content=b"(\xb5/\xfd", headers={"Content-Encoding": encoding})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
        assert error["details"]["encodings"] == ["gzip", "deflate", "identity"]
        assert answer.headers["accept-encoding"] == "gzip, deflate, identity"
        assert ("type" in error) == path.startswith("/v1")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("body", "word"), [(b"\xef\xbb\xbf{}", "BOM"), ("{}".encode("utf-16"), "UTF-16")])
async def test_a_bom_and_utf_16_are_named(api: Api, path: str, body: bytes, word: str) -> None:
    """The position of an unexpected character helps nobody."""
    answer = await api.http.post(path, content=body)
    assert (answer.status_code, error_code(answer)) == (400, "INVALID_REQUEST")
    assert word in answer.json()["error"]["message"]


@pytest.mark.parametrize(("path", "limit"), [("/passports", 1), ("/compute/heartbeat", 1), (CHAT, 32)])
async def test_a_body_over_the_limit_is_413_compressed_or_not(api: Api, path: str, limit: int) -> None:
    """A megabyte, and 32 below /v1."""
    body = b'{"a": "' + b"x" * limit * 1024 * 1024 + b'"}'
    for content, headers in ((body, {}), (gzip.compress(body, 1), {"Content-Encoding": "gzip"})):
        answer = await api.http.post(path, content=content, headers=headers)
        assert (answer.status_code, error_code(answer)) == (413, "PAYLOAD_TOO_LARGE")
        assert answer.json()["error"]["details"] == {"limitBytes": limit * 1024 * 1024}


async def test_the_room_for_bodies_is_bounded_and_given_back(database_url: str) -> None:
    """What does not fit is 503; a request that ended, in whatever way, holds nothing."""
    settings = Settings(bootstrap_admin_key=ADMIN_KEY, request_bodies_max_mib=1, inference_max_body_mib=1)
    async with open_api(database_url, settings) as api:
        room = api.app._room
        for path in PATHS:
            room.take(1024 * 1024 - 10)
            full = await api.http.post(path, json={"model": "m", "text": "longer than ten"})
            assert (full.status_code, error_code(full)) == (503, "OVERLOADED")
            assert int(full.headers["retry-after"]) >= 1
            room.give_back(1024 * 1024 - 10)
            await api.http.post(path, json={"model": "m", "text": "longer than ten"})
            assert room.held_bytes == 0, path


async def test_at_most_a_hundred_faults_are_listed_and_no_body_comes_back(api: Api) -> None:
    """However many there are, and however long the names that are wrong."""
    node = await api.register()
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/passports", {f"key{number}": 0 for number in range(4000)}),
        ("POST", "/passports", {"k" * 500_000: 0}),
        ("PUT", f"/compute/models/{node}", {"models": [{"id": "m", "x": 0, "y": 1} for _ in range(1000)]}),
        ("PUT", f"/compute/models/{node}", {"models": [0] * 15_000}),
        ("POST", "/compute/heartbeat", {"availableModels": [0] * 15_000}),
        ("POST", CHAT, {"model": "m", "lucid": {f"key{number}": 0 for number in range(4000)}}),
        ("POST", CHAT, {"model": "m" * 500_000}),
    ]
    for method, path, body in requests:
        answer = await api.http.request(method, path, json=body)
        assert answer.status_code == 422, (path, answer.text)
        assert 1 <= len(answer.json()["error"]["details"]["fields"]) <= MAX_FAULTS
        assert len(answer.content) < 20_000


async def test_a_page_of_an_allowed_origin_may_use_the_service(open_to_browsers: Api) -> None:
    """The preflight request is 204; responses and refusals of both lanes and of routes may be read."""
    api = open_to_browsers
    for path in (CHAT, "/passports", "/compute/heartbeat", "/nothing"):
        allowed = await api.with_key(None).http.options(path, headers=PREFLIGHT)
        assert (allowed.status_code, allowed.content) == (204, b"")
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert allowed.headers["access-control-allow-headers"] == "authorization,content-type"
        answer = await api.http.post(path, json={}, headers={"Origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-expose-headers"] == "*"
        assert answer.headers["vary"] == "Origin"
    for origin in ("https://evil.example", f"{ORIGIN}.evil.example", "http://chat.example"):
        refused = await api.http.options(CHAT, headers={**PREFLIGHT, "Origin": origin})
        assert refused.status_code == 405
        answer = await api.http.post(CHAT, json={}, headers={"Origin": origin})
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_no_origin_is_let_in_by_default(api: Api) -> None:
    assert (await api.http.options(CHAT, headers=PREFLIGHT)).status_code == 405
    answer = await api.http.post(CHAT, json={}, headers={"Origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_all_of_it_is_below_a_sub_path(open_to_browsers: Api) -> None:
    """Whether the proxy takes the path off or not; the page and the documents lead to addresses below it."""
    api = open_to_browsers
    for path in ("/healthz", "/models", "/dashboard/nodes", "/v1/models", "/openapi.json"):
        plain, below = await api.http.get(path), await api.http.get(f"/lucid{path}")
        assert (plain.status_code, below.status_code) == (200, 200), path
    for path in (CHAT, "/compute/heartbeat"):
        plain, below = await api.http.post(path, content=b"{"), await api.http.post(f"/lucid{path}", content=b"{")
        assert (plain.status_code, below.status_code) == (400, 400)
        assert ("type" in below.json()["error"]) == path.startswith("/v1")
    assert (await api.http.get("/")).headers["location"] == "/lucid/dashboard"
    assert (await api.http.get("/lucidity/healthz")).status_code == 404
    created = await api.http.post("/lucid/passports", json={"name": "a tool", "type": "tool"})
    assert created.headers["location"] == f"/lucid/passports/{created.json()['id']}"
    page = (await api.http.get("/dashboard")).text
    addresses = [part.split('"')[0] for part in page.split('="/')[1:]]
    assert addresses
    assert all(address.startswith("lucid/") or address == "lucid" for address in addresses)
    asset = next(address for address in addresses if address.endswith("app.js"))
    assert (await api.http.get(f"/{asset}")).status_code == 200
    assert api.app.fastapi.openapi()["servers"] == [{"url": "/lucid"}]  # routes are shared in tests
