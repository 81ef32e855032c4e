"""A small program that switches to another user, arranges to end with its parent, and then runs a command.

It is run by its path and uses only the standard library. `preexec_fn` would run Python between fork and exec, which may
deadlock (and warns from Python 3.12 on) when the parent has threads, as a test runner has. A start costs 20 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CANNOT_LAUNCH = 126  # the shell's status for a program that was found and could not be run
STAY = -1  # in place of a user id: don't switch
CAN_ENTER = "--can-enter"  # in place of a program: succeed when every path after it can be entered or executed


def die_with_parent(death_signal: int, parent_pid: int) -> None:
    """Have the kernel send `death_signal` to this process when the thread that forked it ends. Linux only.

    A change of user clears this setting, so call it afterwards. Other systems have no such setting: there the next
    start stops the Postgres that was left, and workers also watch a socket of their supervisor.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before prctl, and no signal would ever come
        os._exit(CANNOT_LAUNCH)


def switch_user(uid: int, gid: int) -> None:
    """Switch to another user, irrevocably."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def launch(parent_pid: int, death_signal: int, command: list[str]) -> None:
    """Replace this process with `command`, which gets `death_signal` when its parent ends."""
    if death_signal != signal.SIGKILL:  # a shell's background jobs ignore SIGINT, and we must not until Postgres runs
        signal.signal(death_signal, signal.SIG_DFL)
    die_with_parent(death_signal, parent_pid)
    os.chdir("/")
    os.execv(command[0], command)  # noqa: S606 - no shell is what we want


def main(arguments: list[str]) -> int:
    """Run the command of `PARENT_PID DEATH_SIGNAL UID GID PROGRAM [ARGUMENT…]`; return an exit status if that fails."""
    parent_pid, death_signal, uid, gid = map(int, arguments[:4])
    command = arguments[4:]
    try:
        if uid != STAY:
            switch_user(uid, gid)
        if command[0] == CAN_ENTER:
            return 0 if all(os.access(path, os.X_OK) for path in command[1:]) else 1
        launch(parent_pid, death_signal, command)
    except OSError as error:
        print(f"{command[0]} cannot be run as user {uid}: {error}", file=sys.stderr)  # noqa: T201 - a program's own
    return CANNOT_LAUNCH


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
