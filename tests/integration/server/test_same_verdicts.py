"""Odd JSON has one verdict, whatever entrance it takes and however much else is in the body."""

from __future__ import annotations

import pytest

from lucid_compute.gateway.request_body import PARSED_BYTES
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api
from tests.express_client import FastPath

WHOLE = "a whole pair behind a backslash"
VALID = {
    "a number beyond 64 bits": b"9" * 30,
    "a negative one": b"-" + b"9" * 30,
    "a number that Python converts not": b"9" * 5000,
    "a float beyond every float": b"1e999",
    "a tiny float": b"1e-99999999",
    "minus zero": b"-0",
    "half a surrogate pair": b'"\\ud83d"',
    "its other half": b'"\\udc00x"',
    WHOLE: b'"\\\\\\ud83d\\ude00"',
    "a key of half a pair": b'{"\\ud83d":1}',
    "NUL": b'"\\u0000"',
    "a key of NUL": b'{"\\u0000":1}',
    "a key twice": b'{"x":1,"x":{"y":1,"y":2}}',
    "a few levels": b"[" * 50 + b"]" * 50,
}
TOO_DEEP = {"lists without end": b"[" * 5000 + b"]" * 5000, "objects": b'{"a":' * 5000 + b"1" + b"}" * 5000}
NO_JSON = {
    "NaN": b"NaN",
    "-Infinity": b"-Infinity",
    "a NaN in a list": b"[1,[NaN]]",
    "a control character": b'"\x01"',
    "half a surrogate pair as bytes": b'"\xed\xa0\x80"',
    "no UTF-8": b'"\xff"',
    "an open list": b"[",
    "an open text": b'"',
}
ODD = VALID | TOO_DEEP | NO_JSON
HEARTBEAT = b'{"passportId":"%b","status":"healthy","load":0,"availableModels":[],"queueDepth":0,%b}'
IGNORED_PLACES = {
    "an unknown field": b'"new":@',
    "an unknown field of a GPU": b'"gpus":[{"index":0,"new":@}]',
    "an unknown field of the runtime": b'"runtime":{"name":"vllm","new":@}',
}
ALLOWED = {"a count": {"a tiny float", "minus zero"}, "a GPU's name": {WHOLE}, "a text": {WHOLE}}
READ_PLACES = {"a count": b'"inFlight":@', "a GPU's name": b'"gpus":[{"index":0,"name":@}]', "a text": b'"detail":@'}
# Parsers read these differently, so no node is sent one.
HALVES = {"half a surrogate pair", "its other half", "a key of half a pair"}
CHAT = b'{"model":"none","stream":true,%b}'
PASSED_ON_PLACES = {"an unknown field": b'"new":@', "a message": b'"messages":[{"role":"user","content":@}]'}


@pytest.fixture
def settings() -> Settings:
    """The tests' settings; a node may send any number of heartbeats."""
    return Settings(bootstrap_admin_key=ADMIN_KEY, heartbeat_max_per_second=0)


async def verdict(api: Api, path: str, *bodies: bytes) -> int:
    """Return the status that each of these bodies gets, whole on the fast path, and by ASGI."""
    statuses = {}
    for body in bodies:
        for name, client in (("fast", Api(api.app, api.key, FastPath(api.app))), ("ASGI", api)):
            statuses[name, len(body)] = (await client.http.post(path, content=body)).status_code
    (status,) = {*statuses.values()} if len({*statuses.values()}) == 1 else (statuses,)
    assert isinstance(status, int), statuses
    return status


async def test_what_stands_in_an_unknown_field_of_a_heartbeat_is_ignored(api: Api) -> None:
    """Whatever it is, so that no newer agent goes dark; but it has to be JSON, and no deeper than any body."""
    node = (await api.register()).encode()
    for place, field in IGNORED_PLACES.items():
        for name, odd in ODD.items():
            status = await verdict(api, "/compute/heartbeat", HEARTBEAT % (node, field.replace(b"@", odd)))
            expected = {200} if name in VALID else {422} if name in TOO_DEEP else {400, 422}
            assert status in expected, (place, name)


async def test_what_a_heartbeat_says_is_read_strictly(api: Api) -> None:
    """The same values in fields that are read; beside something ignored, too."""
    node = (await api.register()).encode()
    for place, field in READ_PLACES.items():
        for name, odd in ODD.items():
            if name in ALLOWED[place]:
                continue
            for beside in (b"", b',"new":' + VALID["a number that Python converts not"]):
                body = HEARTBEAT % (node, field.replace(b"@", odd) + beside)
                assert await verdict(api, "/compute/heartbeat", body) in {400, 422}, (place, name, beside[:9])


async def test_a_field_that_the_gateway_does_not_read_is_the_nodes_to_judge(api: Api) -> None:
    """In a body of any size: it gets as far as its model, which is not known here."""
    pad = b',"pad":"%b"' % (b"p" * PARSED_BYTES)
    for place, field in PASSED_ON_PLACES.items():
        for name, odd in ODD.items():
            sent = field.replace(b"@", odd)
            status = await verdict(api, "/v1/chat/completions", CHAT % sent, CHAT % (sent + pad))
            assert status == (404 if name in VALID.keys() - HALVES else 400), (place, name)


async def test_a_field_that_the_gateway_reads_is_judged_alike_in_a_body_of_any_size(api: Api) -> None:
    """The limit of tokens, the options of a stream, and the gateway's own."""
    pad = b',"pad":"%b"' % (b"p" * PARSED_BYTES)
    for field in (b'"max_tokens":@', b'"stream_options":@', b'"user":@', b'"n":@', b'"lucid":@'):
        for odd in ODD.values():
            sent = field.replace(b"@", odd)
            await verdict(api, "/v1/chat/completions", CHAT % sent, CHAT % (sent + pad))
