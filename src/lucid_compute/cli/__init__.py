"""The command line, `lucid`. The top package: nothing imports it."""
