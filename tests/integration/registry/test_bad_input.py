"""Hostile input on every route that takes a body, and in paths, queries and headers: always a 4xx of ours."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import pytest

from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, error_code

MEBIBYTE = 1024 * 1024


class BodyRoute(NamedTuple):
    """A route with a body: JSON with a slot, where the slot is, a sound value for it, and a text's slot."""

    method: str
    path: str
    body: str
    slot: str
    sound: str

    def content(self, value: str) -> bytes:
        """The body with `value` in its slot, half surrogates and all."""
        return self.body.replace("@", value).encode("utf-8", "surrogatepass")


ROUTES = [
    BodyRoute(
        "POST",
        "/passports",
        '{"name": "n", "type": "compute", "metadata": {"vram": 8, "inferenceUrl": "http://n", "maxContext": @}}',
        "metadata.maxContext",
        "5",
    ),
    BodyRoute("POST", "/passports", '{"name": "n", "type": "agent", "metadata": {"a": [0, @]}}', "metadata.a.1", "5"),
    BodyRoute("PATCH", "/passports/{node}", '{"metadata": {"maxContext": @}}', "metadata.maxContext", "5"),
    BodyRoute("PUT", "/compute/models/{node}", '{"models": [{"id": "m", "maxTokens": @}]}', "models.0.maxTokens", "5"),
    BodyRoute(
        "POST",
        "/compute/heartbeat",
        '{"passportId": "{node}", "status": "healthy", "load": @, "availableModels": [], "queueDepth": 0}',
        "load",
        "0.5",
    ),
    BodyRoute(
        "POST",
        "/compute/heartbeat",
        '{"passportId": "{node}", "status": "healthy", "load": 0, "availableModels": [], "queueDepth": 0, "new": @}',
        "new",
        "5",
    ),
    BodyRoute(
        "POST",
        "/keys",
        '{"name": "k", "owner": "acme", "scopes": ["compute"], "limits": {"requestsPerMinute": @}}',
        "limits.requestsPerMinute",
        "5",
    ),
    BodyRoute("POST", "/keys/{key}/rotate", '{"now": @}', "now", "false"),
]
UNKEEPABLE = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", str(2**70), str(-(2**70)), "9" * 5000]
IGNORED_SLOT = "new"  # unknown, in a heartbeat
NO_JSON = ["NaN", "Infinity", "-Infinity", "[[NaN]]"]
UNKEEPABLE += ['"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\udc00\\ud800"', '{"x": 1, "x": 1}', "[[NaN]]"]
NOT_JSON = [
    b"{",
    b"",
    b"\x00",
    b"\xff\xfe",
    b'{"a": 1}}',
    b"{'a': 1}",
    b'{"a": 01}',
    b"<xml/>",
    b"a=b",
    b'"\xed\xa0\x80"',
]
NOT_JSON += [b"\xef\xbb\xbf{}", b'{"a": 1,}', b'{"a": "\x01"}', gzip.compress(b"{}"), b'{"a": 1} {"b": 2}']
NOT_OBJECTS = [b"[]", b'"text"', b"5", b"true", b"null", b"[" + b"{}," * 99 + b"{}]"]
STRANGE = [
    "'; DROP TABLE passports; --",
    "%00",
    "a%00b",
    "😀",
    "ключ",
    "../../etc/passwd",
    "..%2F..",
    "a/b",
    "x" * 5000,
]
STRANGE += ["%ff%fe", "%ED%A0%80", "' OR '1'='1", "\\", "%25", "null", "-1", str(2**70), "{}", "*", "\u202e", " "]


@pytest.fixture
def settings() -> Settings:
    """The tests' settings; a node may send any number of heartbeats."""
    return Settings(bootstrap_admin_key=ADMIN_KEY, heartbeat_max_per_second=0)


async def ready_routes(api: Api) -> list[BodyRoute]:
    """The routes with the ids of a node and a key in their places."""
    ids = {"{node}": await api.register(), "{key}": ""}
    made = await api.http.post("/keys", json={"name": "k", "owner": "acme", "scopes": ["compute"]})
    ids["{key}"] = made.json()["id"]
    routes = []
    for route in ROUTES:
        path, body = route.path, route.body
        for word, id_ in ids.items():
            path, body = path.replace(word, id_), body.replace(word, id_)
        routes.append(route._replace(path=path, body=body))
    return routes


