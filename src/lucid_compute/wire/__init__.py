"""The shapes of the wire, shared by the service and by clients: Pydantic alone, camelCase outside."""
