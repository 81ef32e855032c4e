"""What closed periods can refuse: two more leaves of the error tree of `errors`."""

from __future__ import annotations

from datetime import date

from lucid_compute.errors import Conflict, NotFound


class PeriodNotFound(NotFound):
    """No closed period has that id."""

    code = "PERIOD_NOT_FOUND"

    def __init__(self, period_id: str) -> None:
        """Name the id that was asked for."""
        super().__init__(
            f"No closed period has the id {period_id!r}. GET /payouts/periods lists them.",
            details={"periodId": period_id},
        )


class PeriodConflict(Conflict):
    """The period to be closed leaves days out, or holds some that are closed already."""

    code = "PERIOD_CONFLICT"

    def __init__(self, message: str, starts_on: date) -> None:
        """Say where it has to begin."""
        super().__init__(message, details={"from": starts_on.isoformat()})
