"""What a tokenizer is: its identity, its special tokens, and the function from texts to tokens with their spans."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256

import numpy as np
from numpy import ndarray


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of what a tokenizer is, whatever it was used for: a fast one's state, a slow one's vocabulary."""
    state = _backend_state(tokenizer) or sorted(tokenizer.get_vocab().items())
    return sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def special_ids(tokenizer) -> list[int]:
    """Ids of the special tokens. [UNK] stands for a word of the text, unless it doubles as BOS or EOS (GPT-2)."""
    added = [token for token, content in tokenizer.added_tokens_decoder.items() if content.special]
    named = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep", "pad", "mask")}
    return sorted({*tokenizer.all_special_ids, *added} - ({getattr(tokenizer, "unk_token_id", None)} - named))


def encoder(tokenizer) -> Callable[[list[str]], list[ndarray]]:
    """The function from texts to their tokens, (n, 3) arrays of id, start and end."""
    state = _backend_state(tokenizer)
    if state is None:
        return lambda texts: _encode_slowly(tokenizer, texts)
    # A copy, so that the user's tokenizer is left alone. Its post-processor would only trim blanks off the spans.
    state["post_processor"] = None
    if state["model"].get("dropout"):
        state["model"]["dropout"] = None  # would draw other tokens in every iteration
    copy = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    copy.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))

    def encode(texts: list[str]) -> list[ndarray]:
        found = copy.encode_batch(texts, add_special_tokens=False)
        spans = [np.array(one.offsets, np.int64).reshape(-1, 2) for one in found]
        return [np.column_stack([np.array(one.ids, np.int64), span]) for one, span in zip(found, spans, strict=True)]

    return encode


def _backend_state(tokenizer) -> dict | None:
    """The state of a fast tokenizer without that of its last call; None where it has none that can be written."""
    try:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # a slow tokenizer, or (a bare Exception of `tokenizers`) one with parts written in Python
        return None
    return {**state, "truncation": None, "padding": None}


def _encode_slowly(tokenizer, texts: list[str]) -> list[ndarray]:
    """A slow tokenizer knows no spans: a token is looked for from the end of the last one, and empty if not found."""
    out = []
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True):
        words = {token: tokenizer.decode([token]).removeprefix("##") for token in set(ids)}
        tokens, at = [], 0
        for token in ids:
            word = words[token].strip() or words[token]
            start = text.find(word, at, at + len(word) + 16) if word else -1
            start, at = (at, at) if start < 0 else (start, start + len(word))
            tokens.append((token, start, at))
        out.append(np.array(tokens, np.int64).reshape(-1, 3))
    return out
