"""The server: processes, the ASGI application, settings, metrics, the dashboard."""
