"""The agent's end of tunnels: connections to every replica of the service, and requests passed on to one server."""
