"""Where a request would go, and jobs, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType

from lucid_compute.cli.model_tables import node_reasons, what_to_do
from lucid_compute.cli.output import Column, Listing, sentence
from lucid_compute.cli.plain_text import instant, number, or_unknown, share, yes_or_no
from lucid_compute.wire.inference import MatchAnswer, RankedNode
from lucid_compute.wire.jobs import JobView

RANK_COLUMNS = (
    Column("NODE", shortest=12),
    Column("WAIT", right=True),
    Column("FRESH"),
    Column("IN FLIGHT", rank=1, right=True),
    Column("QUEUE", rank=2, right=True),
    Column("LOAD", rank=2, right=True),
    Column("REGION", rank=3),
    Column("ID", rank=4),
)
JOB_COLUMNS = (
    Column("STARTED"),
    Column("MODEL", shortest=12),
    Column("OUTCOME"),
    Column("REASON", rank=2, shortest=10),
    Column("TOKENS", rank=1, right=True),
    Column("FIRST", rank=3, right=True),
    Column("TOOK", rank=1, right=True),
    Column("USD", rank=4, right=True),
    Column("NODE", rank=5),
    Column("ID", rank=6),
)


def match_parts(answer: MatchAnswer) -> list[RenderableType]:
    """Answer the ranking, and every node that may not with every reason."""
    parts: list[RenderableType] = []
    if answer.chosen is not None:
        parts.append(sentence(f"A request for {answer.model} would go to {answer.chosen.name}.", style="bold"))
        parts += [sentence(""), Listing(RANK_COLUMNS, map(_ranked, answer.shortlist))]
    else:
        parts.append(sentence(f"A request for {answer.model} would be refused: no node may be sent it.", style="bold"))
    rejected = [(node.name, node.reasons) for node in answer.rejected]
    if rejected:
        parts += [sentence(""), sentence("Left out:"), *node_reasons(rejected)]
    return parts + what_to_do(rejected, answer.rejections)


def job_table(jobs: Iterable[JobView]) -> Listing:
    """Answer jobs as they were listed."""
    return Listing(JOB_COLUMNS, [_job(job) for job in jobs])


def _ranked(node: RankedNode) -> tuple[str, ...]:
    return (
        node.name,
        number(round(node.score, 1), "ms"),
        yes_or_no(node.fresh),
        number(node.in_flight),
        number(node.queue_depth),
        share(node.load),
        or_unknown(node.region),
        node.passport_id,
    )


def _job(job: JobView) -> tuple[str, ...]:
    tokens = "-" if job.tokens_out is None else f"{job.tokens_in or 0:,}+{job.tokens_out:,}"
    return (
        instant(job.started_at),
        job.model,
        job.outcome.value,
        or_unknown(job.reason),
        tokens,
        number(job.first_byte_ms and round(job.first_byte_ms), "ms"),
        number(job.latency_ms and round(job.latency_ms), "ms"),
        or_unknown(job.price_usd),
        or_unknown(job.passport_id),
        job.id,
    )
