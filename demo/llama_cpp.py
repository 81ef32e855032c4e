"""llama.cpp's own server on a small model, for the demo and for tests that need a real inference server.

By hand: `python -m demo.llama_cpp tiny.gguf my-model --port 8080`; the model comes from `python -m demo.tiny_gguf`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

MODEL = "tiny-reciter"
LISTENS = r"listens on (\S+)\n"
CONTEXT_OF_A_SLOT = 1024


def server_command(
    gguf: Path,
    *,
    model: str = MODEL,
    port: int = 0,
    slots: int = 2,
    tells: bool = True,
    embeds: bool = False,
    ranks: bool = False,
) -> list[str]:
    """Return the command for a server of one model; port 0 is a free one.

    `tells`: with /metrics and /slots; `embeds`: with embeddings beside chats; `ranks`: a reranker, without chats.
    """
    command = [sys.executable, __file__, str(gguf), model, "--port", str(port), "--slots", str(slots)]
    flags = {"--silent": not tells, "--embeds": embeds, "--ranks": ranks}
    return [*command, *(flag for flag, is_set in flags.items() if is_set)]


def main() -> None:
    """Serve, print the address, and run until a signal."""
    parser = argparse.ArgumentParser(description="Serve a model by llama.cpp's own server.")
    parser.add_argument("gguf", help="the model's file")
    parser.add_argument("model", help="the name that it is served under")
    parser.add_argument("--port", type=int, default=0, help="0, the default, is a free one")
    parser.add_argument("--slots", type=int, default=2, help="requests at a time")
    parser.add_argument("--silent", action="store_true", help="without /metrics and /slots")
    parser.add_argument("--embeds", action="store_true", help="answer embeddings, too")
    parser.add_argument("--ranks", action="store_true", help="rank documents, as llama.cpp's --reranking")
    options = parser.parse_args()

    import xllamacpp  # type: ignore[import-untyped] # noqa: PLC0415 - not needed for the command alone

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = options.gguf, {options.model}
    params.hostnames, params.port = ["127.0.0.1"], options.port
    params.n_parallel, params.n_ctx = options.slots, options.slots * CONTEXT_OF_A_SLOT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.endpoint_metrics = params.endpoint_slots = not options.silent
    if options.embeds:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    if options.ranks:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    server = xllamacpp.Server(params)
    sys.stdout.write(f"listens on {server.listening_address}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
