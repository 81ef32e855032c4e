"""The synchronous client."""

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
from lucid_compute.client.methods import Listed, Noun, Sent
from lucid_compute.client.settings import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_SECONDS,
    DEFAULT_TOTAL_TIMEOUT_SECONDS,
    read_settings,
)
from lucid_compute.client.transport import Transport


class Passports(Noun):
    """What can be done with passports."""

    create = Sent(passport_calls.create)
    get = Sent(passport_calls.get)
    list = Listed(passport_calls.list_)
    update = Sent(passport_calls.update)
    revoke = Sent(passport_calls.revoke)


class Compute(Noun):
    """What can be done with nodes."""

    heartbeat = Sent(compute_calls.heartbeat)
    send = Sent(compute_calls.send)
    health = Sent(compute_calls.health)
    update_models = Sent(compute_calls.update_models)
    declared_models = Sent(compute_calls.declared_models)
    drain = Sent(compute_calls.drain)
    resume = Sent(compute_calls.resume)
    deregister = Sent(compute_calls.deregister)
    list = Listed(compute_calls.list_)
    events = Listed(compute_calls.events)
    jobs = Listed(compute_calls.jobs)
    probe = Sent(compute_calls.probe)
    overview = Sent(compute_calls.overview)


class Models(Noun):
    """What can be asked about models; nobody needs a key for it."""

    list = Listed(model_calls.list_)
    get = Sent(model_calls.get)
    availability = Sent(model_calls.availability)


class Metrics(Noun):
    """What can be read of what happened: series over time, and uptimes."""

    node = Sent(metrics_calls.node)
    fleet = Sent(metrics_calls.fleet)
    uptime = Sent(metrics_calls.uptime)
    uptimes = Listed(metrics_calls.uptimes)


class Payouts(Noun):
    """What was earned, what was lost, and closed periods."""

    statement = Sent(payout_calls.statement)
    get = Sent(payout_calls.get)
    losses = Sent(payout_calls.losses)
    close_period = Sent(payout_calls.close_period)
    periods = Listed(payout_calls.periods)
    period_statement = Sent(payout_calls.period_statement)
    period = Sent(payout_calls.period)


class Keys(Noun):
    """What admins can do with keys."""

    create = Sent(key_calls.create)
    list = Listed(key_calls.list_)
    rotate = Sent(key_calls.rotate)
    revoke = Sent(key_calls.revoke)


class Webhooks(Noun):
    """What can be done with webhooks."""

    create = Sent(webhook_calls.create)
    list = Listed(webhook_calls.list_)
    rotate = Sent(webhook_calls.rotate)
    delete = Sent(webhook_calls.delete)
    test = Sent(webhook_calls.test)
    deliveries = Listed(webhook_calls.deliveries)


class Lucid(Noun):
    """The service, as a synchronous program speaks to it.

    with Lucid() as lucid:
        node = lucid.passports.create(name="my-gpu-node", type="compute", metadata={...})

    Any number of threads may share it. Left, or closed with `close`, it closes its connections.
    """

    audit = Listed(key_calls.audit)
    match = Sent(service_calls.match)
    ready = Sent(service_calls.ready)
    healthz = Sent(service_calls.healthz)

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
        super().__init__(Transport(settings))
        self.passports = Passports(self.transport)
        self.compute = Compute(self.transport)
        self.models = Models(self.transport)
        self.keys = Keys(self.transport)
        self.payouts = Payouts(self.transport)
        self.metrics = Metrics(self.transport)
        self.webhooks = Webhooks(self.transport)

    def __repr__(self) -> str:
        """Answer the address; never the key."""
        return f"Lucid({self.base_url!r})"

    @property
    def base_url(self) -> str:
        """The service's address, without a trailing slash."""
        return self.transport.exchange.base_url

    def close(self) -> None:
        """Close every connection; it can't be used any more."""
        self.transport.close()

    def __enter__(self) -> Self:
        """Answer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
