"""Every node's current state in memory, and the feed that keeps it in step with Postgres."""
