"""All checks in their order, and the run of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from lucid_compute.agent.doctor import access_checks, heartbeat_checks, model_checks, reach_checks, server_checks
from lucid_compute.agent.doctor.check import Check, CheckFinding, CheckVerdict, DoctorContext, Result, failed, skipped
from lucid_compute.client import AsyncLucid, LucidClientError

CHECKS = (
    Check("service", "Service", (), access_checks.check_service),
    Check("key", "Key", ("service",), access_checks.check_key),
    Check("scope", "Scope", ("key",), access_checks.check_scope),
    Check("node", "Node", ("scope",), access_checks.check_node),
    Check("passport", "Passport", ("node",), access_checks.check_passport),
    Check("drain", "Drain", ("passport",), heartbeat_checks.check_drain),
    Check("heartbeats", "Heartbeats", ("passport",), heartbeat_checks.check_heartbeats),
    Check("report", "What it reports", ("heartbeats",), heartbeat_checks.check_report),
    Check("probe", "From the service", ("passport",), reach_checks.check_probe),
    Check("clock", "Clock", ("probed",), heartbeat_checks.check_clock),
    Check("tls", "TLS", ("passport",), reach_checks.check_tls),
    Check("server", "From here", ("passport",), server_checks.check_server),
    Check("runtime", "Runtime", ("server",), server_checks.check_runtime),
    Check("metrics", "Metrics", ("detected",), server_checks.check_metrics),
    Check("models", "Models", ("detected",), server_checks.check_models),
    Check("context", "Context", ("detected",), server_checks.check_context),
    Check("capacity", "Concurrency", ("detected",), heartbeat_checks.check_capacity),
    Check("vram", "VRAM", ("heartbeats",), model_checks.check_vram),
    Check("catalogue", "Known models", ("passport",), model_checks.check_catalogue),
    Check("fit", "VRAM for models", ("catalogue",), model_checks.check_fit),
    Check("availability", "Availability", ("catalogue",), model_checks.check_availability),
    Check("pace", "Pace", ("heartbeats",), heartbeat_checks.check_pace),
)
# Later checks may need what a check found out, even if it failed: the check, and whether the finding is there.
KNOWN: dict[str, tuple[str, Callable[[DoctorContext], bool]]] = {
    "probed": ("probe", lambda context: hasattr(context, "probe")),
    "detected": ("runtime", lambda context: hasattr(context, "reading")),
}


async def examine(
    lucid: AsyncLucid, node: str | None = None, url: str | None = None, inference_key: str | None = None
) -> AsyncIterator[Result]:
    """Yield the result of each check as soon as it is known. `url` is the inference server as seen from here."""
    context = DoctorContext(lucid, node, url, inference_key)
    verdicts: dict[str, CheckVerdict] = {}
    try:
        for check in CHECKS:
            for finding in await _run(check, context, verdicts):
                verdicts[check.id] = finding.verdict
                yield Result(check.id, check.title, finding)
    finally:
        if hasattr(context, "server"):
            await context.server.close()


async def _run(check: Check, context: DoctorContext, verdicts: dict[str, CheckVerdict]) -> list[CheckFinding]:
    if (missing := _find_missing(check, context, verdicts)) is not None:
        return [skipped(f"It needs {missing!r}, which did not come out well.", needs=missing)]
    try:
        found = await check.run(context)
    except LucidClientError as error:
        return [failed(f"The service did not answer the question: {error}", "Run lucid doctor again.")]
    return found if isinstance(found, list) else [found]


def _find_missing(check: Check, context: DoctorContext, verdicts: dict[str, CheckVerdict]) -> str | None:
    """Return the check that this one needs and that did not pass; None when nothing is missing."""
    for need in check.needs:
        source, is_known = KNOWN.get(need, (need, None))
        if is_known is not None:
            if not is_known(context):
                return source
        elif verdicts[need] not in {CheckVerdict.PASS, CheckVerdict.WARN}:
            return source
    return None
