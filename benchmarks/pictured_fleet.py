"""A small fleet for pictures: nodes and models of three owners, and a day of records."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.servers import Server
from lucid_compute.accounting.rollup_columns import ALL_NODES, JOB_COLUMNS, NARROW, UPSTREAM, add_up, names, owner_scope
from lucid_compute.postgres.database import connect

_GPUS = (("NVIDIA H100", 80), ("NVIDIA A100", 80), ("NVIDIA L40S", 48), ("NVIDIA RTX 4090", 24))
_REGIONS = ("eu-central-1", "eu-west-1", "us-east-1", "ap-south-1")
_OWNERS = ("acme", "globex", "initech")
_MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("meta-llama/Llama-3-70B", {"minVramGb": 40, "contextLength": 8192}),
    ("mistral-7b", {"minVramGb": 14, "contextLength": 8192}),
    ("qwen3-32b", {"minVramGb": 24, "contextLength": 32768}),
    ("deepseek-coder-33b", {"minVramGb": 36, "contextLength": 16384}),
    ("gemma-3-27b", {"minVramGb": 22, "contextLength": 8192}),
    ("deepseek-v3-671b", {"minVramGb": 640, "contextLength": 65536}),
    ("nemotron-340b", {"runtimes": ["tensorrt"], "minVramGb": 48, "contextLength": 4096}),
)
_SERVED = 5  # the first models are declared by nodes
NODES = 36
SILENT, DRAINING, TROUBLED = (5, 17, 29), (11,), 0
BEYOND_REACH = 5  # the model that no node is large enough for

# A minute's jobs of each node: a day's wave, some noise, a dip where the troubled node was away.
_JOBS = f"""
INSERT INTO job_minutes (bucket, scope_id, model_id, {names(JOB_COLUMNS)})
SELECT minute, n.id, m.id, done, failed, 0, 0, done, done * (380 + n.place * 9) * 1000::bigint, done * 90000::bigint,
    done * 210::bigint, done * 340::bigint, done * 0.00068,
    ARRAY[(84 + n.place % 5 + slow) << 22 | done / 2 + 1, (89 + n.place % 7 + slow) << 22 | done / 3 + 1,
        (97 + slow + (random() * 3)::integer) << 22 | 1],
    CASE WHEN failed > 0 THEN jsonb_build_object((ARRAY['failed:connect_timeout', 'failed:http_503', 'failed:reset'])
        [1 + n.place % 3], failed) END
FROM unnest($1::uuid[]) WITH ORDINALITY AS n (id, place)
JOIN unnest($2::uuid[]) WITH ORDINALITY AS m (id, place) ON m.place = 1 + n.place % {_SERVED},
generate_series(date_trunc('minute', now()) - interval '26 hours', date_trunc('minute', now()) - interval '1 minute',
    '1 minute') AS minute,
LATERAL (SELECT extract(epoch FROM now() - minute) / 60 AS old) AS age,
LATERAL (SELECT (18 + 9 * sin(old / 170.0) + 5 * random())::integer AS done,
    (1.6 + 1.4 * sin(old / 170.0) + random())::integer AS slow,
    CASE WHEN n.place = 1 AND old BETWEEN 26 AND 30 OR random() < 0.012 THEN 1 + (random() * 3)::integer ELSE 0 END
        AS failed) AS j
WHERE NOT (n.place = 1 AND old BETWEEN 19 AND 26)
"""
_SUM = f"""
WITH rows AS (SELECT * FROM job_minutes WHERE scope_id = ANY($1::uuid[])),
{add_up(JOB_COLUMNS, "bucket", source="rows", into="whole", from_=NARROW, to=NARROW)}
INSERT INTO job_minutes (bucket, scope_id, model_id, {names(JOB_COLUMNS)})
SELECT bucket, {{scope}}, '{UPSTREAM}'::uuid, {names(JOB_COLUMNS)} FROM whole
"""
_SUM_OF_MODEL = _SUM.replace(f"'{UPSTREAM}'::uuid", "$2::uuid").replace(
    "ANY($1::uuid[])", "ANY($1::uuid[]) AND model_id = $2"
)
_GAUGES = """
INSERT INTO gauge_minutes (bucket, scope_id, samples, load_sum, load_max, load_count, queue_depth_sum, queue_depth_max,
    queue_depth_count, in_flight_sum, in_flight_max, in_flight_count, gpu_utilization_sum, gpu_utilization_max,
    gpu_utilization_count, gpu_memory_used_mb_sum, gpu_memory_used_mb_max, gpu_memory_used_mb_count,
    gpu_memory_total_mb_sum, gpu_memory_total_mb_max, gpu_memory_total_mb_count)
