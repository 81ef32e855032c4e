"""What a command's exit status means to a script; docs/cli.md lists the same."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """How a command ended."""

    OK = 0
    REFUSED = 1  # the service said no, or what was asked about is not so
    USAGE = 2  # the command line can't be understood, or is not precise enough
    UNREACHABLE = 3  # no answer, or one that says: not now; trying again may help
    NOT_AUTHORISED = 4  # no key, an unknown one, or one that may not do this
    NOT_FOUND = 5  # nothing of that id or name is there for this key
    TIMED_OUT = 6  # what was waited for did not happen in time
    INTERRUPTED = 130  # Ctrl-C
    PIPE_CLOSED = 141  # the reader of our output went away
