"""One node of the demo: an inference server and the agent beside it."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

from demo.children import Child, DemoFailed
from demo.llama_cpp import LISTENS, server_command
from demo.stage import LUCID, Stage

SLOTS = 8  # two nodes may be away, and the third one takes all requests
DRAIN_SECONDS = 3


class Place(NamedTuple):
    """Where a node is, and what it asks for its work."""

    name: str
    region: str
    price_per_1k_tokens: str


PLACES = (
    Place("berlin-1", "eu-central", "0.0020"),
    Place("oslo-1", "eu-north", "0.0015"),
    Place("austin-1", "us-south", "0.0025"),
)


class Node:
    """A node: its server can be killed and started again in the same place, and its agent goes on."""

    def __init__(self, stage: Stage, place: Place) -> None:
        self.place = place
        self.passport_id = ""
        self._stage = stage
        self._port = 0
        self._server: Child | None = None

    @property
    def name(self) -> str:
        """The node's name."""
        return self.place.name

    def start_server(self) -> Child:
        """Start the inference server; the first time on a free port, and then on that one again."""
        command = server_command(self._stage.folder / "tiny.gguf", port=self._port, slots=SLOTS, embeds=True)
        self._server = self._stage.start(f"the inference server of {self.name}", command)
        return self._server

    async def server_listens(self) -> str:
        """Wait until the inference server listens; return its URL."""
        if self._server is None:
            raise DemoFailed(f"{self.name} has no inference server.")
        url = await self._server.says(LISTENS)
        self._port = urlsplit(url).port or 0
        return url

    def kill_server(self) -> int:
        """Kill the inference server as kill -9 does; return its process id."""
        if self._server is None:
            raise DemoFailed(f"{self.name} has no inference server.")
        self._server.kill()
        return self._server.pid

    async def start_agent(self, api: str, key: str) -> None:
        """Start the agent, as a provider does."""
        told = {
            "--url": await self.server_listens(),
            "--api": api,
            "--name": self.name,
            "--region": self.place.region,
            "--price-per-1k-tokens": self.place.price_per_1k_tokens,
            "--gpu": "none: a processor",
            "--vram": "2GB",
            "--drain-seconds": str(DRAIN_SECONDS),
        }
        options = [word for pair in told.items() for word in pair]
        self._stage.start(f"the agent of {self.name}", [LUCID, "agent", "run", *options], LUCID_API_KEY=key)