async def send(api: Api, route: BodyRoute, content: bytes, **headers: str) -> httpx.Response:
    """Send raw bytes to a route."""
    kind = {"content-type": "application/json"}
    return await api.http.request(route.method, route.path, content=content, headers={**kind, **headers})


def paths_of(answer: httpx.Response, statuses: tuple[int, ...] = (422,)) -> list[str]:
    """The places that a refusal in our shape names."""
    assert answer.status_code in statuses, answer.text[:500]
    error = answer.json()["error"]
    assert (error["code"], error["status"]) == ("INVALID_REQUEST", answer.status_code)
    assert len(answer.text) < 20_000
    return [field["path"] for field in error["details"]["fields"] if field["message"]]


async def test_a_sound_value_is_taken_in_every_slot(api: Api) -> None:
    """Without this, the tests below could pass for the wrong reason."""
    for number, route in enumerate(await ready_routes(api)):
        content = route.content(route.sound).replace(b'"name": "n"', f'"name": "{number}"'.encode())
        answer = await send(api, route, content)
        assert answer.status_code in {200, 201}, answer.text


async def test_what_cannot_be_kept_is_refused_where_it_stands(api: Api) -> None:
    for route in await ready_routes(api):
        for value in UNKEEPABLE:
            answer = await send(api, route, route.content(value))
            if route.slot == IGNORED_SLOT and value not in NO_JSON:
                assert answer.status_code == 200, (value[:20], answer.text)
                continue
            (path,) = paths_of(answer)
            assert path.startswith(route.slot), (route.path, value[:20], path)


async def test_wrong_types_are_refused_where_they_stand(api: Api) -> None:
    for route in await ready_routes(api):
        if route.slot in {IGNORED_SLOT, "metadata.a.1"}:
            continue
        for value in ('"text"', "[]", "{}", "-1", "1.5", '"5"'):
            paths = paths_of(await send(api, route, route.content(value)))
            assert paths == [route.slot], (route.path, value)


async def test_a_key_that_stands_twice_is_refused_at_any_depth(api: Api) -> None:
    for route in await ready_routes(api):
        twice = route.content(route.sound).replace(b"{", b'{"same": 1, "same": 1, ', 1)
        assert paths_of(await send(api, route, twice)) == ["same"]
        deep = await send(api, route, route.content('{"x": {"y": 1, "y": 1}}'))
        key = await send(api, route, route.content('{"\\u0000": 1}'))
        if route.slot == IGNORED_SLOT:
            assert (deep.status_code, key.status_code) == (200, 200)
            continue
        assert paths_of(deep) == [f"{route.slot}.x.y"]
        assert paths_of(key)[0].startswith(route.slot)


async def test_unknown_fields_are_refused_but_in_heartbeats(api: Api) -> None:
    for route in await ready_routes(api):
        answer = await send(api, route, route.content(route.sound).replace(b"{", b'{"sneaky": 1, ', 1))
        if route.path == "/compute/heartbeat":
            assert answer.status_code == 200
        else:
            assert "sneaky" in paths_of(answer)


async def test_json_nested_without_end_is_refused(api: Api) -> None:
    for route in await ready_routes(api):
        for depth in (100, 100_000):
            for opening, closing in (("[", "]"), ('{"a":', "}")):
                paths_of(await send(api, route, route.content(opening * depth + "1" + closing * depth)))
            paths_of(await send(api, route, route.content("[" * depth)), (400, 422))


async def test_what_is_not_json_is_refused_as_such(api: Api) -> None:
    for route in await ready_routes(api):
        for content in NOT_JSON:
            answer = await send(api, route, content)
            if content or not route.path.endswith("/rotate"):
                paths_of(answer, (400,) if content else (400, 422))
        for content in NOT_OBJECTS:
            if content != b"null" or not route.path.endswith("/rotate"):
                paths_of(await send(api, route, content))


