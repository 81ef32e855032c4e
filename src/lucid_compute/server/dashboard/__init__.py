"""The dashboard: one static page over the REST API."""
