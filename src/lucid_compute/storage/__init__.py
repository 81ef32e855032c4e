"""Postgres, the truth: every write goes through here, and only here are SQLAlchemy and asyncpg imported."""
