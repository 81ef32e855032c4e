"""The gateway's tests share one service, and the clients that speak to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import pytest_asyncio

from tests import postgres
from tests.agents import Registry, make_key, open_registry
from tests.browser import Chromium, Page
from tests.command_line import CommandLine
from tests.dashboard import Watched
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import BusyNode, Gateway, chat_answer, open_gateway
from tests.lucid_serve import Served, eventually, folder, serving, serving_on_a_clone

FIRST_BYTE_SECONDS = 1.0
ANSWER_SECONDS = 3.0
SLOW_READER_SECONDS = 2.0


@pytest.fixture(scope="session")
def gateway_service(postgres_and_template: tuple[str, str]) -> Iterator[Served]:
    """A service that waits only briefly, for nodes and for clients."""
    url = asyncio.run(postgres.clone(*postgres_and_template))
    settings = {
        "FIRST_BYTE_TIMEOUT_SECONDS": str(FIRST_BYTE_SECONDS),
        "BETWEEN_BYTES_TIMEOUT_SECONDS": str(FIRST_BYTE_SECONDS),
        "ANSWER_TIMEOUT_SECONDS": str(ANSWER_SECONDS),
        "SLOW_READER_SECONDS": str(SLOW_READER_SECONDS),
    }
    with folder() as made, Served(made, url, **settings) as served:
        yield served
    asyncio.run(postgres.drop(url))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def gateway(gateway_service: Served) -> AsyncIterator[Gateway]:
    """The service as its admin and its consumers speak to it."""
    async with open_gateway(gateway_service) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="session")
async def retries(gateway: Gateway) -> None:
    """See to it that the service may try requests again as often as a test needs."""
    await gateway.earn_retries()


@pytest_asyncio.fixture(loop_scope="session")
async def recorder() -> AsyncIterator[FaultNode]:
    """A node that answers every chat and keeps what it was sent."""
    async with FaultNode(Behaviour(answer=chat_answer())) as node:
        yield node


@pytest.fixture(scope="session")
def cli_service(postgres_and_template: tuple[str, str]) -> Iterator[Served]:
    """A service that only the tests of the command line use: they leave hundreds of silent nodes behind."""
    with serving_on_a_clone(postgres_and_template) as served:
        yield served


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cli_fleet(cli_service: Served) -> AsyncIterator[Gateway]:
    """The command line's service as its admin and its consumers speak to it."""
    async with open_gateway(cli_service) as gateway:
        yield gateway


@pytest.fixture
def lucid(cli_service: Served, tmp_path: Path) -> CommandLine:
    """The command line with the admin's key, in an empty folder."""
    return CommandLine(cli_service.url, cli_service.admin_key, tmp_path)


@pytest.fixture
async def registry(database_url: str) -> AsyncIterator[Registry]:
    """A service of the test's own, on a database of the run's server: that starts in half the time."""
    with serving(database_url) as served:
        async with open_registry(served) as opened:
            yield opened


@pytest.fixture(scope="module")
def small_registry(postgres_and_template: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """A service that several tests share, and a key."""
    with serving_on_a_clone(postgres_and_template) as served:

        async def key() -> str:
            async with served.client() as admin:
                return await make_key(admin)

        yield served.url, asyncio.run(key())


@pytest_asyncio.fixture(loop_scope="session")
async def busy_node(cli_fleet: Gateway) -> AsyncIterator[BusyNode]:
    """A node of the command line's service that never answers; cancel the request and it ends."""
    async with FaultNode(Behaviour(delay_seconds=60)) as server:
        model = await cli_fleet.add_model()
        node = await cli_fleet.add_node(server.url, model)
        request = asyncio.create_task(cli_fleet.chat(model))

        async def is_busy() -> bool:
            return bool((await cli_fleet.health(node))["inFlight"])

        await eventually(is_busy)
        yield BusyNode(node, request)
        request.cancel()
        await asyncio.wait([request])


@pytest.fixture
def watched(postgres_and_template: tuple[str, str]) -> Iterator[Watched]:
    """A service of the test's own, which is looked at."""
    with serving_on_a_clone(postgres_and_template, HEARTBEAT_MAX_PER_SECOND="0") as served:
        opened = Watched(served)
        yield opened
        opened.http.close()


@pytest.fixture(scope="module")
def shared(postgres_and_template: tuple[str, str]) -> Iterator[Watched]:
    """A service for the tests of a module that leave alone what the others made."""
    with serving_on_a_clone(postgres_and_template, HEARTBEAT_MAX_PER_SECOND="0") as served:
        opened = Watched(served)
        yield opened
        opened.http.close()


@pytest.fixture
def own(shared: Watched) -> Iterator[Watched]:
    """The module's service as a provider of the test's own sees it: there are no nodes but those that it adds."""
    opened = Watched(shared.served, owner=f"owner-{uuid4()}")
    yield opened
    opened.http.close()


@pytest.fixture
def page(chromium: Chromium) -> Iterator[Page]:
    """A page of the test's own; at the end it must have had nothing to complain of."""
    with chromium.page() as page:
        yield page
        assert [fault for fault in page.faults() if "Failed to load resource" not in fault] == []
