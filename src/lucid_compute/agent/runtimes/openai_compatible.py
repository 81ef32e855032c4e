"""A server of which only OpenAI's list of models is known."""

from __future__ import annotations

from dataclasses import dataclass

from lucid_compute.agent.inference_server import InferenceServer
from lucid_compute.agent.runtimes.reading import ServedModel, ServerReading, as_count, distinct, models_listed


@dataclass(frozen=True, slots=True)
class OpenAiCompatible:
    """Any other server. It names no runtime: the registry then matches it with the models it declares alone."""

    version: str | None = None
    name: str | None = None
    health_path: str = "/v1/models"

    async def read(self, server: InferenceServer) -> ServerReading:
        """Answer its models, and their context where it stands in the list."""
        entries = models_listed(await server.get("/v1/models"))
        if entries is None:
            return ServerReading()
        return ServerReading(
            models=distinct(
                ServedModel(id=entry["id"], max_tokens=as_count(entry.get("max_model_len"))) for entry in entries
            )
        )
