"""What operators ask: healthz, readyz, metrics, and the document of the API."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from lucid_compute.compilation import FORM, PYTHON
from lucid_compute.gateway.endpoints import PATHS
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, error_code, open_api
from tests.api_examples import record, shape_of
from tests.other_replicas import add_lease, run_sql

ANSWERED_EVERYWHERE = {"422": "INVALID_REQUEST", "429": "RATE_LIMITED", "503": "DATABASE_UNAVAILABLE"}
ENDED = ("POST /compute/heartbeat", "GET /compute/health/{passport_id}", "GET /compute/models/{passport_id}")
NOT_FOUND = {
    "/webhooks": "WEBHOOK_NOT_FOUND",
    "/payouts/periods/{": "PERIOD_NOT_FOUND",
    "/passports/{passport_id}": "PASSPORT_NOT_FOUND",
    "/compute/": "NODE_NOT_FOUND",
    "/models/{": "MODEL_NOT_FOUND",
    "/keys/{": "KEY_NOT_FOUND",
}


async def test_healthz_says_that_the_process_runs(api: Api) -> None:
    answer = await api.with_key(None).http.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_readyz_says_what_the_replica_holds(api: Api) -> None:
    await api.register()
    await api.add_model("m")
    await add_lease(api)
    answer = await api.with_key(None).http.get("/readyz")
    assert answer.status_code == 200
    ready = answer.json()
    assert (ready["status"], ready["nodes"], ready["models"], ready["replicas"]) == ("ready", 1, 1, 2)
    assert 0 <= ready["feedAgeSeconds"] < 5
    assert (ready["python"], ready["compiled"]) == (PYTHON, FORM.is_compiled)


async def test_the_service_tells_admins_its_replicas_and_its_settings_without_secrets(database_url: str) -> None:
    settings = Settings(
        bootstrap_admin_key=ADMIN_KEY, otlp_endpoint="http://user:word@traces.test/v1", egress_allow="10.0.0.0/8:80-90"
    )
    async with open_api(database_url, settings) as api:
        await add_lease(api)
        answer = await api.http.get("/service")
        service = answer.json()
    assert [replica["answers"] for replica in service["replicas"]] == [True, False]
    assert all(replica["startedAt"] <= replica["seenAt"] for replica in service["replicas"])
    told = {each["variable"]: (each["value"], each["isDefault"]) for each in service["settings"]}
    assert told["LUCID_BOOTSTRAP_ADMIN_KEY"] == ("(hidden)", False)
    assert told["LUCID_OTLP_ENDPOINT"] == ("http://(hidden)@traces.test/v1", False)
    assert told["LUCID_EGRESS_ALLOW"] == ("10.0.0.0/8:80-90", False)
    assert told["LUCID_DATABASE_URL"] == (None, True)
    assert told["LUCID_METRICS_PUBLIC"] == ("false", True)
    assert ADMIN_KEY not in answer.text
    assert "word" not in answer.text.replace("password", "")


async def test_readyz_refuses_a_schema_that_this_version_can_not_serve_on(api: Api) -> None:
    await run_sql(api, "UPDATE alembic_version SET version_num = 'another'")
    assert (await api.http.get("/readyz")).status_code == 200
    await run_sql(api, "UPDATE schema_compatibility SET oldest_revision = 'another'")
    answer = await api.http.get("/readyz")
    assert (answer.status_code, error_code(answer)) == (503, "DATABASE_UNAVAILABLE")
    assert "Install the newer version" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
    assert (await api.http.get("/healthz")).status_code == 200
    await run_sql(api, "UPDATE alembic_version SET version_num = 'registry'")
    assert "lucid db upgrade" in (await api.http.get("/readyz")).json()["error"]["message"]


async def test_readyz_refuses_a_replica_whose_task_ended(api: Api) -> None:
    api.replica.tasks[0].cancel()
    await asyncio.gather(api.replica.tasks[0], return_exceptions=True)
    answer = await api.http.get("/readyz")
    assert answer.status_code == 503
    assert api.replica.tasks[0].get_name() in answer.json()["error"]["message"]


async def test_metrics_count_nodes_heartbeats_and_requests_without_naming_any(api: Api) -> None:
    node = await api.register("a-node-of-mine")
    await api.add_model("a-model-of-mine")
    await api.beat(node)
    await api.beat("nonsense")
    await api.http.get(f"/compute/health/{node}")
    answer = await api.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    for line in (
        'lucid_nodes{status="healthy"} 1.0',
        'lucid_nodes{status="draining"} 0.0',
        'lucid_heartbeats_total{outcome="accepted"} 1.0',
        'lucid_heartbeats_total{outcome="node_not_found"} 1.0',
        'lucid_models{available="false"} 1.0',
        'lucid_http_requests_total{method="GET",route="/compute/health/{passport_id}",status="2xx"} 1.0',
    ):
        assert line in lines
    for secret in (node, "a-node-of-mine", "a-model-of-mine", ADMIN_KEY):
        assert secret not in answer.text


@pytest.mark.parametrize("is_public", [True, False])
async def test_metrics_are_for_admins_unless_the_operator_says_otherwise(database_url: str, is_public: bool) -> None:
    async with open_api(database_url, Settings(bootstrap_admin_key=ADMIN_KEY, metrics_public=is_public)) as api:
        compute = await api.new_key("acme", ["compute"])
        assert (await api.http.get("/metrics")).status_code == 200
        assert (await compute.http.get("/metrics")).status_code == (200 if is_public else 403)
        assert (await api.with_key(None).http.get("/metrics")).status_code == (200 if is_public else 401)


async def test_the_docs_are_open(api: Api) -> None:
    answer = await api.with_key(None).http.get("/docs")
    assert answer.status_code == 200
    assert "/openapi.json" in answer.text


def operations(document: dict[str, Any]) -> dict[str, Any]:
    """Each operation by its method and path."""
    return {
        f"{method.upper()} {path}": operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


async def test_the_document_lists_every_error_of_every_operation(api: Api) -> None:
    document = (await api.with_key(None).http.get("/openapi.json")).json()
    for name, operation in operations(document).items():
        path = name.split(" ")[1]
        if path == "/healthz" or path.startswith(("/v1", "/match")):
            continue
        said = {status: answer["description"] for status, answer in operation["responses"].items()}
        wanted = dict(ANSWERED_EVERYWHERE)
        if not path.startswith(("/models", "/readyz", "/metrics")):
            wanted |= {"401": "UNAUTHORIZED", "403": "FORBIDDEN"}
        if path.startswith("/models"):
            wanted |= {"401": "UNAUTHORIZED"}
        if "requestBody" in operation:
            wanted |= {"400": "INVALID_REQUEST", "413": "PAYLOAD_TOO_LARGE"}
        if "{" in path or path == "/compute/heartbeat":
            wanted["404"] = next(code for prefix, code in NOT_FOUND.items() if path.startswith(prefix))
        if (
            name in ENDED
            or path.startswith(("/compute/drain", "/compute/resume", "/compute/probe"))
            or name.startswith("PUT")
        ):
            wanted["410"] = "NODE_DEREGISTERED"
        for status, code in wanted.items():
            assert code in said.get(status, ""), f"{name} does not say {status} {code}"
    conflicts = operations(document)["POST /passports"]["responses"]["409"]["description"]
    assert all(code in conflicts for code in ("PASSPORT_EXISTS", "MODEL_NAME_TAKEN", "IDEMPOTENCY_CONFLICT"))


async def test_every_operation_has_a_short_id_and_an_example(api: Api, database_url: str) -> None:
    """Code generators name their functions by the ids; the examples are what this version of the service responds."""
    document = (await api.http.get("/openapi.json")).json()
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(ids)) == len(ids)
    assert not [id_ for id_ in ids if not re.fullmatch(r"[a-z]+(_[a-z]+){0,3}(_v2)?", id_)]
    recorded = await record(database_url)
    for name, operation in operations(document).items():
        for parameter in operation.get("parameters", []):
            assert "example" in parameter or parameter["in"] != "path", (name, parameter["name"])
        for body in operation.get("requestBody", {}).get("content", {}).values():
            assert "examples" in body or has_example(document, body["schema"]), name
        for status, answer in operation["responses"].items():
            for kind, content in answer.get("content", {}).items():
                if status.startswith("2") and kind not in {"text/event-stream", "audio/mpeg"}:
                    shown, newest = (
                        set(shape_of(content["example"])),
                        set(shape_of(recorded[operation["operationId"]][kind])),
                    )
                    assert shown == {path for path in newest if not is_in_empty_list(path, shown)}, (name, kind)


def is_in_empty_list(path: str, shown: set[str]) -> bool:
    """Return whether a path lies in a list that is empty in the example: a slow machine has an outage to list."""
    name, _, _ = path.partition("[]")
    return "[]" in path and not any(each.startswith(f"{name}[]") for each in shown)


def has_example(document: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Return whether a schema, or the one that it refers to, has an example."""
    schemas = [schema, *schema.get("anyOf", [])]
    named = (document["components"]["schemas"][each["$ref"].rpartition("/")[2]] for each in schemas if "$ref" in each)
    return any("examples" in each for each in named)


async def test_every_error_in_the_document_has_the_one_shape(api: Api) -> None:
    document = (await api.http.get("/openapi.json")).json()
    for name, operation in operations(document).items():
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and "/v1" not in name and name.removeprefix("POST ") not in PATHS:
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}, (name, status)
