"""What a tokenizer is: its identity, its special tokens, and the function from texts to tokens with their spans."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from hashlib import sha256
from itertools import takewhile
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy import ndarray

from itda.errors import InputError, first_line

# The date that Llama 3's template has where it is told none, in place of today's: what `strftime` makes of every code,
# put into the form by a macro, since `transformers` hands no function to a template.
_FORMS = [f"%{code}" for code in (*"aAbBcdDeFfGhHIjmMpRSTuUVwWxXyYzZ", "-d", "-m", "-H", "-I", "-M", "-S", "-j", "%")]
_MADE = [(form, datetime.datetime(2024, 7, 26).strftime(form)) for form in _FORMS]
_ONE_DAY = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace({form!r}, {made!r})" for form, made in _MADE)
    + " }}{%- endmacro %}"
)


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of what a tokenizer is, whatever it was used for: a fast one's state, a slow one's vocabulary."""
    fast = _fast(tokenizer)
    return _hash_of(sorted(tokenizer.get_vocab().items())) if fast is None else fast.hash


def _hash_of(state: Any) -> str:
    return sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def special_ids(tokenizer) -> list[int]:
    """Ids of the special tokens. [UNK] stands for a word of the text, unless it doubles as BOS or EOS (GPT-2)."""
    added = [token for token, content in tokenizer.added_tokens_decoder.items() if content.special]
    named = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep", "pad", "mask")}
    return sorted({*tokenizer.all_special_ids, *added} - ({getattr(tokenizer, "unk_token_id", None)} - named))


def frame(tokenizer, bos: str | None) -> tuple[list[int], list[int]]:
    """The tokens that open and close a row: BOS (else CLS), and SEP where there are CLS and SEP; none with "never".

    "always" has them where the tokenizer has such tokens, "auto" where BOS is among those that it puts before a
    text itself. None is the
    rule of dictionaries that do not say one, which is that of "always".
    """
    begin, cls, sep = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "cls", "sep"))
    begin = cls if begin is None else begin
    if begin is None or bos == "never" or (bos == "auto" and begin not in _own(tokenizer)):
        return [], []
    return [begin], [sep] if cls is not None and sep is not None else []


def _own(tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text by itself."""
    special = set(special_ids(tokenizer))
    fast = _fast(tokenizer)
    ids = [int(token) for token in tokenizer(["a"], verbose=False)["input_ids"][0]] if fast is None else fast.framed
    return list(takewhile(special.__contains__, ids))


def chat(tokenizer) -> Callable[[list], str]:
    """The function from messages, dicts of `role` and `content`, to the text that the tokenizer's template makes.

    It raises `InputError` where there is no template or it does not take the messages. A template that asks for
    today's date gets one that stays, since the same data are to give the same rows.
    """

    def rendered(messages: list) -> str:
        templates = getattr(tokenizer, "chat_template", None)
        if not templates:
            raise InputError("the tokenizer has no chat template: name that of an instruct model with `tokenizer`.")
        if isinstance(templates, dict) and "default" not in templates:
            raise InputError(
                f"the tokenizer has several chat templates ({', '.join(map(repr, templates))}) and none is its "
                "default: set its `chat_template` to one of them, or name another tokenizer with `tokenizer`."
            )
        try:
            template = tokenizer.get_chat_template()
            if "strftime_now" in template:
                template = _ONE_DAY + template
            return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:  # templates raise what they like
            said = first_line(error)
            raise InputError(f"the tokenizer's template does not take it ({said}): mend that row.") from error

    return rendered


def chat_hash(tokenizer) -> str | None:
    """SHA-256 of the chat template; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return sha256(json.dumps(template).encode()).hexdigest() if template else None


def encoder(tokenizer) -> Callable[[list[str]], list[ndarray]]:
    """The function from texts to their tokens, (n, 3) arrays of id, start and end."""
    fast = _fast(tokenizer)
    if fast is None:
        return lambda texts: _encode_slowly(tokenizer, texts)
    copy = fast.copy

    def encode(texts: list[str]) -> list[ndarray]:
        found = copy.encode_batch(texts, add_special_tokens=False)
        spans = [np.array(one.offsets, np.int64).reshape(-1, 2) for one in found]
        return [np.column_stack([np.array(one.ids, np.int64), span]) for one, span in zip(found, spans, strict=True)]

    return encode


class _Fast(NamedTuple):
    """What is known of a fast tokenizer in one state: taking it apart takes seconds where a vocabulary is large."""

    key: tuple[str, bool]
    hash: str
    framed: list[int]  # the ids that it makes of "a", with what it puts around a text
    copy: Any  # of `tokenizers`, which cuts a text as this one does and puts nothing around it


_known: WeakKeyDictionary[Any, _Fast] = WeakKeyDictionary()


def _fast(tokenizer) -> _Fast | None:
    """A fast tokenizer taken apart; None for a slow one, and for one with parts written in Python.

    It is a copy that is used, so that the user's own is left alone, and keeps the state of its last call.
    """
    try:
        written = tokenizer.backend_tokenizer.to_str()
    except Exception:  # a bare Exception of `tokenizers`
        return None
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    key = (sha256(written.encode()).hexdigest(), split)
    known = _known.get(tokenizer)
    if known is None or known.key != key:
        state = {**json.loads(written), "truncation": None, "padding": None}
        hashed = _hash_of(state)
        if state["model"].get("dropout"):
            state["model"]["dropout"] = None  # would draw other tokens in every iteration
        state["post_processor"] = None  # it would only trim blanks off the spans
        copy = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
        bare, around = copy.encode("a", add_special_tokens=False), tokenizer.backend_tokenizer.post_processor
        framed = (bare if around is None else around.process(bare)).ids
        copy.encode_special_tokens = split
        known = _known[tokenizer] = _Fast(key, hashed, framed, copy)
    return known


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
