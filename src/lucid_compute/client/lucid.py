"""The two clients, `Lucid` and `AsyncLucid`: each endpoint is named once, for both."""

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
    usage_calls,
    webhook_calls,
)
from lucid_compute.client.resources import AsyncResource, Endpoint, PagedEndpoint, Resource
from lucid_compute.client.settings import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_SECONDS,
    DEFAULT_TOTAL_TIMEOUT_SECONDS,
    read_settings,
)
from lucid_compute.client.transport import AsyncTransport, Transport


class _Passports:
    create = Endpoint(passport_calls.create)
    create_many = Endpoint(passport_calls.create_many)
    get = Endpoint(passport_calls.get)
    list = PagedEndpoint(passport_calls.list_)
    update = Endpoint(passport_calls.update)
    revoke = Endpoint(passport_calls.revoke)


class PassportsResource(_Passports, Resource):
    """Passports of nodes, models and other things."""


class AsyncPassportsResource(_Passports, AsyncResource):
    """Passports of nodes, models and other things."""


class _Compute:
    heartbeat = Endpoint(compute_calls.heartbeat)
    send = Endpoint(compute_calls.send)
    health = Endpoint(compute_calls.health)
    update_models = Endpoint(compute_calls.update_models)
    declared_models = Endpoint(compute_calls.declared_models)
    drain = Endpoint(compute_calls.drain)
    resume = Endpoint(compute_calls.resume)
    deregister = Endpoint(compute_calls.deregister)
    list = PagedEndpoint(compute_calls.list_)
    events = PagedEndpoint(compute_calls.events)
    routing = Endpoint(compute_calls.routing)
    fleet_events = PagedEndpoint(compute_calls.fleet_events)
    jobs = PagedEndpoint(compute_calls.jobs)
    probe = Endpoint(compute_calls.probe)
    overview = Endpoint(compute_calls.overview)


class ComputeResource(_Compute, Resource):
    """Nodes."""


class AsyncComputeResource(_Compute, AsyncResource):
    """Nodes."""


class _Models:
    list = PagedEndpoint(model_calls.list_)
    get = Endpoint(model_calls.get)
    availability = Endpoint(model_calls.availability)


class ModelsResource(_Models, Resource):
    """Models. These methods need no key."""


class AsyncModelsResource(_Models, AsyncResource):
    """Models. These methods need no key."""


class _Metrics:
    node = Endpoint(metrics_calls.node)
    node_csv = Endpoint(metrics_calls.node_csv)
    fleet = Endpoint(metrics_calls.fleet)
    fleet_csv = Endpoint(metrics_calls.fleet_csv)
    uptime = Endpoint(metrics_calls.uptime)
    fleet_uptime = Endpoint(metrics_calls.fleet_uptime)
    uptimes = PagedEndpoint(metrics_calls.uptimes)


class MetricsResource(_Metrics, Resource):
    """Metrics over time, and uptime."""


class AsyncMetricsResource(_Metrics, AsyncResource):
    """Metrics over time, and uptime."""


class _Payouts:
    statement = Endpoint(payout_calls.statement)
    get = Endpoint(payout_calls.get)
    losses = Endpoint(payout_calls.losses)
    close_period = Endpoint(payout_calls.close_period)
    correct_period = Endpoint(payout_calls.correct_period)
    periods = PagedEndpoint(payout_calls.periods)
    period_statement = Endpoint(payout_calls.period_statement)
    period = Endpoint(payout_calls.period)


class PayoutsResource(_Payouts, Resource):
    """Earnings, losses and closed periods."""


class AsyncPayoutsResource(_Payouts, AsyncResource):
    """Earnings, losses and closed periods."""


class _Usage:
    get = Endpoint(usage_calls.get)
    csv = Endpoint(usage_calls.csv)


class UsageResource(_Usage, Resource):
    """What keys have used, and what it cost."""


class AsyncUsageResource(_Usage, AsyncResource):
    """What keys have used, and what it cost."""


