"""The SDK against the service's own document: every route has its method, every filter its argument."""

from __future__ import annotations

import inspect
import re
from datetime import UTC, datetime
from typing import Any

from lucid_compute.client import AsyncLucid, Lucid
from lucid_compute.client.call import ApiCall, PagedCall
from lucid_compute.client.resources import Endpoint, PagedEndpoint
from lucid_compute.gateway.endpoints import PATHS, STORED
from tests.api import Api
from tests.factories import heartbeat

# What is for others: Prometheus reads the one, OpenAI's own clients speak to the rest.
FOR_OTHERS = {
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/ID"),
    *(("POST", path) for path in PATHS),
    *((row.method, row.path.replace("{response_id}", "ID")) for row in STORED),
}
SAMPLES: dict[str, Any] = {
    "passport_id": "ID",
    "key_id": "ID",
    "webhook_id": "ID",
    "period_id": "ID",
    "id_or_name": "ID",
    "models": [],
    "passports": [{"name": "a", "type": "tool"}],
    "lines": [{"role": "protocol", "amountUsd": "-1"}],
    "available_models": [],
    "scopes": ["compute"],
    "status": "healthy",
    "type": "tool",
    "tags": ["a"],
    "available": True,
    "force": True,
    "since": datetime(2026, 1, 1, tzinfo=UTC),
    "until": datetime(2026, 1, 1, tzinfo=UTC),
    "min_vram": 1.0,
    "max_vram": 1.0,
    "wait_seconds": 1.0,
    "load": 0.5,
    "queue_depth": 0,
    "heartbeat": heartbeat("ID"),
    "now": True,
    "group_by": ["day"],
    "from_": "2026-01-01",
    "to": "2026-01-02",
}
IN_BODY = {"metadata", "expires_at", "limits", "lucid", "events", "passport_ids", "all_owners"}
PAGING = {"page", "perPage"}
RECORDS = ("/compute/metrics", "/compute/uptime", "/payouts", "/usage")
CSV = "format"  # of records: for spreadsheets


def methods_of(client: type) -> dict[str, Any]:
    """The call that each method describes, by the name it is called by: `compute.health`."""
    lucid = client("http://lucid")
    resources = {"": client, **{name: type(each) for name, each in vars(lucid).items() if name != "transport"}}
    kinds = (Endpoint, PagedEndpoint)
    return {
        f"{resource}.{name}".lstrip("."): method._describe
        for resource, kind in resources.items()
        for name, method in inspect.getmembers_static(kind)
        if isinstance(method, kinds)
    }


def described(describe: Any) -> ApiCall[Any] | PagedCall[Any, Any]:
    """The call or the list, with every argument given but those that only a body has."""
    parameters = inspect.signature(describe).parameters.values()
    named = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD and each.name not in IN_BODY]
    result: ApiCall[Any] | PagedCall[Any, Any] = describe(**{name: SAMPLES.get(name, "x") for name in named})
    return result


async def test_every_route_of_the_service_has_its_method(api: Api) -> None:
    """What is new in the service's document is new in the SDK, or is said to be for others."""
    document = (await api.http.get("/openapi.json")).json()
    routes = {
        (method.upper(), re.sub(r"\{\w+\}", "ID", path)): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    calls = [described(describe) for describe in methods_of(Lucid).values()]
    covered = [((call.method if isinstance(call, ApiCall) else "GET", call.path), call) for call in calls]
    assert set(routes) - FOR_OTHERS == {route for route, _ in covered}
    assert set(routes) >= FOR_OTHERS
    for route in {route for route, _ in covered}:
        declared = {each["name"] for each in routes[route].get("parameters", []) if each["in"] == "query"}
        free = PAGING | ({CSV} if route[1].startswith(RECORDS) else set())
        asked = {name for each, call in covered if each == route for name, _ in call.query}
        assert asked - free == declared - free, route


def test_both_clients_can_do_the_same() -> None:
    """By the same names, from the same descriptions."""
    assert methods_of(Lucid) == methods_of(AsyncLucid)
    assert len(methods_of(Lucid)) > 25


def test_a_method_tells_what_its_call_tells() -> None:
    """`help` shows the arguments and what they mean."""
    health = Lucid("http://lucid").compute.health
    assert list(inspect.signature(health).parameters) == ["passport_id"]
    assert (health.__doc__ or "").startswith("Read a node's health")
    assert (AsyncLucid("http://lucid").compute.health.__doc__ or "") == health.__doc__
