"""How a request for inference is refused, in either lane, and how an answer that was begun is given up."""

from __future__ import annotations

from lucid_compute.api.error_responses import headers_of
from lucid_compute.api.express_client import Refusal
from lucid_compute.api.openai_errors import openai_body, openai_bytes
from lucid_compute.errors import LucidError, MethodNotAllowed, Overloaded
from lucid_compute.inference.call import Call, Headers, Send
from lucid_compute.inference.event_stream import error_event


def overloaded() -> Overloaded:
    """Answer what is said to a request when as many run as may."""
    message = "As many requests as this service takes are running. Send it again after Retry-After seconds."
    return Overloaded(message, retry_after_seconds=1)


def refusal(error: LucidError, headers: Headers) -> Refusal:
    """Answer the status, the headers and the body of an error; `headers` are added to its own."""
    body = openai_bytes(error)
    ours = [(name.lower().encode(), value.encode()) for name, value in headers_of(error).items()]
    allow = [(b"allow", b"POST")] if isinstance(error, MethodNotAllowed) else []
    basic = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return error.http_status, [*basic, *ours, *allow, *headers], body


async def send_refusal(send: Send, error: LucidError, headers: Headers) -> None:
    """Answer a request with an error."""
    status, headers, body = refusal(error, headers)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def give_up(call: Call, error: LucidError) -> None:
    """Answer a call with an error; a stream that has begun is ended by it."""
    if call.span is not None:
        call.span.end(error.code)
    if not call.has_begun:
        job = call.exchange.job  # of the last attempt
        tried = (b"x-lucid-attempts", b"%d" % (job.attempt if job else 0))
        await send_refusal(call.send, error, [*call.headers, (b"x-lucid-job", call.job_id.encode()), tried])
        return
    await call.write(error_event(call.request.endpoint, openai_body(error)), more=False)
