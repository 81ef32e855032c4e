"""The gateway: an OpenAI request to a node and back."""
