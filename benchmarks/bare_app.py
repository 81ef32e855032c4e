"""The smallest app for a POST on uvicorn: reads the body, and sends as many bytes as its path says, such as `/232`."""

from __future__ import annotations

import socket
import sys
from typing import Any

import uvicorn

_JSON = (b"content-type", b"application/json")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Read the complete request without a check, and respond."""
    while (await receive()).get("more_body"):
        pass
    body = b" " * int(scope["path"][1:])
    headers = [_JSON, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main(descriptor: int) -> None:
    """Serve on the listening socket that was inherited as `descriptor`, with the service's own uvicorn options."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    uvicorn.Server(config).run([socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    main(int(sys.argv[1]))
