"""Probes: the service asks a node itself, and reports the outcome to its owner without quoting the node."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from pydantic import ValidationError

from lucid_compute.egress.client import ClientLimits, HttpClient
from lucid_compute.egress.connection import Deadlines
from lucid_compute.gateway.prober import ListedModel, ListedModels, Prober
from tests.api import Api, error_code
from tests.authority import Authority
from tests.egress import LOOPBACK
from tests.fault_answers import BROKEN, Answer, endless_header, redirect, respond
from tests.fault_node import Behaviour, Ending, FaultNode

SECRET = "the node's own words"
_hosts = (f"127.0.{third}.{fourth}" for third in itertools.count(1) for fourth in range(1, 255))


def models(*ids: str, owned_by: object = "vllm") -> Answer:
    """Return a list of models as an inference server does."""
    data = [{"id": id_, "object": "model", "created": 1, "owned_by": owned_by, "note": SECRET} for id_ in ids]
    return respond(json.dumps({"object": "list", "data": data}).encode())


def node_that(answer: Answer | None = None, **behaviour: Any) -> FaultNode:
    """Return a node at an address of its own, because a host is probed once in ten seconds."""
    return FaultNode(Behaviour(answer=answer, **behaviour), host=next(_hosts))


async def register(api: Api, url: str, *declared: str, **metadata: Any) -> str:
    """Register a node at `url` that declares models."""
    node = await api.register(f"node at {url}", {"inferenceUrl": url, **metadata})
    body = {"models": [{"id": id_} for id_ in declared]}
    assert (await api.http.put(f"/compute/models/{node}", json=body)).status_code == 200
    return node


async def probe(api: Api, node: str) -> dict[str, Any]:
    """Probe a node; the response must be 200 and quote nothing of the node."""
    answer = await api.http.post(f"/compute/probe/{node}")
    assert answer.status_code == 200, answer.text
    assert SECRET not in answer.text
    found: dict[str, Any] = answer.json()
    return found


def change_prober(api: Api, limits: ClientLimits | None = None, **changes: Any) -> None:
    """Let the service probe within other limits."""
    prober = api.replica.prober
    client = prober._client if limits is None else HttpClient(LOOPBACK, limits=limits)
    api.app.fastapi.state.parts[Prober] = Prober(prober._upstreams, client, prober._spend, **changes)


async def test_a_node_that_lists_its_models_is_reachable(api: Api) -> None:
    async with node_that(models("llama", "other")) as server:
        node = await register(api, f"{server.url}/v1", "llama", inferenceKey="the node's key")
        await api.beat(node, availableModels=["llama:8b"])
        server.behaviour = Behaviour(answer=models("llama", "llama:8b", "other"))
        found = await probe(api, node)
        connect_ms, answer_ms = found.pop("connectMs"), found.pop("answerMs")
        assert 0 <= connect_ms < 60_000
        assert 0 <= answer_ms < 60_000
        assert found.pop("checkedAt").endswith("Z")
        assert found == {
            "passportId": node,
            "reachable": True,
            "code": "ok",
            "message": "The node answers, and lists every model that it declares or reports.",
            "httpStatus": 200,
            "tls": None,
            "runtime": "vllm",
            "modelsListed": ["llama", "llama:8b"],
            "modelsMissing": [],
        }
        (asked,) = server.requests
        assert (asked.method, asked.path, asked.body) == ("GET", "/v1/models", b"")
        assert asked.headers.keys() == {
            *("host", "accept", "accept-encoding", "user-agent", "x-lucid-replica", "authorization", "content-length")
        }
        assert asked.headers["authorization"] == "Bearer the node's key"


async def test_a_model_that_is_declared_and_not_listed_is_named(api: Api) -> None:
    async with node_that(models("llama:latest", "surprise", owned_by="library")) as server:
        found = await probe(api, await register(api, server.url, "llama", "mistral"))
        assert (found["code"], found["reachable"], found["runtime"]) == ("model_missing", True, "ollama")
        assert (found["modelsListed"], found["modelsMissing"]) == (["llama"], ["mistral"])
        assert "mistral" in found["message"]
        assert "surprise" not in json.dumps(found)


@pytest.mark.parametrize(
    ("owned_by", "runtime"),
    [
        ("vllm", "vllm"),
        ("sglang", "sglang"),
        ("llamacpp", "llama.cpp"),
        ("library", "ollama"),
        ("m", "tgi"),
        ("elsewhere", None),
        (None, None),
        (["vllm"], None),
    ],
)
async def test_the_owner_of_a_listed_model_suggests_the_runtime(api: Api, owned_by: object, runtime: str) -> None:
    async with node_that(models("m", owned_by=owned_by)) as server:
        assert (await probe(api, await register(api, server.url, "m")))["runtime"] == runtime


NOT_A_LIST = [b"", b"no", b"[]", b"{}", b'{"data":{}}', b'{"data":[1]}', b'{"data":[{}]}', b"\xff", b"[" * 100_000]


@pytest.mark.parametrize(
    ("answer", "code", "status"),
    [
        *[(respond(body), "not_json", 200) for body in NOT_A_LIST],
        (respond(b"<html>" + SECRET.encode(), content_type="text/html"), "not_json", 200),
        (redirect("http://169.254.169.254/latest"), "redirected", 302),
        (redirect("http://elsewhere", 308), "redirected", 308),
        (respond(SECRET.encode(), status=401), "auth_refused", 401),
        (respond(status=403), "auth_refused", 403),
        (respond(status=404), "bad_status", 404),
        (respond(status=503), "bad_status", 503),
        (respond(status=204, body=b""), "bad_status", 204),
        (respond(status=508), "routing_loop", 508),
        (respond(b" " * (1 << 20) + b'{"data":[]}'), "bad_response", 200),
        (endless_header(), "bad_response", None),
        *[(Answer(broken), "bad_response", None) for name, broken in BROKEN.items() if name == "garbage"],
    ],
)
async def test_an_answer_that_is_no_list_is_told_apart(api: Api, answer: Answer, code: str, status: int | None) -> None:
    async with node_that(answer) as server:
        found = await probe(api, await register(api, server.url, "m"))
        assert (found["code"], found["httpStatus"], found["reachable"]) == (code, status, False)
        assert (found["modelsListed"], found["modelsMissing"]) == ([], [])
        assert len(server.requests) == 1


def test_a_list_of_a_million_wrong_entries_makes_one_fault() -> None:
    """And to compare a long list with many ids takes one look at each."""
    with pytest.raises(ValidationError) as caught:
        ListedModels.model_validate_json(b'{"data":[' + b"0," * 100_000 + b"0]}")
    assert caught.value.error_count() == 1
    looks = 0

    class Id(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal looks
            looks += 1
            return str.__eq__(self, str(other))

        __hash__ = str.__hash__

    models = ListedModels(data=[ListedModel(id=f"m{number}:latest") for number in range(1000)])
    assert len(models.listed([Id(f"m{number}") for number in range(500, 1500)])) == 500
    assert looks <= 2000


async def test_a_node_that_hangs_up_or_says_nothing_is_told_apart(api: Api) -> None:
    async with node_that(cut_head_after=3, ending=Ending.RESET) as server:
        assert (await probe(api, await register(api, server.url)))["code"] == "connection_lost"
    change_prober(api, deadlines=Deadlines(answer_seconds=0.1, total_seconds=0.1))
    async with node_that(delay_seconds=60) as server:
        found = await probe(api, await register(api, server.url))
        assert (found["code"], found["answerMs"]) == ("first_byte_timeout", None)
        assert found["connectMs"] is not None


async def test_a_node_that_cannot_be_connected_to_is_told_apart(api: Api) -> None:
    async with node_that() as server:
        gone = await register(api, server.url)
    found = await probe(api, gone)
    assert (found["code"], found["connectMs"], found["httpStatus"]) == ("connect_failed", None, None)
    unknown = await register(api, "http://no-such-host.invalid:8080")
    assert (await probe(api, unknown))["code"] == "name_unknown"
    change_prober(api, ClientLimits(connect_seconds=0.1))
    async with FaultNode(accepts=False, host=next(_hosts)) as server:
        silent = await register(api, server.url)
        assert (await probe(api, silent))["code"] == "connect_timed_out"


async def test_an_address_that_the_policy_denies_is_never_connected_to(api: Api) -> None:
    node = await register(api, "http://gpu.example:8080")

    async def to_metadata(_: str, __: int) -> list[str]:
        return ["169.254.169.254"]

    api.replica.prober._client._lookups._resolve = to_metadata
    found = await probe(api, node)
    assert (found["code"], found["connectMs"]) == ("address_refused", None)


async def test_a_node_at_the_services_own_address_is_a_loop(api: Api) -> None:
    node = await register(api, "http://127.0.0.1:8123")
    api.replica.prober._client.own_endpoints.add(("127.0.0.1", 8123))
    assert (await probe(api, node))["code"] == "routing_loop"


async def test_a_probe_that_comes_back_to_a_replica_is_refused_there(api: Api) -> None:
    async with node_that(models()) as server:
        await probe(api, await register(api, server.url))
        hop = {"x-lucid-replica": server.requests[0].headers["x-lucid-replica"]}
    for path in ("/v1/models", "/v1/models/m"):
        assert (await api.with_key(None).http.get(path, headers=hop)).status_code == 508
    assert (await api.http.get("/v1/models", headers={"x-lucid-replica": "another service"})).status_code == 200


async def test_tls_is_verified_and_told_of(authority: Authority, api: Api) -> None:
    host = next(_hosts)
    async with FaultNode(Behaviour(answer=models("m")), tls=authority.issue(f"IP:{host}"), host=host) as server:
        found = await probe(api, await register(api, server.url, "m"))
        assert found["code"] == "ok"
        assert found["tls"]["version"] == "TLSv1.3"
        assert found["tls"]["certificateExpiresAt"].endswith("Z")
    host = next(_hosts)
    async with FaultNode(tls=authority.issue("IP:127.0.0.1"), host=host) as server:
        found = await probe(api, await register(api, server.url))
        assert (found["code"], found["tls"]) == ("tls_failed", None)


async def test_a_host_is_probed_once_in_ten_seconds(api: Api) -> None:
    async with node_that(models()) as server, node_that(models()) as other:
        node = await register(api, server.url)
        at_the_same_host = await register(api, f"{server.url}/elsewhere")
        await probe(api, node)
        for again in (node, at_the_same_host):
            refused = await api.http.post(f"/compute/probe/{again}")
            assert (refused.status_code, error_code(refused)) == (429, "RATE_LIMITED")
            assert 1 <= int(refused.headers["retry-after"]) <= 10
        await probe(api, await register(api, other.url))
        assert len(server.requests) == 1


async def test_more_probes_than_are_allowed_at_a_time_are_put_off(api: Api) -> None:
    change_prober(api, max_probes=0)
    refused = await api.http.post(f"/compute/probe/{await register(api, f'http://{next(_hosts)}:8080')}")
    assert (refused.status_code, error_code(refused)) == (503, "OVERLOADED")


async def test_a_key_bound_to_another_node_may_not_probe(api: Api) -> None:
    acme = await api.new_key("acme", ["compute"])
    node, other = await acme.register("one"), await acme.register("other")
    bound = await api.new_key("acme", ["compute"], passportId=other)
    refused = await bound.http.post(f"/compute/probe/{node}")
    assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN")


async def test_an_ended_node_is_not_probed(api: Api) -> None:
    node = await register(api, f"http://{next(_hosts)}:8080")
    assert (await api.http.post(f"/compute/deregister/{node}")).status_code == 200
    refused = await api.http.post(f"/compute/probe/{node}")
    assert (refused.status_code, error_code(refused)) == (410, "NODE_DEREGISTERED")


async def test_a_provider_reads_whether_its_node_would_be_sent_requests(api: Api) -> None:
    """For each registered model: its place among the nodes that may, or every reason why not; never another's node."""
    provider, other = await api.new_key("acme", ["compute"]), await api.new_key("globex", ["compute"])
    node = await provider.register("acme's", {"runtimes": ["vllm"]})
    await provider.beat(node, availableModels=["m", "unregistered"])
    model = await api.add_model("m")
    told = (await provider.http.get(f"/compute/routing/{node}")).json()
    assert (told["passportId"], told["breakerOpenSince"], told["breakerRetryAt"]) == (node, None, None)
    [one] = told["models"]
    assert (one["model"], one["modelPassportId"], one["place"], one["nodes"]) == ("m", model, 1, 1)
    assert one["waitMs"] is not None
    assert one["reasons"] == []
    await provider.http.post(f"/compute/drain/{node}")
    [one] = (await provider.http.get(f"/compute/routing/{node}")).json()["models"]
    assert (one["place"], one["nodes"], one["waitMs"]) == (None, 0, None)
    assert [reason["code"] for reason in one["reasons"]] == ["DRAINING"]
    assert error_code(await other.http.get(f"/compute/routing/{node}")) == "NODE_NOT_FOUND"
    await provider.http.post(f"/compute/deregister/{node}")
    assert error_code(await provider.http.get(f"/compute/routing/{node}")) == "NODE_DEREGISTERED"