async def test_a_content_type_changes_nothing(api: Api) -> None:
    """Every body is read as JSON: one that says otherwise is refused if it is no JSON, or in several parts."""
    for route in await ready_routes(api):
        for kind in (
            "text/plain",
            "application/xml",
            "multipart/form-data; boundary=x",
            "",
            "x" * 500,
            "a/b; charset=é",
        ):
            headers = [(b"content-type", kind.encode())]
            for content in (b"a=b", b"--x\r\n\r\n--x--", b"\xff"):
                answer = await api.http.request(route.method, route.path, content=content, headers=headers)
                if kind.startswith("multipart/"):
                    assert (answer.status_code, error_code(answer)) == (415, "UNSUPPORTED_MEDIA_TYPE")
                else:
                    paths_of(answer, (400,))
            if kind.startswith("multipart/"):
                continue
            bad = await api.http.request(route.method, route.path, content=route.content("NaN"), headers=headers)
            assert paths_of(bad)[0] == route.slot


async def test_a_body_over_a_mebibyte_is_refused_however_it_comes(api: Api) -> None:
    async def trickle() -> Any:
        for _ in range(20):
            yield b" " * 65536

    for route in await ready_routes(api):
        padded = route.content(route.sound) + b" " * MEBIBYTE
        for content in (padded, trickle(), b"[" * (MEBIBYTE + 1)):
            answer = await api.http.request(route.method, route.path, content=content)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
        lying = await send(api, route, b"{}", **{"content-length": "9" * 30})
        assert lying.status_code == 413


def strange_paths() -> Iterator[tuple[str, str]]:
    """Every route that takes an id, with an id that is none."""
    for strange in STRANGE:
        id_ = strange if "%" in strange else quote(strange, safe="/.")
        for method, path in (
            ("GET", "/passports/{}"),
            ("DELETE", "/passports/{}"),
            ("GET", "/compute/health/{}"),
            ("GET", "/compute/models/{}"),
            ("GET", "/compute/events/{}"),
            ("POST", "/compute/drain/{}"),
            ("POST", "/compute/resume/{}"),
            ("POST", "/compute/deregister/{}"),
            ("DELETE", "/keys/{}"),
            ("POST", "/keys/{}/rotate"),
            ("GET", "/models/{}"),
            ("GET", "/models/{}/availability"),
        ):
            yield method, path.format(id_)


async def test_a_strange_id_in_a_path_is_not_found(api: Api) -> None:
    replica = api.replica
    replica.feed.catch_up = no_wait  # type: ignore[method-assign] # nothing of another replica's is looked for here
    for method, path in strange_paths():
        answer = await api.http.request(method, path)
        assert answer.status_code in {404, 405, 422}, (method, path, answer.text[:300])
        assert answer.json()["error"]["code"].endswith(("_NOT_FOUND", "_NOT_ALLOWED", "INVALID_REQUEST"))


async def test_strange_text_in_a_query_is_refused_or_finds_nothing(api: Api) -> None:
    node = await api.register()
    fields = {
        "/passports": "owner search tags type status page sortBy",
        "/compute": "owner search region runtime gpu model status minVram perPage",
        "/models": "owner search runtime tags format available maxVram sortOrder",
        "/keys": "owner page",
        "/audit": "targetId action actor since until perPage",
        f"/compute/events/{node}": "since type page",
    }
    for path, names in fields.items():
        for name in names.split():
            for strange in STRANGE:
                answer = await api.http.get(f"{path}?{name}={strange if '%' in strange else quote(strange)}")
                assert answer.status_code in {200, 422}, (path, name, strange, answer.text[:300])
                if "%00" in strange:
                    assert paths_of(answer)[0].startswith(f"query.{name}")


async def test_strange_text_in_a_body_is_kept_to_the_letter_or_refused(api: Api) -> None:
    for number, text in enumerate(
        ("'; DROP TABLE passports; --", "😀 ключ", "\\", '"', "%00", "\u202e", "a\u0301", "$1")
    ):
        body = {"name": text, "type": "agent", "description": text, "tags": [text], "metadata": {text: text}}
        made = await api.http.post("/passports", json={**body, "owner": text, "version": str(number)})
        assert made.status_code == 201, made.text
        read = (await api.http.get(f"/passports/{made.json()['id']}")).json()
        assert {key: read[key] for key in body} == body
        found = (await api.http.get("/passports", params={"owner": text, "search": text})).json()["passports"]
        assert [passport["id"] for passport in found] == [made.json()["id"]]
    for field in ("name", "version", "description", "owner"):
        body = {"name": "n", "type": "agent", field: "a\x00b"}
        assert paths_of(await api.http.post("/passports", content=json.dumps(body))) == [field]


async def no_wait() -> None:
    """Catch up with nobody."""
