"""What an answer says of the tokens it took, found in its bytes without reading the whole of it."""

from __future__ import annotations

import re
from typing import NamedTuple

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
# Whole numbers of up to eight digits; null says nothing, and anything else under the key is no number of tokens.
_NUMBER = rb'"(?!\s*:\s*null)\s*:\s*(?:(\d{1,8})(?:\.0+)?(?![\d.eE]))?'
_TOKENS_IN = re.compile(rb'"(?:prompt|input)_tokens' + _NUMBER)
_TOKENS_OUT = re.compile(rb'"(?:completion|output)_tokens' + _NUMBER)
_WORD = re.compile(rb"[A-Za-z0-9\x80-\xff]{1,6}|[^\sA-Za-z0-9\x80-\xff]")


class Usage(NamedTuple):
    """Tokens in and out; None where the answer does not say."""

    tokens_in: int | None
    tokens_out: int | None


def find_usage(answer: bytes) -> Usage | None:
    """Answer what the last `usage` of a JSON answer or of a stream's event says; None when there is none to be read.

    What is no number of tokens (negative, a fraction, text, over eight digits) spoils all of it. A quote inside a JSON
    string is escaped, so `"usage":{` can only be a key.
    """
    at = answer.rfind(b'"usage"')
    while at >= 0:
        if _USAGE.match(answer, at):
            tokens_in, tokens_out = _TOKENS_IN.search(answer, at), _TOKENS_OUT.search(answer, at)
            if (tokens_in and tokens_in[1] is None) or (tokens_out and tokens_out[1] is None):
                return None
            if tokens_in or tokens_out:
                return Usage(int(tokens_in[1]) if tokens_in else None, int(tokens_out[1]) if tokens_out else 0)
        at = answer.rfind(b'"usage"', 0, at)
    return None


def count_tokens(text: bytes) -> int:
    """Answer about how many tokens a text is, for want of its tokenizer: runs of up to six letters, and signs."""
    return sum(1 for _ in _WORD.finditer(text))
