"""The inference runtimes: how each is recognised, and how each one's answers are read."""
