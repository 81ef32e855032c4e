"""Every node, model and key in memory, and the change feed that keeps them in step with Postgres."""
