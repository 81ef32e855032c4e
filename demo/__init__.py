"""`make demo`: the service, three agents and three inference servers on this machine for a minute and a half.

It uses the service as a user does: through the SDK, the command line and OpenAI's client.
"""