SELECT minute, n.id, 6, busy * 6, busy, 6, queue * 6, queue, 6, busy * 48, 8, 6, gpu * 6, gpu, 6,
    used * 6, used, 6, 81920 * 6, 81920, 6
FROM unnest($1::uuid[]) WITH ORDINALITY AS n (id, place),
generate_series(date_trunc('minute', now()) - interval '26 hours', date_trunc('minute', now()) - interval '1 minute',
    '1 minute') AS minute,
LATERAL (SELECT extract(epoch FROM now() - minute) / 60 AS old) AS age,
LATERAL (SELECT 0.55 + 0.25 * sin(old / 170.0) + 0.08 * random() AS busy, (random() * 4)::integer AS queue,
    0.6 + 0.25 * sin(old / 170.0) + 0.1 * random() AS gpu, 61000 + 6000 * sin(old / 60.0) AS used) AS g
WHERE NOT (n.place = 1 AND old BETWEEN 19 AND 26)
"""
_PAST = """
UPDATE record_marks SET began_at = now() - interval '26 hours', hours_until = date_trunc('hour', now()),
    days_until = date_trunc('day', now());
UPDATE passports SET created_at = now() - interval '26 hours' WHERE type IN ('compute', 'model');
DELETE FROM node_states;
UPDATE node_events SET at = now() - interval '26 hours';
"""
_STATES = """
INSERT INTO node_states (node_id, since, state, owner)
SELECT id, now() - interval '26 hours', 'healthy', owner FROM passports WHERE type = 'compute'
"""
_NOT_WELL = """
INSERT INTO node_states (node_id, since, state, owner)
SELECT id, now() - interval '7 minutes', $2, owner FROM passports WHERE id = ANY($1::uuid[])
"""
_TROUBLE = """
INSERT INTO node_states (node_id, since, state, owner) SELECT $1::uuid, now() - ago, state, 'acme'
FROM (VALUES (interval '26 minutes', 'unhealthy'), (interval '19 minutes', 'healthy')) AS s (ago, state)
"""
_TROUBLE_TOLD = """
INSERT INTO node_events (passport_id, type, at, reason) SELECT $1::uuid, type, now() - ago, reason
FROM (VALUES (interval '27 minutes 20 seconds', 'stale', 'no heartbeat for 35 s'),
    (interval '26 minutes', 'unhealthy', 'no heartbeat for 120 s'), (interval '19 minutes', 'restarted', NULL),
    (interval '18 minutes 50 seconds', 'healthy', NULL)) AS e (ago, type, reason)
"""
# What two keys of one consumer used on each of the last thirty days.
_USAGE = """
INSERT INTO usage_days (consumer, day, key_id, model_id, requests, completed, failed, rejected, cancelled, tokens_in,
    tokens_out, price_usd)
SELECT 'shop', (now() AT TIME ZONE 'UTC')::date - ago, key_id, model_id, n, n - n / 60, n / 90, n / 40, n / 300,
    n * 310, n * 120, n * 430 * 0.000002
FROM generate_series(0, 29) ago, unnest($1::text[]) WITH ORDINALITY k (key_id, one),
    unnest($2::uuid[]) WITH ORDINALITY m (model_id, other),
    LATERAL (SELECT (900 / one / other * (1.4 + sin(ago * 0.9 + other)))::int AS n) of_day
"""
_OUTAGE = (
    "INSERT INTO outages (started_at, ended_at) VALUES (now() - interval '44 minutes', now() - interval '42 minutes')"
)
_HEARD = """
UPDATE heartbeats SET revision = revision + 1, up_since = now() - interval '26 hours',
    received_at = CASE WHEN passport_id = ANY($1::uuid[]) THEN now() - interval '9 minutes' ELSE now() END
