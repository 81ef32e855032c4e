"""The listening sockets, bound before anything slow starts and inherited by every worker."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

from lucid_compute.server.processes import ServiceError

BACKLOG = 2048
NOT_ON_THIS_MACHINE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(host: str, port: int) -> list[socket.socket]:
    """Return a listening socket for each address of `host`, all on one port; port 0 takes a free one.

    They listen from now on, so the port is reserved: clients that connect before the first worker is ready wait for it.

    Raises:
        ServiceError: the port or the host can't be used.
    """
    addresses = _addresses(host, port)
    sockets: list[socket.socket] = []
    refusal: OSError | None = None
    for family, address in addresses:
        chosen = sockets[0].getsockname()[1] if sockets else port
        try:
            sockets.append(_listen(family, (address[0], chosen, *address[2:]), alone=len(addresses) == 1))
        except OSError as error:
            refusal = error
            if error.errno not in NOT_ON_THIS_MACHINE:  # localhost may name ::1 where there is no IPv6
                break
    else:
        if sockets:
            return sockets
    close(sockets)
    raise ServiceError(_sentence(host, port, refusal)) from refusal


def close(sockets: list[socket.socket]) -> None:
    """Close every socket; new clients are refused once no worker has it open."""
    for sock in sockets:
        with suppress(OSError):
            sock.close()


def _addresses(host: str, port: int) -> list[tuple[int, tuple[str, int, *tuple[int, ...]]]]:
    """Return the family and address of each address that `host` means."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        msg = f"The host {host!r} names no address of this machine: give --host an address such as 127.0.0.1."
        raise ServiceError(msg) from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))  # type: ignore[misc]


def _listen(family: int, address: tuple[str, int, *tuple[int, ...]], *, alone: bool) -> socket.socket:
    """Return one listening socket."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not alone:  # alone, `::` serves IPv4 too where the system allows it
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.settimeout(0.0)
    except BaseException:  # also StopRequested
        sock.close()
        raise
    return sock


def _sentence(host: str, port: int, error: OSError | None) -> str:
    """Return why nothing listens, and what to do."""
    if error is not None and error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} of {host} is taken by another program: choose another one with --port, or stop that program."
        )
    if error is not None and error.errno in (errno.EACCES, errno.EPERM):
        return f"This user may not listen on port {port}: choose one from 1024 up with --port."
    if error is not None and error.errno in NOT_ON_THIS_MACHINE:
        return f"{host} is no address of this machine: give --host one that is, such as 127.0.0.1 or 0.0.0.0."
    return f"The service can't listen on port {port} of {host}: {error}; choose others with --host and --port."
