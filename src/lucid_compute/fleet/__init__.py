"""What every node is doing now, in memory: an index over the matching engine, without I/O and without a clock."""
