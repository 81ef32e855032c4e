"""A request's body: everything arrives as it was written, except the model's id, `lucid` and the stream's usage."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lucid_compute.errors import InvalidRequest
from lucid_compute.gateway.endpoints import ENDPOINTS
from lucid_compute.gateway.request_body import InferenceRequest
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy

CHAT = "chat/completions"
ASKS = {"include_usage": True}
# Everything that a client of OpenAI's may send and the gateway has no need to understand.
RICH = b"""{
  "model" : "llama-3-70b",
  "messages": [
    {"role": "system", "content": "Say \\"model\\": \\"x\\", and \\u00e9 \\ud83d\\ude00 \xc3\xa9."},
    {"role": "user", "content": [
      {"type": "text", "text": "What is this? \\\\"},
      {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}]}],
  "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
  "tool_choice": "auto", "parallel_tool_calls": false,
  "response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": true, "schema": {}}},
  "seed": 12345678901234567890123, "temperature": 0.70, "top_p": 1e-0, "logit_bias": {"50256": -100},
  "stop": null, "n": 1, "x_unknown": {"deep": [[[1.10, 1e999, -0.0]]]}, "guided_json": {}
}\r\n"""


def read(body: bytes | dict[str, Any], endpoint: str = CHAT) -> InferenceRequest:
    """The request of a body."""
    return InferenceRequest(ENDPOINTS[endpoint], body if isinstance(body, bytes) else json.dumps(body).encode())


def test_a_body_goes_on_as_the_same_bytes_when_nothing_has_to_change() -> None:
    """The node knows the model under the id that was asked for."""
    request = read(RICH)
    assert request.body_for("llama-3-70b") is RICH
    assert request.text(10) == RICH[:10]
    assert (request.is_stream, request.adds_usage, request.policy) == (False, False, NO_POLICY)


@pytest.mark.parametrize("name", ["m", "org/model:tag", 'a "quoted" \\ name', "ünï😀", "x" * 512])
def test_only_the_models_name_is_replaced_in_the_bytes(name: str) -> None:
    """Every other byte stays, white space and spellings of numbers too."""
    body = read(RICH).body_for(name)
    assert body == RICH.replace(b'"llama-3-70b"', json.dumps(name).encode())
    assert json.loads(body)["model"] == name


def test_each_node_gets_its_own_name() -> None:
    """One request may be tried on three nodes."""
    request = read(RICH)
    assert request.body_for("b") != request.body_for("c")
    assert request.body_for("b") is request.body_for("b")
    assert json.loads(request.body_for("c"))["model"] == "c"


@pytest.mark.parametrize("end", [b"", b" ", b"\n", b"\r\n\t  "])
def test_usage_is_asked_for_at_the_end_of_a_streams_body(end: bytes) -> None:
    """Where the client did not; what it wrote stays."""
    request = read(b'{"model":"a","stream":true,"n":1.0}' + end)
    assert request.adds_usage
    assert request.body_for("a") == b'{"model":"a","stream":true,"n":1.0,"stream_options":{"include_usage":true}}'


@pytest.mark.parametrize(
    ("options", "adds", "expected"),
    [
        (None, True, ASKS),
        ({}, True, ASKS),
        ({"include_usage": False}, True, ASKS),
        ({"include_usage": None, "other": [1]}, True, {**ASKS, "other": [1]}),
        ({"include_usage": True, "other": 1}, False, {"include_usage": True, "other": 1}),
        ("yes", False, "yes"),
        ([], False, []),
        (0, False, 0),
    ],
)
def test_stream_options_of_the_client_are_kept_beside_our_question(options: Any, adds: bool, expected: Any) -> None:
    """Options that are no object are the node's to judge."""
    request = read({"model": "a", "stream": True, "stream_options": options})
    assert request.adds_usage is adds
    assert json.loads(request.body_for("b"))["stream_options"] == expected


@pytest.mark.parametrize("endpoint", ["responses", "embeddings"])
def test_usage_is_not_asked_for_where_it_comes_anyway_or_nothing_streams(endpoint: str) -> None:
    """`/v1/responses` always tells it, and does not know the option."""
    request = read({"model": "a", "stream": True}, endpoint)
    assert not request.adds_usage
    assert "stream_options" not in json.loads(request.body_for("b"))
    assert not read({"model": "a", "stream": False}).adds_usage
    assert not read({"model": "a", "stream": None}).adds_usage


