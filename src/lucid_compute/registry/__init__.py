"""The compute registry: passports, nodes, heartbeats, models, and the engine that says what can run now."""
