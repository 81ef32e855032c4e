"""A job as the text of one `job_row` in a Postgres array: what `COMMIT_JOBS` is given."""

from __future__ import annotations

import re

from lucid_compute.jobs import Job

MAX_TEXTS = 10_000  # remembered with their quotes
_NEEDS_NO_QUOTES = re.compile(r"[A-Za-z0-9_./:@+-]+")


class _Quoted(dict[str | None, str]):
    """Texts as they stand in a row: the same few models, owners and endpoints come again and again."""

    def __missing__(self, text: str | None) -> str:
        if len(self) >= MAX_TEXTS:
            self.clear()
        quoted = self[text] = _quote(text)
        return quoted


class RowWriter:
    """Writes the rows of one replica."""

    __slots__ = ("_quoted", "_replica_id")

    def __init__(self, replica_id: str) -> None:
        """Name `replica_id` in each row."""
        self._replica_id = replica_id
        self._quoted = _Quoted()

    def write(self, job: Job) -> str:
        """Answer the job's row, in the order of the type's fields; one expression, for this is on every request's way.

        Instants are exact to the microsecond until the year 2106, when a float no longer tells them apart.

        Raises:
            ValueError, OverflowError: a duration is not a number, or has no end.
        """
        text = self._quoted
        status, tokens_in, tokens_out, price = job.status, job.tokens_in, job.tokens_out, job.price_usd
        first_byte, latency = job.first_byte_ms, job.latency_ms
        return (
            f'"({job.id},{job.attempt},{self._replica_id},{job.model_id},{text[job.model_name]},'
            f"{job.node_id or ''},{text[job.node_owner]},{text[job.key_id]},{text[job.consumer]},{text[job.endpoint]},"
            f"{'t' if job.is_stream else 'f'},{int(job.started_at.timestamp() * 1e6 + 0.5)},{job.outcome._value_},"
            f"{text[job.reason]},{'' if status is None else status},"
            f"{'' if first_byte is None else int(first_byte * 1000)},{'' if latency is None else int(latency * 1000)},"
            f"{'' if tokens_in is None else tokens_in},{'' if tokens_out is None else tokens_out},"
            f'{"t" if job.are_tokens_counted else "f"},{"" if price is None else str(price)})"'
        )


def _quote(text: str | None) -> str:
    """Answer a text as it stands in a row that stands in an array: both have quotes, and both escape.

    What Postgres can't keep (a NUL, half a surrogate pair) is replaced, so that no text costs a job its row.
    """
    if text is None:
        return ""
    if _NEEDS_NO_QUOTES.fullmatch(text):
        return text
    kept = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    return _escape(f'"{_escape(kept)}"')


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