@pytest.mark.parametrize(
    "body",
    [
        b'{"lucid":{"allowRegions":["eu"]},"model":"a","n":1.10}',
        b'{"model":"a","lucid":{"allowRegions":["eu"]},"n":1.10}',
        b'{"model":"a","n":1.10,"lucid":{"allowRegions":["eu"]}}',
        b' {\n "model" : "a" ,\t"n" : 1.10 , "lucid" : {"allowRegions":["eu"]} }\n',
        b'{"model":"a","n":1.10,"l\\u0075cid":{"allowRegions":["eu"]}}',
    ],
)
def test_our_policy_is_taken_out_wherever_it_stands(body: bytes) -> None:
    """The node sees nothing of it; numbers keep their spelling."""
    request = read(body)
    assert request.policy == RoutingPolicy(allow_regions=frozenset({"eu"}))
    assert b"cid" not in request.body_for("b")
    assert b"1.10" in request.body_for("b")
    assert json.loads(request.body_for("b")) == {"model": "b", "n": 1.1}


def test_a_policy_is_read_whole() -> None:
    """Null and absent ask nothing."""
    lucid = {
        "allowRegions": ["eu", "us"],
        "maxPricePer1kTokens": "0.0020",
        "maxLatencyMs": 800,
        "nodeIds": ["x"],
        "routeStale": False,
    }
    expected = RoutingPolicy(frozenset({"eu", "us"}), Decimal("0.002"), 800.0, frozenset({"x"}), route_stale=False)
    assert read({"model": "a", "lucid": lucid}).policy == expected
    assert read({"model": "a", "lucid": None}).policy is NO_POLICY
    assert read({"model": "a", "lucid": {}}).policy == NO_POLICY


# --- keys that look like ours, anywhere

OURS = {"model", "lucid", "stream", "stream_options", "user", "prompt_cache_key"}
KEYS = st.one_of(st.sampled_from(sorted(OURS)), st.text(max_size=6))
NUMBERS = st.one_of(st.integers(), st.integers(2**63, 2**80), st.floats(allow_nan=False, allow_infinity=False))
TEXTS = st.one_of(st.text(), st.sampled_from(['"model"', '"model":"a"', '{"model": "a"}', "\\u006dodel", "\\", '\\"']))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=20,
)
FIELDS = st.dictionaries(st.text(max_size=8).filter(lambda key: key not in OURS), VALUES, max_size=6)
OWN = st.fixed_dictionaries(
    {"model": st.sampled_from(["a", '"model"', "ünï", "\\"])},
    optional={
        "stream": st.sampled_from([True, False, None]),
        "stream_options": st.one_of(VALUES, st.just(ASKS), st.just({})),
        "lucid": st.sampled_from([None, {}, {"routeStale": False}]),
        "user": VALUES,
    },
)

