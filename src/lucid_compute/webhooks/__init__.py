"""Webhooks: events are written to an outbox with their transaction, then claimed, signed, sent and retried."""
