"""The registry's values and pure rules: standard library and Pydantic only, no clock."""