STYLES: list[dict[str, Any]] = [{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A body in any order and style, perhaps with one of our keys written with escapes, wherever it stands."""
    pairs = draw(st.permutations(list({**draw(FIELDS), **draw(OWN)}.items())))
    style: dict[str, Any] = draw(st.sampled_from(STYLES))
    text = json.dumps(dict(pairs), **style) + draw(st.sampled_from(["", "\n", " \r\n"]))
    if escaped := draw(st.sampled_from(["", *sorted(OURS)])):
        text = text.replace(f'"{escaped}":', f'"{escaped[0]}\\u{ord(escaped[1]):04x}{escaped[2:]}":')
    return text.encode()


@settings(max_examples=400, deadline=None)
@given(body=bodies(), target=st.sampled_from(["a", "b", 'quoted "b"', "ünï"]))
@example(body=b'{"mod\\u0065l":"a","m":{"model":"a"}}', target="b")
@example(body=b'{"m":{"model":"a"},"\\u006D\\u006Fdel":"a"}', target="b")
@example(body=b'{"a\\"model":"a","model":"a","x":"\\"model\\":\\"a\\""}', target="b")
def test_nothing_else_changes_whatever_is_in_the_body(body: bytes, target: str) -> None:
    """The three changes, made to the value that the JSON stands for, are all; and nothing is made that is not due."""
    sent = json.loads(body)
    request = read(body)
    expected = {name: value for name, value in {**sent, "model": target}.items() if name != "lucid"}
    if request.adds_usage:
        expected["stream_options"] = {**(sent.get("stream_options") or {}), **ASKS}
    changed = request.body_for(target)
    assert json.loads(changed) == expected
    assert list(json.loads(changed)) == list(expected)
    assert (request.body_for(sent["model"]) is body) is not ("lucid" in sent or request.adds_usage)


def test_a_body_of_megabytes_goes_through_as_it_is() -> None:
    """With images inside, and a key named as ours deep down."""
    image = "data:image/png;base64," + "iVBORw0KGgo\\/" * 400_000
    plain = b'{"messages":[{"content":"%b"}],"model":"a"}' % image.encode()
    assert read(plain).body_for("b") == plain[:-4] + b'"b"}'
    nested = b'{"messages":[{"content":"%b","model":"a"}],"model":"a"}' % image.encode()
    assert read(nested).body_for("b") == nested[:-4] + b'"b"}'


# --- what is refused


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"{'model':'a'}",
        b'{"model":"a",}',
        b'{"model":"a"} x',
        b'{"model":"a"}{"model":"b"}',
        b'{"model":"a","x":"\xff"}',
        b'{"model":"a","x":"\n"}',
        b'\xef\xbb\xbf{"model":"a"}',
        '{"model":"a"}'.encode("utf-16"),
        b'{"model":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_no_json_is_a_400(body: bytes) -> None:
    """Also in a field that the gateway does not read."""
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert caught.value.http_status == 400


def test_half_a_surrogate_pair_is_named() -> None:
    """A client that cuts text between two halves of an emoji is told what to send, and not a parser's word for it."""
    with pytest.raises(InvalidRequest, match="Send whole characters") as refused:
        read(b'{"model":"m","messages":[{"role":"tool","content":"\\ud83d\\u2026)"}]}')
    assert refused.value.http_status == 400


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize(
    "around",
    ['{"model":"a","x":%s}', '{"x":[1,\n %s ],"model":"a"}', '{"model":"a","stream_options":{"x":{"y":%s}}}'],
)
def test_what_is_no_number_in_json_is_a_400_wherever_it_stands(around: str, constant: str) -> None:
    """Python's writer writes such bodies, and a node would fail on them, or not."""
    with pytest.raises(InvalidRequest) as caught:
        read((around % constant).encode())
    assert caught.value.http_status == 400
    assert "finite" in caught.value.details["fields"][0]["message"]


JSON_LIKE = st.text(alphabet='NaInfity-:,[]{}" \\e19')


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.one_of(JSON_LIKE, st.sampled_from([": NaN,", "[Infinity]", '":NaN'])), max_size=4), data=st.data()
)
def test_the_same_words_inside_text_or_as_keys_go_through(texts: list[str], data: st.DataObject) -> None:
    """And one number of those somewhere beside them is found."""
    sound = {"NaN": texts, "Infinity": [1.5, *texts], "model": "a", "m": dict.fromkeys(texts, -1)}
    body = json.dumps(sound).encode()
    assert read(body).body_for("a") is body
    constant = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    key = data.draw(st.sampled_from(["NaN", "Infinity", "m", "new"]))
    with pytest.raises(InvalidRequest):
        read(json.dumps({**sound, key: data.draw(st.sampled_from([constant, [constant], {"x": constant}]))}).encode())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model":"a","x":' + b"[" * 250 + b"]" * 250 + b"}", 400),
        (b'{"model":"a","x":' + b'{"x":' * 250 + b"1" + b"}" * 251, 400),
        (b'{"model":"a","x":"\\ud800"}', 400),
        (b'{"model":"a","x":"\\udc00\\ud800"}', 400),
        (b'{"model":"\\ud800"}', 400),
        (b'{"model":"a","\\ud800":1}', 400),
        (b'{"model":"a","x":"\0"}', 400),
        (b'{"model":"a","x":"\xed\xa0\x80"}', 400),
        (b'{"model":"a","x":1\0}', 400),
        (b'{"model":"a","lucid":{"maxLatencyMs":9223372036854775808}}', 422),
        (b'{"model":"a","lucid":{"maxLatencyMs":1e999}}', 422),
        (b'{"model":"a","lucid":{"maxPricePer1kTokens":9223372036854775808}}', 422),
        (b'{"model":"a","lucid":{"nodeIds":["\\u0000"]}}', 422),
        (b'{"model":9223372036854775808}', 422),
        (b'{"model":"a","stream":9223372036854775808}', 422),
        (b'{"model":"a","lucid":{"nodeIds":["x"],"nodeIds":["y"]}}', 422),
    ],
)
def test_what_two_readers_could_read_differently_is_refused(body: bytes, status: int) -> None:
    """Nesting, halves of pairs and NUL anywhere; what is out of range where the gateway reads it."""
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert caught.value.http_status == status


