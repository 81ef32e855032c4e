"""How a command ends: one sentence on stderr and an exit status; and the question before a final action."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import IntEnum
from typing import Annotated, Any

import typer

from lucid_compute.cli.formatting import plain


class ExitStatus(IntEnum):
    """How a command ended. docs/cli.md has the same table."""

    OK = 0
    REFUSED = 1  # the service refused, or the answer to the question is no
    USAGE = 2  # the command line is invalid or ambiguous
    UNREACHABLE = 3  # no response, or the service can't respond now; trying again may help
    NOT_AUTHORISED = 4  # no key, an unknown key, or one that may not do this
    NOT_FOUND = 5  # this key can see nothing with that id or name
    TIMED_OUT = 6  # the awaited state was not reached in time
    INTERRUPTED = 130  # Ctrl-C
    PIPE_CLOSED = 141  # the reader of our output is gone


class CommandFailed(Exception):
    """The command can't do what was asked. `sentence` says what to do, `status` is for scripts."""

    def __init__(self, sentence: str, status: ExitStatus = ExitStatus.REFUSED) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.status = status


def refuse_both(one: str, has_one: object, other: str, has_other: object) -> None:
    """Refuse two options that exclude each other.

    Raises:
        CommandFailed: both were given.
    """
    if has_one and has_other:
        raise CommandFailed(f"Give {one} or {other}, not both.", ExitStatus.USAGE)


class PipeClosed(Exception):
    """The reader of our output is gone. Not an OSError, because Typer would report that as a failure."""


# What the validation of options says, in words for a person.
_PLAIN_WORDS = {
    "Value error, ": "",
    "Input should be a valid number, unable to parse string as a number": "write a number",
    "Input should be a valid integer, unable to parse string as an integer": "write a whole number",
    "Input should be greater than or equal to": "write at least",
    "Input should be less than or equal to": "write at most",
}


def run(command: Callable[..., Any]) -> int:
    """Run a Typer application, print an error if there is one, and return the exit status."""
    _prepare_streams()
    try:
        _require_text(sys.argv)
        status = command(prog_name="lucid", standalone_mode=False)
        sys.stdout.flush()
    except CommandFailed as failure:
        return _end(failure.sentence, failure.status)
    except typer.TyperException as misuse:
        return _say_misuse(misuse)
    except (KeyboardInterrupt, typer.Abort):
        return _end(None, ExitStatus.INTERRUPTED)
    except (PipeClosed, BrokenPipeError):
        return _end(None, ExitStatus.PIPE_CLOSED)
    except (OSError, UnicodeDecodeError) as error:
        return _end(*_trouble(error))
    return status if isinstance(status, int) else ExitStatus.OK


def _require_text(arguments: Iterable[str]) -> None:
    """Refuse arguments that are not UTF-8, which no address and no JSON can hold.

    Raises:
        CommandFailed: one is not.
    """
    for argument in arguments:
        if any("\ud800" <= mark <= "\udfff" for mark in argument):
            raise CommandFailed(f"The argument {argument!a} is not text in UTF-8.", ExitStatus.USAGE)


def _trouble(error: OSError | UnicodeDecodeError) -> tuple[str, ExitStatus]:
    """Return the sentence and the status for a file or a stream that can't be used."""
    if isinstance(error, UnicodeDecodeError):
        return "stdin is not text in UTF-8.", ExitStatus.USAGE
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or type(error).__name__}.", ExitStatus.REFUSED


def write(text: str) -> None:
    """Write to stdout and flush.

    Raises:
        PipeClosed: nothing reads stdout any more.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise PipeClosed from None


def complain(sentence: str) -> None:
    """Write a sentence to stderr, in one line and without control characters."""
    print(f"lucid: {plain(sentence)}", file=sys.stderr)


def _prepare_streams() -> None:
    """Replace characters that the terminal's encoding lacks by question marks, and a closed stream by /dev/null.

    Of stdin, bytes that are no text are refused.
    """
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")
    if (reconfigure := getattr(sys.stdin, "reconfigure", None)) is not None:
        reconfigure(errors="strict")


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - a stream for the rest of the process


def _say_misuse(misuse: typer.TyperException) -> int:
    """Report what Typer could not understand. Its message is empty where it has just shown the help."""
    sentence = misuse.format_message().replace("\n", " ")
    for library_words, plain_words in _PLAIN_WORDS.items():
        sentence = sentence.replace(library_words, plain_words)
    if not (sentence := sentence.rstrip(".")):
        return _end(None, ExitStatus.USAGE)
    context = getattr(misuse, "ctx", None)
    see = f" See: {context.command_path} --help" if context is not None else ""
    return _end(f"{sentence}{'' if sentence.endswith(('?', ')')) else '.'}{see}", ExitStatus.USAGE)


def _end(sentence: str | None, status: ExitStatus) -> int:
    """Write the last sentence, and leave nothing for Python to flush at exit: the reader may be gone."""
    try:
        sys.stdout.flush()
    except OSError:
        _silence(sys.stdout)
    if sentence is not None:
        with suppress(OSError):
            complain(sentence)
            sys.stderr.flush()
    return status


def _silence(stream: Any) -> None:
    """Redirect the stream's file to /dev/null, so that the rest of its buffer is dropped silently."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def confirm(question: str, *, is_agreed: bool) -> None:
    """Return if the person agrees. The question goes to stderr; a script has to pass --yes.

    Raises:
        CommandFailed: the person does not agree, or there is no terminal to ask on.
    """
    if is_agreed:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CommandFailed(f"{question} There is no terminal to ask on. Pass --yes.", ExitStatus.USAGE)
    if not typer.confirm(plain(question), err=True):
        raise CommandFailed("Nothing was changed.")
