"""The agent's process: its parts, its signals, its exit status, and a dry run that reports nothing."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ssl import SSLContext
from typing import Any

from lucid_compute.agent.fatal_errors import AgentFault, WrongSettings
from lucid_compute.agent.gpu import GpuReader
from lucid_compute.agent.node_report import declaration_of, heartbeat_of, metadata_of
from lucid_compute.agent.observer import Observer
from lucid_compute.agent.reporter import Reporter
from lucid_compute.agent.runtimes.inference_server import InferenceServer
from lucid_compute.agent.server_watch import ServerWatch
from lucid_compute.agent.settings import AgentSettings
from lucid_compute.agent.shutdown import Shutdown
from lucid_compute.client import AsyncLucid
from lucid_compute.client.errors import ConfigurationFault
from lucid_compute.client.settings import ClientSettings, read_settings
from lucid_compute.client.transport import tls_of

CALL_TIMEOUT_SECONDS = 5.0
_KILLED = 128  # plus the signal's number: ended by a second signal
_log = logging.getLogger(__name__)


class AgentSignals:
    """SIGTERM and SIGINT. The first asks the agent to shut down, the second ends it at once."""

    def __init__(self) -> None:
        """Handle the signals, for the running loop and the current task."""
        self.requested = asyncio.Event()
        self.wake = asyncio.Event()
        self.killed_by: int | None = None
        self._task = asyncio.current_task()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._take, number)

    def _take(self, number: int) -> None:
        if self.requested.is_set() and self._task is not None:
            self.killed_by = number
            self._task.cancel()
        self.requested.set()
        self.wake.set()


def run_agent(settings: AgentSettings, api_url: str | None = None, api_key: str | None = None) -> int:
    """Run until a signal; return the exit status. A registry address or key that is None comes from the environment."""
    return asyncio.run(_run(settings, api_url, api_key))


def open_observer(settings: AgentSettings, server: InferenceServer, signals: AgentSignals | None = None) -> Observer:
    """Return an observer of this machine's GPUs and of `server`, with the running loop's clock."""
    clock = asyncio.get_running_loop().time
    on_change = signals.wake.set if signals is not None else lambda: None
    return Observer(ServerWatch(server, clock), GpuReader(settings.gpu_selection), clock, on_change)


def open_server(settings: AgentSettings) -> InferenceServer:
    """Return the inference server that the settings name."""
    key = settings.inference_key
    return InferenceServer(settings.url, None if key is None else key.get_secret_value())


async def _run(settings: AgentSettings, api_url: str | None, api_key: str | None) -> int:
    signals, server = AgentSignals(), open_server(settings)
    observer = open_observer(settings, server, signals)
    observing: asyncio.Task[None] | None = None
    try:
        async with _open_lucid(settings, api_url, api_key) as lucid:
            await observer.observe()
            observing = asyncio.create_task(observer.run())
            address = read_settings(
                api_url, api_key, timeout_seconds=1, total_timeout_seconds=1, retries=0, ca_file=None
            )
            await _report(lucid, observer, settings, signals, address)
    except AgentFault as fault:
        _log.error("%s", fault)
        return fault.exit_status
    except asyncio.CancelledError:
        if signals.killed_by is None:
            raise
        _log.warning("ended at once, by a second signal")
        return _KILLED + signals.killed_by
    finally:
        if observing is not None:
            observing.cancel()
            await asyncio.wait({observing})
        await server.close()
    _log.info("stopped")
    return 0


async def _report(
    lucid: AsyncLucid, observer: Observer, settings: AgentSettings, signals: AgentSignals, address: ClientSettings
) -> None:
    clock = asyncio.get_running_loop().time
    reporter = Reporter(lucid, observer, settings, clock=clock, stop=signals.requested, wake=signals.wake)
    async with _connected(address, settings, reporter):
        await reporter.run()
        await Shutdown(lucid, observer, reporter, settings, clock).run()


@asynccontextmanager
async def _connected(address: ClientSettings, settings: AgentSettings, reporter: Reporter) -> AsyncIterator[None]:
    """Keep the connections through which an outbound node gets its requests; a node with an address needs none."""
    if not settings.outbound:
        yield
        return
    from lucid_compute.agent.outbound import forwarder, links  # noqa: PLC0415 - other nodes do without websockets

    key = settings.inference_key
    passes_on = forwarder.Forwarder(settings.url, None if key is None else key.get_secret_value())
    tls = tls_of(address)
    service = links.ServiceAddress(
        address.base_url, address.api_key or "", tls if isinstance(tls, SSLContext) else None
    )
    task = asyncio.create_task(links.OutboundLinks(service, lambda: reporter.accepted_node, passes_on).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def _open_lucid(settings: AgentSettings, api_url: str | None, api_key: str | None) -> AsyncLucid:
    """Return a client without retries; the agent repeats calls itself.

    Raises:
        WrongSettings: the address or the key can't be used, the inference server's address is the registry's, or the
            registry could never reach it.
    """
    seconds = CALL_TIMEOUT_SECONDS
    try:
        lucid = AsyncLucid(api_url, api_key, timeout_seconds=seconds, total_timeout_seconds=seconds, retries=0)
    except ConfigurationFault as fault:
        raise WrongSettings(str(fault)) from fault
    if settings.is_the_registry(lucid.base_url):
        raise WrongSettings(
            f"{settings.url} is the registry's own address, not an inference server's. "
            "Pass the inference server's address: --url http://localhost:8080"
        )
    if settings.is_out_of_reach(lucid.base_url):
        raise WrongSettings(
            f"The registry at {lucid.base_url} would look for {settings.inference_url} on its own machine. "
            "Pass the address at which it reaches this machine: --public-url http://your-gpu:8000. "
            "If it can't reach this machine, as behind NAT or a firewall: --outbound"
        )
    return lucid


def dry_run(settings: AgentSettings) -> dict[str, Any]:
    """Return what an agent finds on this machine, None where unknown. `fault` is why the server can't serve."""
    return asyncio.run(_inspect(settings))


async def _inspect(settings: AgentSettings) -> dict[str, Any]:
    server = open_server(settings)
    observer = open_observer(settings, server)
    try:
        await observer.observe()
    finally:
        await server.close()
    seen = observer.seen()
    detection = seen.server.detection if seen.server is not None else None
    heartbeat, gpus = heartbeat_of(seen, settings, stops=False), seen.gpus.gpus
    return {
        "url": server.url,
        "runtime": detection.shown_name if detection else None,
        "version": detection.runtime.version if detection else None,
        "confidence": detection.confidence if detection else None,
        "evidence": list(detection.evidence) if detection else [],
        "fault": seen.server.fault if seen.server is not None else "nothing was seen in time",
        "models": declaration_of(seen, settings),
        "loaded": heartbeat["available_models"],
        **{name: heartbeat[name] for name in ("load", "in_flight", "queue_depth", "tokens_generated")},
        "gpus": None if gpus is None else [gpu.model_dump(mode="json", by_alias=True) for gpu in gpus],
        "nvml": seen.gpus.detail,
        "metadata": metadata_of(seen, settings),
    }
