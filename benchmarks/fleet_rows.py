"""Writes complete fleets to Postgres in a few statements, as if each node had registered and sent heartbeats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from benchmarks.servers import ADMIN_KEY
from lucid_compute.postgres.database import connect
from lucid_compute.server.preparation import prepare

OWNER = "acme"
_INSERT_PASSPORTS = """
    INSERT INTO passports (id, type, owner, name, metadata)
    SELECT id, $2, $3, name, metadata::jsonb FROM unnest($1::uuid[], $4::text[], $5::text[]) AS n (id, name, metadata)
"""
# Recorded as healthy, with the boot and the models that `benchmarks.load` reports: what a running fleet looks like.
_INSERT_NODES = """
    INSERT INTO nodes (passport_id, declared_models, recorded_state) SELECT id, declared::jsonb, 'healthy'
    FROM unnest($1::uuid[], $2::text[]) AS n (id, declared)
"""
_INSERT_BOOTS = "INSERT INTO node_boots (passport_id, boot_id) SELECT id, 'boot-1' FROM unnest($1::uuid[]) AS n (id)"
_INSERT_HEARTBEATS = """
    INSERT INTO heartbeats (passport_id, received_at, up_since, status, report, boot_id, sequence, revision)
    SELECT id, now(), now(), 'healthy', jsonb_build_object('passportId', id::text, 'status', 'healthy', 'load', 0.42,
        'availableModels', '["llama-3-70b", "mistral-7b"]'::jsonb, 'queueDepth', 3), 'boot-1', 1, 1
    FROM unnest($1::uuid[]) AS n (id)
"""


class NodeRow(NamedTuple):
    """A node to be written."""

    id: str
    metadata: Mapping[str, Any]
    declared: Iterable[str] = ()


def node_id(number: int) -> str:
    """Return the id of the node with this number."""
    return str(UUID(int=(0x1000 << 112) + number))


def plain_nodes(count: int) -> list[NodeRow]:
    """Return equal nodes."""
    metadata = {"vram": "80GB", "inferenceUrl": "http://node:8080", "runtimes": ["vllm"]}
    return [NodeRow(node_id(number), metadata) for number in range(count)]


async def write_fleet(url: str, nodes: list[NodeRow], models: list[dict[str, Any]]) -> None:
    """Migrate an empty database and fill it; every node has a heartbeat just received."""
    await prepare(url, data_dir=Path("/nonexistent"), bootstrap_admin_key=ADMIN_KEY)
    connection = await connect(url, application="lucid benchmarks")
    try:
        async with connection.transaction():
            await _write_nodes(connection, nodes)
            await _write_models(connection, models)
        await connection.execute("ANALYZE")
    finally:
        await connection.close()


async def refresh(url: str) -> None:
    """Let every node have been heard just now."""
    connection = await connect(url, application="lucid benchmarks")
    try:
        await connection.execute("UPDATE heartbeats SET received_at = now(), revision = revision + 1")
        await connection.execute("VACUUM ANALYZE heartbeats")
    finally:
        await connection.close()


async def _write_nodes(connection: asyncpg.Connection[asyncpg.Record], nodes: list[NodeRow]) -> None:
    ids = [node.id for node in nodes]
    names = [f"node-{number}" for number in range(len(nodes))]
    metadata = [json.dumps(node.metadata) for node in nodes]
    declared = [
        json.dumps([{"id": name, "maxTokens": None, "quantization": None} for name in node.declared]) for node in nodes
    ]
    await connection.execute(_INSERT_PASSPORTS, ids, "compute", OWNER, names, metadata)
    await connection.execute(_INSERT_NODES, ids, declared)
    await connection.execute(_INSERT_BOOTS, ids)
    await connection.execute(_INSERT_HEARTBEATS, ids)


async def _write_models(connection: asyncpg.Connection[asyncpg.Record], models: list[dict[str, Any]]) -> None:
    ids = [str(UUID(int=(0x2000 << 112) + number)) for number in range(len(models))]
    names = [f"model-{number}" for number in range(len(models))]
    metadata = [json.dumps(model) for model in models]
    await connection.execute(_INSERT_PASSPORTS, ids, "model", OWNER, names, metadata)
    await connection.execute(
        "INSERT INTO model_names (name, passport_id) SELECT * FROM unnest($1::text[], $2::uuid[])", names, ids
    )
