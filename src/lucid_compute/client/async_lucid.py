"""The asynchronous client."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from lucid_compute.client import (
    compute_calls,
    key_calls,
    metrics_calls,
    model_calls,
    passport_calls,
    payout_calls,
    service_calls,
    webhook_calls,
)
from lucid_compute.client.methods import AsyncListed, AsyncNoun, AsyncSent
from lucid_compute.client.settings import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_SECONDS,
    DEFAULT_TOTAL_TIMEOUT_SECONDS,
    read_settings,
)
from lucid_compute.client.transport import AsyncTransport


class AsyncPassports(AsyncNoun):
    """What can be done with passports."""

    create = AsyncSent(passport_calls.create)
    get = AsyncSent(passport_calls.get)
    list = AsyncListed(passport_calls.list_)
    update = AsyncSent(passport_calls.update)
    revoke = AsyncSent(passport_calls.revoke)


class AsyncCompute(AsyncNoun):
    """What can be done with nodes."""

    heartbeat = AsyncSent(compute_calls.heartbeat)
    send = AsyncSent(compute_calls.send)
    health = AsyncSent(compute_calls.health)
    update_models = AsyncSent(compute_calls.update_models)
    declared_models = AsyncSent(compute_calls.declared_models)
    drain = AsyncSent(compute_calls.drain)
    resume = AsyncSent(compute_calls.resume)
    deregister = AsyncSent(compute_calls.deregister)
    list = AsyncListed(compute_calls.list_)
    events = AsyncListed(compute_calls.events)
    jobs = AsyncListed(compute_calls.jobs)
    probe = AsyncSent(compute_calls.probe)
    overview = AsyncSent(compute_calls.overview)


class AsyncModels(AsyncNoun):
    """What can be asked about models; nobody needs a key for it."""

    list = AsyncListed(model_calls.list_)
    get = AsyncSent(model_calls.get)
    availability = AsyncSent(model_calls.availability)


class AsyncMetrics(AsyncNoun):
    """What can be read of what happened: series over time, and uptimes."""

    node = AsyncSent(metrics_calls.node)
    fleet = AsyncSent(metrics_calls.fleet)
    uptime = AsyncSent(metrics_calls.uptime)
    uptimes = AsyncListed(metrics_calls.uptimes)


class AsyncPayouts(AsyncNoun):
    """What was earned, what was lost, and closed periods."""

    statement = AsyncSent(payout_calls.statement)
    get = AsyncSent(payout_calls.get)
    losses = AsyncSent(payout_calls.losses)
    close_period = AsyncSent(payout_calls.close_period)
    periods = AsyncListed(payout_calls.periods)
    period_statement = AsyncSent(payout_calls.period_statement)
    period = AsyncSent(payout_calls.period)


class AsyncKeys(AsyncNoun):
    """What admins can do with keys."""

    create = AsyncSent(key_calls.create)
    list = AsyncListed(key_calls.list_)
    rotate = AsyncSent(key_calls.rotate)
    revoke = AsyncSent(key_calls.revoke)


class AsyncWebhooks(AsyncNoun):
    """What can be done with webhooks."""

    create = AsyncSent(webhook_calls.create)
    list = AsyncListed(webhook_calls.list_)
    rotate = AsyncSent(webhook_calls.rotate)
    delete = AsyncSent(webhook_calls.delete)
    test = AsyncSent(webhook_calls.test)
    deliveries = AsyncListed(webhook_calls.deliveries)


class AsyncLucid(AsyncNoun):
    """The service, as an asyncio program speaks to it.

    async with AsyncLucid() as lucid:
        node = await lucid.passports.create(name="my-gpu-node", type="compute", metadata={...})

    One event loop uses it. Left, or closed with `aclose`, it closes its connections.
    """

    audit = AsyncListed(key_calls.audit)
    match = AsyncSent(service_calls.match)
    ready = AsyncSent(service_calls.ready)
    healthz = AsyncSent(service_calls.healthz)

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        total_timeout_seconds: float = DEFAULT_TOTAL_TIMEOUT_SECONDS,
        retries: int = DEFAULT_RETRIES,
        ca_file: str | Path | None = None,
    ) -> None:
        """Connect to nothing yet. Address and key are those of LUCID_API_URL and LUCID_API_KEY when they are None.

        `timeout_seconds` bounds each attempt, `total_timeout_seconds` all of a call's with the pauses between them.
        `ca_file` holds the authorities to trust instead of the system's.

        Raises:
            ConfigurationFault: one of them can't be used.
        """
        settings = read_settings(
            base_url,
            api_key,
            timeout_seconds=timeout_seconds,
            total_timeout_seconds=total_timeout_seconds,
            retries=retries,
            ca_file=ca_file,
        )
        super().__init__(AsyncTransport(settings))
        self.passports = AsyncPassports(self.transport)
        self.compute = AsyncCompute(self.transport)
        self.models = AsyncModels(self.transport)
        self.keys = AsyncKeys(self.transport)
        self.payouts = AsyncPayouts(self.transport)
        self.metrics = AsyncMetrics(self.transport)
        self.webhooks = AsyncWebhooks(self.transport)

    def __repr__(self) -> str:
        """Answer the address; never the key."""
        return f"AsyncLucid({self.base_url!r})"

    @property
    def base_url(self) -> str:
        """The service's address, without a trailing slash."""
        return self.transport.exchange.base_url

    async def aclose(self) -> None:
        """Close every connection; it can't be used any more."""
        await self.transport.close()

    async def __aenter__(self) -> Self:
        """Answer itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.aclose()
