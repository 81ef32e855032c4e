"""What an agent finds on this machine, once, without reporting it."""

from __future__ import annotations

import asyncio
from typing import Any

from lucid_compute.agent.agent import open_observer, open_server
from lucid_compute.agent.node_report import declaration_of, heartbeat_of, metadata_of
from lucid_compute.agent.settings import AgentSettings


def inspect_here(settings: AgentSettings) -> dict[str, Any]:
    """Answer what is found, None where it is unknown; `fault` is why the server can't serve, in a sentence."""
    return asyncio.run(_inspect(settings))


async def _inspect(settings: AgentSettings) -> dict[str, Any]:
    server = open_server(settings)
    observer = open_observer(settings, server)
    try:
        await observer.look()
    finally:
        await server.close()
    seen = observer.seen()
    detection = seen.server.detection if seen.server is not None else None
    beat, gpus = heartbeat_of(seen, settings, stops=False), seen.gpus.gpus
    return {
        "url": server.url,
        "runtime": detection.shown_name if detection else None,
        "version": detection.runtime.version if detection else None,
        "confidence": detection.confidence if detection else None,
        "evidence": list(detection.evidence) if detection else [],
        "fault": seen.server.fault if seen.server is not None else "nothing was seen in time",
        "models": declaration_of(seen, settings),
        "loaded": beat["available_models"],
        **{name: beat[name] for name in ("load", "in_flight", "queue_depth", "tokens_generated")},
        "gpus": None if gpus is None else [gpu.model_dump(mode="json", by_alias=True) for gpu in gpus],
        "nvml": seen.gpus.detail,
        "metadata": metadata_of(seen, settings),
    }
