"""Prometheus: names as the field has them, few series whatever comes, a dashboard and alerts that ask for what is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.egress.faults import FaultKind
from lucid_compute.errors import LucidError
from lucid_compute.gateway.endpoints import PATHS, find_stored
from lucid_compute.web.lanes import CutReason
from tests import ROOT
from tests.api import Api
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.lucid_serve import serving
from tests.prometheus import Scrape, read_expression, read_scrape
from tests.unit.gateway.test_request_tally import job

DEPLOY = ROOT / "deploy"
MAX_SERIES = 2000
PROVOKED_SERIES = 1397
PROMETHEUS_OWN = {"up"}
TARGET_LABELS = {"job", "instance", "le"}
UNITS = ("_seconds", "_bytes", "_ratio", "_info")
COUNTED = {  # gauges that count things, and have no unit
    "lucid_nodes", "lucid_nodes_stopped", "lucid_models", "lucid_capability_classes", "lucid_replicas",
    "lucid_silence_brake", "lucid_inference_running", "lucid_inference_waiting",
    "lucid_breakers_open", "lucid_jobs_waiting", "lucid_loop_tasks",
    "lucid_webhook_deliveries_running", "lucid_webhook_deliveries_waiting", "lucid_webhooks_failing",
    "lucid_webhooks_disabled", "lucid_workers", "lucid_tunnels", "lucid_tunnel_streams",
}  # fmt: skip


def _errors(of: type[LucidError]) -> Iterator[type[LucidError]]:
    """Every refusal that there is."""
    yield of
    for each in of.__subclasses__():
        yield from _errors(each)


async def scrape(api: Api) -> Scrape:
    """What Prometheus reads now."""
    return read_scrape((await api.http.get("/metrics")).text)


async def test_names_follow_the_conventions_of_prometheus(api: Api) -> None:
    """A prefix of ours, base units, `_total` for what only grows; nothing is named twice."""
    await api.http.get("/metrics")
    found = await scrape(api)
    for name, kind in found.types.items():
        assert re.fullmatch(r"lucid_[a-z_]+", name), name
        if kind == "counter":
            assert f"{name}_total" in found.labels or not any(sample.startswith(name) for sample in found.labels), name
        elif kind == "histogram":
            assert name.endswith("_seconds"), name
            assert {f"{name}_bucket", f"{name}_sum", f"{name}_count"} <= found.labels.keys()
        else:
            assert kind == "gauge"
            assert name.endswith(UNITS) or name in COUNTED or name.endswith("_created"), name
        assert not re.search(r"(_ms|_millis|_kb|_mb|_percent)\b", name), name


async def test_series_stay_few_whatever_comes(api: Api) -> None:
    """Ten thousand names of models, every route with many statuses, unknown paths, odd methods."""
    tally, metrics = api.replica.gateway.context.metrics, api.app.fastapi.state.metrics
    for number in range(10_000):
        tally.record(job(f"model {number}", outcome=list(Outcome)[1 + number % 4]))
    document = (await api.http.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        is_of_lane = path in PATHS or find_stored(path) is not None
        for method in () if is_of_lane else operations:  # what the lane serves is not counted by route
            for status in (
                200,
                201,
                202,
                204,
                304,
                400,
                401,
                403,
                404,
                405,
                409,
                410,
                413,
                422,
                429,
                500,
                502,
                503,
                504,
            ):
                metrics.http.count(method.upper(), path, status, 0.1)
    for number in range(100):
        await api.http.get(f"/nowhere/{number}")
        await api.http.request(f"ODD{number}", "/models")
        await api.http.get(f"/models/unknown-{number}")
        body = {"model": f"unknown {number}", "messages": [{"role": "user", "content": "x"}]}
        await api.http.post("/v1/chat/completions", json=body)
    for reason in FaultKind:
        api.replica.gateway.faults[str(reason)] += 1
    for code in {found.code for found in _errors(LucidError)}:
        for lane in (api.app.heartbeats, api.app.inference):
            lane.outcomes[code] += 1
    assert (await scrape(api)).series <= PROVOKED_SERIES < 0.7 * MAX_SERIES


@pytest.fixture
async def real_scrape(database_url: str) -> Scrape:
    """What a real service answers once it has served a request, refused one and had one fail on a node."""
    failing = Behaviour(answer=respond(status=500))
    with serving(database_url) as served:
        async with FaultNode() as node, served.client() as client:
            metadata = {"vram": 8, "inferenceUrl": node.url, "runtimes": ["llama.cpp"]}
            made = await client.post("/passports", json={"name": "n", "type": "compute", "metadata": metadata})
            model = {"name": "m", "type": "model", "metadata": {"format": "gguf"}}
            assert (await client.post("/passports", json=model)).status_code == 201
            beat = {"status": "healthy", "load": None, "availableModels": ["m"], "queueDepth": None}
            assert (await client.post("/compute/heartbeat", json={**beat, "passportId": made.json()["id"]})).is_success
            for model_name, behaviour in (("m", Behaviour()), ("m", failing), ("unknown", Behaviour())):
                node.behaviour = behaviour
                body = {"model": model_name, "messages": [{"role": "user", "content": "hello"}]}
                await client.post("/v1/chat/completions", json=body)
            answer = await client.get("/metrics")
    found = read_scrape(answer.text)
    assert 'lucid_inference_attempts_total{model_name="m",outcome="completed"} 1.0' in answer.text
    assert 'lucid_inference_attempts_total{model_name="m",outcome="failed"} 1.0' in answer.text
    assert 'lucid_inference_request_duration_seconds_count{model_name="m"} 1.0' in answer.text
    return found


def expressions_of(document: Any) -> Iterator[str]:
    """Every PromQL expression in a dashboard or in rules, however deep."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key == "expr":
                yield value
            elif (
                key == "query"
                and isinstance(value, str)
                and (found := re.match(r"label_values\((\w+), (\w+)\)", value))
            ):
                yield f"sum by ({found[2]}) ({found[1]})"
            else:
                yield from expressions_of(value)
    elif isinstance(document, list):
        for each in document:
            yield from expressions_of(each)


