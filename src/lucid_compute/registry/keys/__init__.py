"""API keys: authentication, scopes, rate limits, storage, the audit trail."""