def test_names_with_a_nul_are_names_that_nobody_has() -> None:
    """They are text like any other, and no model can be registered under one."""
    assert read(b'{"model":"a\\u0000"}').model == "a\0"
    assert read(b'{"model":"a","user":"\\u0000"}').body_for("b") == b'{"model":"b","user":"\\u0000"}'


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b"[]", ""),
        (b"null", ""),
        (b"{}", "model"),
        (b'{"model":null}', "model"),
        (b'{"model":""}', "model"),
        (b'{"model":5}', "model"),
        (b'{"model":["a"]}', "model"),
        (b'{"model":"' + b"x" * 513 + b'"}', "model"),
        (b'{"model":"a","stream":"true"}', "stream"),
        (b'{"model":"a","stream":1}', "stream"),
        (b'{"model":"a","lucid":[]}', "lucid"),
        (b'{"model":"a","lucid":{"allowRegion":["eu"]}}', "lucid.allowRegion"),
        (b'{"model":"a","lucid":{"allowRegions":["eu",1]}}', "lucid.allowRegions.1"),
        (b'{"model":"a","lucid":{"maxPricePer1kTokens":"cheap"}}', "lucid.maxPricePer1kTokens"),
        (b'{"model":"a","lucid":{"maxLatencyMs":-1}}', "lucid.maxLatencyMs"),
        (b'{"model":"a","lucid":{"routeStale":"no"}}', "lucid.routeStale"),
        (b'{"model":"a","model":"a"}', "model"),
        (b'{"model":"a","mod\\u0065l":"b"}', "model"),
        (b'{"m\\u006fdel":"a","mod\\u0065l":"a"}', "model"),
        (b'{"model":"a","lucid":{},"lucid":null}', "lucid"),
        (b'{"model":"a","stream":true,"stream_options":{},"stream_options":{}}', "stream_options"),
        (b'{"model":"a","stream":true,"stream":false}', "stream"),
        (b'{"stream":true,"model":"a","str\\u0065am":false}', "stream"),
        (b'{"stream":true,"model":"a","\\u0073tream":true}', "stream"),
        (b'{"model":"a","user":"u" , "user" :"v"}', "user"),
        (b'{"model":"a","prompt_cache_key":"u","prompt\\u005Fcache_key":"v"}', "prompt_cache_key"),
        (b'{"model":"a","stream_options":{"include_usage":false,"include_usage":true}}', "include_usage"),
    ],
)
def test_what_the_gateway_reads_and_can_not_use_is_a_422_that_says_where(body: bytes, path: str) -> None:
    """Two parsers would read a duplicate key differently."""
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert caught.value.http_status == 422
    assert caught.value.details["fields"][0]["path"] == path


@pytest.mark.parametrize("read_too", [b"", b',"lucid":{}', b',"m":{"model":1,"user":{"stream":1,"stream":2}}'])
def test_a_key_that_only_the_node_reads_is_the_nodes_to_judge(read_too: bytes) -> None:
    """Twice or not, it goes on as it was written, whatever else is in the body."""
    written = b'{"temperature":1,"messages":[{"content":"a","content":"b"}],"temperature":0'
    changed = read(written + b',"model":"a"' + read_too + b"}").body_for("b")
    assert changed == written + b',"model":"b"' + read_too.replace(b',"lucid":{}', b"") + b"}"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"user": "u"}, "u"),
        ({"prompt_cache_key": "p"}, "p"),
        ({"user": "u", "prompt_cache_key": "p"}, "u"),
        ({"user": "", "prompt_cache_key": "p"}, "p"),
        ({"user": {"id": 1}, "prompt_cache_key": 5}, None),
    ],
)
def test_a_session_is_named_by_the_user_or_the_cache_key(fields: dict[str, Any], expected: str | None) -> None:
    """Whatever else stands there is the node's to judge."""
    assert read({"model": "a", **fields}).session == expected
