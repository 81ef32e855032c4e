"""What a question for metrics asks: a span of time in steps, series by name, JSON or CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Literal

from fastapi import Depends, Query
from pydantic import TypeAdapter, ValidationError

from lucid_compute.errors import InvalidRequest
from lucid_compute.field_types import Instant
from lucid_compute.metric_series import SERIES_NAMES
from lucid_compute.timeline import EPOCH, MAX_POINTS, STEPS, Timeline, auto_step

_RELATIVE = re.compile(r"-([0-9]{1,6})([mhdw])")
_UNITS = {
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
_INSTANT = TypeAdapter[datetime](Instant)
_MOMENT = "An RFC 3339 instant, or how long ago: -90m, -1h, -7d, -4w."

Step = Literal["auto", "1m", "5m", "1h", "1d"]


@dataclass(frozen=True, slots=True)
class MetricsQuery:
    """Which span, in which steps, and which series of it."""

    since: str
    until: str | None
    step: Step
    series: tuple[str, ...]

    def timeline(self, now: datetime) -> Timeline:
        """Answer the steps that hold the span.

        Raises:
            InvalidRequest: a moment can't be read, the span ends before it begins, or there would be too many steps.
        """
        since, until = _read_moment("from", self.since, now), now
        if self.until is not None:
            until = _read_moment("to", self.until, now)
        if until < since:
            message = "`to` lies before `from`, which is an hour ago when it is left out. Send one that is not earlier."
            raise InvalidRequest.at("query.to", message)
        step = auto_step(since, until) if self.step == "auto" else STEPS[self.step]
        if (until - since) // step >= MAX_POINTS:
            message = f"That is more than {MAX_POINTS} points. Take a longer step or a shorter span."
            raise InvalidRequest.at("query.step", message)
        try:
            return Timeline.around(since, until, step)
        except OverflowError:
            raise InvalidRequest.at(
                "query.to", "That step ends beyond the calendar. Send an earlier instant."
            ) from None


async def get_query(
    from_: Annotated[str, Query(alias="from", description=_MOMENT)] = "-1h",
    to: Annotated[str | None, Query(description=f"{_MOMENT} Now, when it is left out.")] = None,
    step: Annotated[Step, Query(description="`auto` takes the shortest that makes no more than 300 points.")] = "auto",
    series: Annotated[
        list[str] | None,
        Query(description=f"Names, separated by commas; all, when it is left out: {', '.join(SERIES_NAMES)}."),
    ] = None,
) -> MetricsQuery:
    """Answer what is asked.

    Raises:
        InvalidRequest: there is no such series.
    """
    return MetricsQuery(from_, to, step, _read_names(series))


MetricsQueryDependency = Annotated[MetricsQuery, Depends(get_query)]


def _read_names(series: Sequence[str] | None) -> tuple[str, ...]:
    if series is None:
        return SERIES_NAMES
    names = tuple(dict.fromkeys(name.strip() for entry in series for name in entry.split(",") if name.strip()))
    for name in names:
        if name not in SERIES_NAMES:
            raise InvalidRequest.at("query.series", f"There is no series {name!r}. GET /docs lists them.")
    return names or SERIES_NAMES


def _read_moment(name: str, moment: str, now: datetime) -> datetime:
    try:
        if found := _RELATIVE.fullmatch(moment):
            instant = now - int(found[1]) * _UNITS[found[2]]
        else:
            instant = now if moment == "now" else _INSTANT.validate_python(moment)
    except (OverflowError, ValidationError):
        message = "Send an RFC 3339 instant such as 2026-01-31T12:00:00Z, or how long ago: -90m, -1h, -7d."
        raise InvalidRequest.at(f"query.{name}", message) from None
    if instant < EPOCH:  # Python's first years can't be told to Postgres in every time zone
        raise InvalidRequest.at(f"query.{name}", "Send an instant from 1970 on.")
    return instant
