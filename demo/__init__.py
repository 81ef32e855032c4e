"""`make demo`: the service, three agents and three inference servers, alive on this machine for a minute and a half.

Talks to the service as anybody would: by the SDK, the command line and OpenAI's client.
"""
