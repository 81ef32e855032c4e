"""The tunnels of one replica: which outbound nodes it can reach, and streams to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from lucid_compute.tunnel.frames import Hello, write_hello
from lucid_compute.tunnel.multiplex import Multiplexer
from lucid_compute.tunnel.stream_transport import StreamTransport

MAX_CONNECTIONS_OF_NODE = 8  # to one replica: the one that is used, and those that are tried


class TunnelGrant(NamedTuple):
    """What a connection was admitted for: its node, the start of its agent, and the key that it was opened with."""

    passport_id: str
    boot_id: str
    key_id: str


class Tunnel(Protocol):
    """The connection of one agent."""

    grant: TunnelGrant
    multiplexer: Multiplexer

    def close(self, reason: str) -> None:
        """End the connection, and tell the agent why."""

    def find_fault(self) -> str | None:
        """Return why the connection has to end: its agent is silent, or said nothing in time."""


class Tunnels:
    """The connections of agents to this replica. A node that has one can be sent requests.

    `replicas` is the number of live replicas, as the agents were told last.
    """

    def __init__(self, replica_id: str, on_change: Callable[[str, bool], None]) -> None:
        """`on_change` is told of each node that becomes reachable, or ceases to be."""
        self._replica_id = replica_id
        self._on_change = on_change
        self._by_node: dict[str, Tunnel] = {}
        self._all: set[Tunnel] = set()
        self.replicas = 1

    def __len__(self) -> int:
        """Return the number of nodes that can be reached."""
        return len(self._by_node)

    def __iter__(self) -> Iterator[Tunnel]:
        """Yield every connection, also those whose agents have not decided to keep them."""
        return iter([*self._all])

    @property
    def greeting(self) -> bytes:
        """The frame that says which replica this is."""
        return write_hello(Hello(replica_id=self._replica_id, replicas=self.replicas))

    @property
    def stream_count(self) -> int:
        """The number of requests that go through tunnels now."""
        return sum(len(tunnel.multiplexer) for tunnel in self._by_node.values())

    def open_stream(self, passport_id: str, protocol: asyncio.BufferedProtocol) -> bool:
        """Connect a protocol to the node over a new stream; return False if there is no connection to the node."""
        tunnel = self._by_node.get(passport_id)
        stream = None if tunnel is None else tunnel.multiplexer.open()
        if stream is None:
            return False
        StreamTransport(asyncio.get_running_loop(), stream, protocol)
        return True

    def greet(self, replicas: int) -> None:
        """Tell the agents how many live replicas there are, if that has changed."""
        if replicas != self.replicas:
            self.replicas = replicas
            greeting = self.greeting
            for tunnel in self._all:
                tunnel.multiplexer.send_control(greeting)

    def add(self, tunnel: Tunnel) -> None:
        """Admit a connection, whose agent has yet to say that it keeps it; but not many of one node."""
        self._all.add(tunnel)
        if sum(each.grant.passport_id == tunnel.grant.passport_id for each in self._all) > MAX_CONNECTIONS_OF_NODE:
            tunnel.close("The node has too many connections.")

    def use(self, tunnel: Tunnel) -> None:
        """Send the node's requests over this connection from now on; an earlier one of the node is closed."""
        passport_id = tunnel.grant.passport_id
        earlier, self._by_node[passport_id] = self._by_node.get(passport_id), tunnel
        if earlier is None:
            self._on_change(passport_id, True)
        elif earlier is not tunnel:
            earlier.close("Another connection takes its place.")

    def remove(self, tunnel: Tunnel) -> None:
        """Forget a connection that is lost."""
        self._all.discard(tunnel)
        passport_id = tunnel.grant.passport_id
        if self._by_node.get(passport_id) is tunnel:
            del self._by_node[passport_id]
            self._on_change(passport_id, False)
