"""The inference runtimes: how each is detected, and how its responses are read. One file for each runtime."""
