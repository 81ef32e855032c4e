"""Connections: none is left open by who gives up on opening it."""

from __future__ import annotations

import asyncio

import pytest

from lucid_compute.storage import database
from tests.ledger import read
from tests.lucid_serve import eventually


async def test_a_connection_that_is_given_up_while_it_is_set_up_is_closed(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(database, "_SESSION", "SELECT pg_sleep(2), {lock_timeout}")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await database.connect(database_url, application="lucid given up")

    async def is_gone() -> bool:
        return not await read(database_url, "SELECT FROM pg_stat_activity WHERE application_name = 'lucid given up'")

    await eventually(is_gone)
