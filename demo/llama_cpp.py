"""How llama.cpp's own server is started: for the demo, and for the tests that want a real inference server."""

from __future__ import annotations

import sys
from pathlib import Path

MODEL = "tiny-reciter"
LISTENS = r"listens on (\S+)\n"
CONTEXT_OF_A_SLOT = 1024
# It says where it listens and goes on until it is ended.
_SERVER = """
import signal, sys, xllamacpp
path, name, port, slots, tells, embeds = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = path, {name}
params.hostnames, params.port = ["127.0.0.1"], int(port)
params.n_parallel, params.n_ctx = int(slots), int(slots) * CONTEXT_OF_A_SLOT
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.endpoint_metrics = params.endpoint_slots = tells == "True"
if embeds == "True":
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
print("listens on", server.listening_address, flush=True)
signal.pause()
""".replace("CONTEXT_OF_A_SLOT", str(CONTEXT_OF_A_SLOT))


def server_command(
    gguf: Path, *, model: str = MODEL, port: int = 0, slots: int = 2, tells: bool = True, embeds: bool = False
) -> list[str]:
    """Answer the command for a server of one model; port 0 is a free one.

    `tells`: with /metrics and /slots; `embeds`: it answers embeddings, and chats besides.
    """
    return [sys.executable, "-c", _SERVER, str(gguf), model, str(port), str(slots), str(tells), str(embeds)]
