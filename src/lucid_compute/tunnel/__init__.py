"""Tunnels: requests to nodes behind NAT, as streams over a connection that the node's agent opened."""
