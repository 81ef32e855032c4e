"""The HTTP service: one file of routes per noun, over FastAPI, and a fast lane for heartbeats beside it."""
