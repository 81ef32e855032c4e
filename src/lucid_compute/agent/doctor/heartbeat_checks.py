"""Checks of the heartbeats: whether they arrive, how often, and what they report."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from lucid_compute.agent.doctor.check import CheckFinding, DoctorContext, failed, passed, skipped, warned
from lucid_compute.registry.domain.node_state import (
    FRESH_SECONDS,
    HEARTBEAT_INTERVAL_SECONDS,
    ReportedStatus,
)
from lucid_compute.registry.matching_engine import ReasonCode

CLOCK_SECONDS = 5.0
PACE_SECONDS = HEARTBEAT_INTERVAL_SECONDS * 1.5  # after this time a heartbeat is late or lost
POLL_SECONDS = 1.0


async def check_drain(context: DoctorContext) -> CheckFinding:
    """Is the node being drained?"""
    reported = context.health.reported
    if not any(reason.code == ReasonCode.DRAINING for reason in context.health.reasons):
        return passed("Nobody drains the node.")
    context.reported_codes.add("DRAINING")
    if reported is None or reported.status is not ReportedStatus.DRAINING:
        fix = f"End the drain when the work is done: lucid resume {context.called}"
        return failed("An operator drains the node.", fix)
    said = "The node said that it stops" if context.health.stopped else "The node's own heartbeats say that it drains"
    return failed(f"{said}{_because(reported.detail)}.", "Start its agent again: lucid agent run")


async def check_heartbeats(context: DoctorContext) -> CheckFinding:
    """Do heartbeats arrive?"""
    age = context.health.heartbeat_age_seconds
    if age is None:
        context.reported_codes.add("HEARTBEAT_MISSING")
        return failed(
            "No heartbeat was ever received.",
            f"Start the node's agent, or have your sender send the passportId {context.node.id}: lucid agent run",
        )
    if not context.health.fresh:
        context.reported_codes.add("HEARTBEAT_STALE")
        return failed(
            f"The newest heartbeat is {age:.0f} s old; after {FRESH_SECONDS} s the node counts for no model.",
            "Start the sender again: lucid agent run"
            if context.health.stopped
            else "See whether the sender still runs and reaches the service, and start it again: lucid agent run",
        )
    return passed(f"The newest heartbeat is {age:.0f} s old.")


async def check_report(context: DoctorContext) -> CheckFinding:
    """Does the node report that it is healthy?"""
    reported = context.health.reported
    if reported is not None and reported.status is ReportedStatus.UNHEALTHY:
        context.reported_codes.add("REPORTED_UNHEALTHY")
        return failed(
            f"The node's heartbeats say that it is unhealthy{_because(reported.detail)}.",
            f"Look at the inference server and its log: lucid agent inspect --url {context.url}",
        )
    if reported is not None and reported.status is ReportedStatus.DRAINING:
        return skipped("The node says that it drains, and nothing else of itself.", needs="drain")
    return passed("The node says that it is healthy.")


async def check_pace(context: DoctorContext) -> CheckFinding:
    """Do heartbeats come so often that one may be lost?"""
    last, age = context.health.last_heartbeat_at, context.health.heartbeat_age_seconds
    while age is not None and age <= PACE_SECONDS:
        await asyncio.sleep(min(POLL_SECONDS, PACE_SECONDS / 10))
        health = await context.lucid.compute.health(context.node.id)
        if health.last_heartbeat_at != last:
            return passed(f"The next heartbeat came within {PACE_SECONDS:.0f} s.")
        age = health.heartbeat_age_seconds
    return warned(
        f"No heartbeat for {age or 0:.0f} s. Senders should send one every {HEARTBEAT_INTERVAL_SECONDS:.0f} s; a node "
        f"with one every {FRESH_SECONDS} s is stale for a moment each time.",
        "Have the sender wait nextHeartbeatInSeconds of each response, or use: lucid agent run",
    )


async def check_clock(context: DoctorContext) -> CheckFinding:
    """Does this machine's clock agree with the service's?"""
    ahead = (datetime.now(UTC) - context.probe.checked_at).total_seconds()
    if abs(ahead) > CLOCK_SECONDS:
        return warned(
            f"This machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the service's.",
            "Synchronise this machine's clock: timedatectl set-ntp true",
        )
    reported = context.health.reported
    if reported is None or reported.clock_offset_seconds is None or abs(reported.clock_offset_seconds) < CLOCK_SECONDS:
        return passed(f"This machine's clock is within {CLOCK_SECONDS:.0f} s of the service's.")
    offset = reported.clock_offset_seconds
    return warned(
        f"The clock of the heartbeats' sender is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} the "
        "service's, the way between them included.",
        "Synchronise the clock of the node's machine: timedatectl set-ntp true",
    )


async def check_capacity(context: DoctorContext) -> CheckFinding:
    """Does the node take as many requests as its server does at a time?"""
    limit, slots = context.metadata_number("maxConcurrency"), context.reading.max_concurrency
    if slots is None:
        return skipped("The inference server does not say how many requests it takes at a time.")
    fix = f"Set it to what the server takes: lucid passports update {context.called} --set maxConcurrency={slots}"
    if limit is None:
        return warned(f"The passport has no maxConcurrency, and the server takes {slots} requests at a time.", fix)
    if limit > slots:
        return warned(f"maxConcurrency is {limit:.0f}, and the server takes {slots}: the rest waits in it.", fix)
    return passed(f"maxConcurrency is {limit:.0f}; the server takes {slots} at a time.")


def _because(detail: str | None) -> str:
    return f": {detail.rstrip('.')}" if detail else ""
