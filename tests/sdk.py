"""Both clients of the SDK behind one face, so that one test holds for each."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, Self

from lucid_compute.client import AsyncLucid, AsyncPages, Lucid, Pages

KINDS = (Lucid, AsyncLucid)
Kind = type[Lucid] | type[AsyncLucid]


class Speaker:
    """Speaks through one client; the synchronous one does it in a thread, so that the test's servers go on."""

    def __init__(self, lucid: Lucid | AsyncLucid) -> None:
        self.lucid = lucid

    async def ask(self, question: Callable[[Any], Any]) -> Any:
        """Return what `question` answers when it is given the client; of a list, its items."""
        if isinstance(self.lucid, Lucid):
            return await asyncio.to_thread(lambda: _listed(question(self.lucid)))
        answer = question(self.lucid)
        if isinstance(answer, AsyncPages) or inspect.isasyncgen(answer):
            return [item async for item in answer]
        return await answer

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the client."""
        if isinstance(self.lucid, Lucid):
            self.lucid.close()
        else:
            await self.lucid.aclose()


def speaker(kind: Kind, base_url: str, api_key: str | None = "lk_live_secret", **options: Any) -> Speaker:
    """A client of `kind`; it does not repeat calls unless it is told to."""
    return Speaker(kind(base_url, api_key, **{"retries": 0, "timeout_seconds": 5.0, **options}))


def _listed(answer: Any) -> Any:
    return list(answer) if isinstance(answer, Pages) or inspect.isgenerator(answer) else answer
