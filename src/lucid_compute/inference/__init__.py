"""Inference: the gateway. Reads OpenAI requests, chooses a node, forwards, fails over, and records what happened."""