class _Keys:
    create = Endpoint(key_calls.create)
    list = PagedEndpoint(key_calls.list_)
    update = Endpoint(key_calls.update)
    me = Endpoint(key_calls.me)
    rotate = Endpoint(key_calls.rotate)
    revoke = Endpoint(key_calls.revoke)


class KeysResource(_Keys, Resource):
    """API keys, for admins."""


class AsyncKeysResource(_Keys, AsyncResource):
    """API keys, for admins."""


class _Webhooks:
    create = Endpoint(webhook_calls.create)
    list = PagedEndpoint(webhook_calls.list_)
    rotate = Endpoint(webhook_calls.rotate)
    delete = Endpoint(webhook_calls.delete)
    test = Endpoint(webhook_calls.test)
    deliveries = PagedEndpoint(webhook_calls.deliveries)


class WebhooksResource(_Webhooks, Resource):
    """Webhooks and their deliveries."""


class AsyncWebhooksResource(_Webhooks, AsyncResource):
    """Webhooks and their deliveries."""


class _Lucid:
    audit = PagedEndpoint(key_calls.audit)
    match = Endpoint(service_calls.match)
    ready = Endpoint(service_calls.ready)
    service = Endpoint(service_calls.service)
    healthz = Endpoint(service_calls.healthz)

    transport: Transport | AsyncTransport

    def __repr__(self) -> str:
        """Return the client's name and the address; never the key."""
        return f"{type(self).__name__}({self.base_url!r})"

    @property
    def base_url(self) -> str:
        """The service's address, without a trailing slash."""
        return self.transport.codec.base_url


class Lucid(_Lucid, Resource):
    """The synchronous client of the service.

    with Lucid() as lucid:
        node = lucid.passports.create(name="my-gpu-node", type="compute", metadata={...})

    Any number of threads may share it. It closes its connections at the end of the `with` block, or with `close`.
    """

    transport: Transport

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
        """Prepare a client; it connects at the first call.

        An address or a key that is None comes from LUCID_API_URL or LUCID_API_KEY. `timeout_seconds` bounds each
        attempt, `total_timeout_seconds` all attempts of a call and the pauses between them. `ca_file` holds the
        certificate authorities to trust instead of the system's.

        Raises:
            ConfigurationFault: an argument can't be used.
        """
        settings = read_settings(
            base_url,
            api_key,
            timeout_seconds=timeout_seconds,
            total_timeout_seconds=total_timeout_seconds,
            retries=retries,
            ca_file=ca_file,
        )
        super().__init__(Transport(settings))
        self.passports = PassportsResource(self.transport)
        self.compute = ComputeResource(self.transport)
        self.models = ModelsResource(self.transport)
        self.keys = KeysResource(self.transport)
        self.usage = UsageResource(self.transport)
        self.payouts = PayoutsResource(self.transport)
        self.metrics = MetricsResource(self.transport)
        self.webhooks = WebhooksResource(self.transport)

    def close(self) -> None:
        """Close every connection. The client can't be used afterwards."""
        self.transport.close()

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the client."""
        self.close()


class AsyncLucid(_Lucid, AsyncResource):
    """The asynchronous client of the service.

    async with AsyncLucid() as lucid:
        node = await lucid.passports.create(name="my-gpu-node", type="compute", metadata={...})

    It belongs to one event loop. It closes its connections at the end of the `async with` block, or with `aclose`.
    """

    transport: AsyncTransport

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
        """Prepare a client; it connects at the first call. The arguments are those of `Lucid`.

        Raises:
            ConfigurationFault: an argument can't be used.
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
        self.passports = AsyncPassportsResource(self.transport)
        self.compute = AsyncComputeResource(self.transport)
        self.models = AsyncModelsResource(self.transport)
        self.keys = AsyncKeysResource(self.transport)
        self.usage = AsyncUsageResource(self.transport)
        self.payouts = AsyncPayoutsResource(self.transport)
        self.metrics = AsyncMetricsResource(self.transport)
        self.webhooks = AsyncWebhooksResource(self.transport)

    async def aclose(self) -> None:
        """Close every connection. The client can't be used afterwards."""
        await self.transport.close()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the client."""
        await self.aclose()