async def test_the_dashboard_and_the_alerts_ask_for_what_there_is(real_scrape: Scrape) -> None:
    """Each name of a metric and of a label, against a scrape of a real service."""
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    rules = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())
    expressions = [*expressions_of(dashboard), *expressions_of(rules)]
    assert len(expressions) > 30
    for expression in expressions:
        asked = read_expression(expression)
        assert asked.metrics, expression
        missing = asked.metrics - real_scrape.labels.keys() - PROMETHEUS_OWN
        assert not missing, f"{missing} in {expression}"
        known = TARGET_LABELS.union(*(real_scrape.labels.get(name, set()) for name in asked.metrics))
        assert asked.labels <= known, f"{asked.labels - known} in {expression}"


def test_outcomes_that_the_dashboard_and_the_alerts_name_can_come() -> None:
    """A misspelt value of a label would match nothing, and an alert on it would never ring."""
    text = (DEPLOY / "prometheus-alerts.yml").read_text() + (DEPLOY / "grafana-dashboard.json").read_text()
    named = {word for found in re.findall(r'outcome[=!]~?\\?"([a-z_|]+)', text) for word in found.split("|")}
    possible = {each.code.lower() for each in _errors(LucidError)} | set(Outcome) | set(CutReason)
    assert named >= {"node_failed", "completed"}
    assert named <= possible | {"served", "accepted", "delivered"}


def test_every_alert_says_what_to_do() -> None:
    """A summary and a description, a severity, and a name of its own."""
    rules = [
        rule
        for group in yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith((".", "since when."))


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    """Each has its place and an id of its own."""
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    places = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize(
    ("expression", "metrics", "labels"),
    [
        ('sum by (le, a) (rate(x_bucket{b="c"}[5m])) > 0.5 * max(y)', {"x_bucket", "y"}, {"le", "a", "b"}),
        ("a and on (b) c unless d offset 5m", {"a", "c", "d"}, {"b"}),
        ('up{job="lucid"} == 0', {"up"}, {"job"}),
        ('rate(x{m=~"$model"}[$__rate_interval])', {"x"}, {"m"}),
    ],
)
def test_names_in_an_expression_are_found(expression: str, metrics: set[str], labels: set[str]) -> None:
    """Else the test of the dashboard would prove nothing."""
    assert read_expression(expression) == (metrics, labels)
