"""A real GGUF of 250 KB that llama.cpp loads and serves: a model that recites one sentence, over and over.

By hand: `python -m demo.tiny_gguf tiny.gguf`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

SENTENCE = "the node sends a heartbeat and the registry says that it is alive so every model finds a place to run"
WORDS = SENTENCE.split(" ")
CONTEXT_LENGTH = 2048
WIDTH = 64  # one dimension for each word of the sentence, and some to spare
HEADS = 2
FEED_FORWARD = 32
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # SentencePiece spells unknown words with these
CERTAINTY = 16.0  # the next word's logit above all others', so that it wins at any usual temperature
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

Matrix = NDArray[np.float32]


def write_tiny_gguf(path: Path, name: str = "tiny-reciter") -> None:
    """Write the model: one layer that changes nothing, between embeddings that name the place in the sentence.

    Every token except the sentence's words has place 0. So each answer begins with the second word, and repeats the
    sentence.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokens(writer)
    _add_tensors(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _words() -> list[str]:
    """Return each word of the sentence as a token of its own, a repeated one with another spelling."""
    words: list[str] = []
    for word in WORDS:
        spelled = f"\u2581{word}"
        words.append(spelled if spelled not in words else f"\u2581{word.capitalize()}")
    return words


def _add_tokens(writer: gguf.GGUFWriter) -> None:
    """Write a SentencePiece vocabulary: three special tokens, every byte, the words."""
    words = _words()
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * len(BYTES) + [gguf.TokenType.NORMAL] * len(words)
    writer.add_vocab_size(len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*SPECIAL, *BYTES, *words])
    writer.add_token_scores([0.0] * (len(SPECIAL) + len(BYTES)) + [-1.0 - place for place in range(len(words))])
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensors(writer: gguf.GGUFWriter) -> None:
    """Write the weights: the layer's are zero, so that the last token's embedding alone decides on the next one."""
    first, words = len(SPECIAL) + len(BYTES), len(WORDS)
    embedding, output = _zeros(first + words, WIDTH), _zeros(first + words, WIDTH)
    embedding[:first, 0] = 1.0
    for place in range(words):
        embedding[first + place, place] = 1.0
        output[first + (place + 1) % words, place] = CERTAINTY / np.sqrt(WIDTH)  # the norm brings sqrt(WIDTH) back
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", _zeros(WIDTH, WIDTH))
    for name in ("ffn_gate", "ffn_up"):
        writer.add_tensor(f"blk.0.{name}.weight", _zeros(FEED_FORWARD, WIDTH))
    writer.add_tensor("blk.0.ffn_down.weight", _zeros(WIDTH, FEED_FORWARD))


def _zeros(rows: int, columns: int) -> Matrix:
    return np.zeros((rows, columns), np.float32)


if __name__ == "__main__":
    write_tiny_gguf(Path(sys.argv[1]))