"""


class Pictured(NamedTuple):
    """What there is to look at."""

    nodes: list[str]
    models: list[str]
    keys: list[str]


def register(server: Server) -> Pictured:
    """Register nodes and models over the API, and let most of them be heard."""
    models = [_post(server, "/passports", _model(name, more))["id"] for name, more in _MODELS]
    nodes = [_post(server, "/passports", _node(number))["id"] for number in range(NODES)]
    for number, node in enumerate(nodes):
        declared = [{"id": _MODELS[(1 + number) % _SERVED][0], "maxTokens": 32768, "quantization": None}]
        server.call("PUT", f"/compute/models/{node}", {"models": declared})
    beat(server, Pictured(nodes, models, []), everyone=True)
    for number in DRAINING:
        _post(server, f"/compute/drain/{nodes[number]}", None)
    keys = [_post(server, "/keys", _key(name, budget))["id"] for name, budget in (("web shop", "40"), ("search", "8"))]
    return Pictured(nodes, models, keys)


def beat(server: Server, pictured: Pictured, *, everyone: bool = False) -> None:
    """Let the nodes be heard that are not silent."""
    for number, node in enumerate(pictured.nodes):
        if everyone or number not in SILENT:
            _post(server, "/compute/heartbeat", _heartbeat(node, number))


async def remember(url: str, pictured: Pictured) -> None:
    """Give the fleet a day that was."""
    connection = await connect(url, application="lucid pictures")
    try:
        await connection.execute(_PAST)
        await connection.execute(_JOBS, pictured.nodes, pictured.models)
        for number, owner in enumerate(_OWNERS):
            own = pictured.nodes[number :: len(_OWNERS)]
            await connection.execute(_SUM.format(scope=owner_scope(f"'{owner}'::text")), own)
        await connection.execute(_SUM.format(scope=f"'{ALL_NODES}'::uuid"), pictured.nodes)
        for model in pictured.models[:_SERVED]:
            await connection.execute(_SUM_OF_MODEL.format(scope=f"'{ALL_NODES}'::uuid"), pictured.nodes, model)
        await connection.execute(_GAUGES, pictured.nodes)
        await connection.execute(_STATES)
        for state, which in (("unhealthy", SILENT), ("draining", DRAINING)):
            await connection.execute(_NOT_WELL, [pictured.nodes[number] for number in which], state)
        await connection.execute(_TROUBLE, pictured.nodes[TROUBLED])
        await connection.execute(_TROUBLE_TOLD, pictured.nodes[TROUBLED])
        await connection.execute(_USAGE, pictured.keys, pictured.models[:_SERVED])
        await connection.execute(_OUTAGE)
        await connection.execute(_HEARD, [pictured.nodes[number] for number in SILENT])
    finally:
        await connection.close()


def _post(server: Server, path: str, body: Any) -> Any:
    return server.call("POST", path, body)


def _model(name: str, more: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "type": "model", "owner": "acme", "metadata": {"format": "safetensors", **more}}


def _key(name: str, budget: str) -> dict[str, Any]:
    limits = {"budgetUsd": budget, "budgetPeriod": "month", "requestsPerMinute": 600}
    return {"name": name, "owner": "shop", "scopes": ["inference:run"], "limits": limits}


def _node(number: int) -> dict[str, Any]:
    gpu, vram_gb = _GPUS[number % len(_GPUS)]
    region = _REGIONS[number % len(_REGIONS)]
    metadata = {
        "gpu": gpu,
        "vram": f"{vram_gb}GB",
        "region": region,
        "inferenceUrl": f"http://gpu-{number}:8000/v1",
        "maxConcurrency": 16,
        "runtimes": ["vllm"],
        "pricePer1kTokens": "0.002",
    }
    name = f"{region}-{gpu.split()[-1].lower()}-{number:02}"
    return {"name": name, "type": "compute", "owner": _OWNERS[number % len(_OWNERS)], "metadata": metadata}


def _heartbeat(node: str, number: int) -> dict[str, Any]:
    gpu, vram_gb = _GPUS[number % len(_GPUS)]
    load = 0.35 + (number * 37 % 60) / 100
    reading = {
        "index": 0,
        "name": gpu,
        "utilization": min(load + 0.05, 1),
        "memoryUsedMb": vram_gb * 1024 * 0.78,
        "memoryTotalMb": vram_gb * 1024,
        "temperatureC": 61 + number % 9,
        "powerW": 310 + number,
    }
    return {
        "passportId": node,
        "status": "healthy",
        "load": round(load, 2),
        "availableModels": [_MODELS[(1 + number) % _SERVED][0]],
        "queueDepth": number % 4,
        "gpus": [reading],
    }
