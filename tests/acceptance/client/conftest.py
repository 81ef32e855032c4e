"""One service for each module of clients' tests. Each test has an owner of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from lucid_compute.client import AsyncLucid
from tests.lucid_serve import Served, serving_on_a_clone


@pytest.fixture(scope="module")
def served(postgres_and_template: tuple[str, str]) -> Iterator[Served]:
    """Serve all tests of a module."""
    with serving_on_a_clone(postgres_and_template) as served:
        yield served


@pytest.fixture
async def admin(served: Served) -> AsyncIterator[AsyncLucid]:
    """Connect as the operator, with the Python client."""
    async with AsyncLucid(served.url, served.admin_key) as lucid:
        yield lucid
