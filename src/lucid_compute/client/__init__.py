"""The Python SDK: `Lucid`, and `AsyncLucid` for asyncio."""

from lucid_compute.client.errors import LucidApiError, LucidClientError
from lucid_compute.client.lucid import AsyncLucid, Lucid
from lucid_compute.client.pages import AsyncPages, Page, Pages
from lucid_compute.client.passport_calls import split_batches
from lucid_compute.client.webhook_calls import read_webhook
from lucid_compute.webhooks.rules import BadSignature

__all__ = [
    "AsyncLucid",
    "AsyncPages",
    "BadSignature",
    "Lucid",
    "LucidApiError",
    "LucidClientError",
    "Page",
    "Pages",
    "read_webhook",
    "split_batches",
]
