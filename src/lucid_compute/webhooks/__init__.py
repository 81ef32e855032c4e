"""Webhooks on their way out: claimed from the outbox, signed, sent through `egress`, tried again."""
