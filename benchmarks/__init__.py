"""One file per claim that the README makes about speed; `python -m benchmarks [name…]` runs them."""
