"""What is kept of a tokenizer is that of the tokenizer as it is now."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from itda.text.prompts import TokenStream, _among
from itda.text.tokenizers import encoder, frame, special_ids, tokenizer_hash
from tests import tiny_models

TEXT = "a cat and <extra> a dog"


def test_a_tokenizer_that_changes_is_taken_apart_anew():
    tokenizer = tiny_models.tokenizer()
    before, ids = tokenizer_hash(tokenizer), encoder(tokenizer)([TEXT])[0][:, 0]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    after, cut = tokenizer_hash(tokenizer), encoder(tokenizer)([TEXT])[0][:, 0]
    extra = tokenizer.convert_tokens_to_ids("<extra>")
    assert before != after
    assert extra not in ids
    assert extra in cut
    tokenizer.split_special_tokens = True
    assert extra not in encoder(tokenizer)([TEXT])[0][:, 0]


def test_two_tokenizers_of_one_class_are_two():
    one, other = tiny_models.tokenizer(), tiny_models.tokenizer()
    assert tokenizer_hash(one) == tokenizer_hash(other)
    other.add_tokens(["dog"])
    assert tokenizer_hash(one) != tokenizer_hash(other)
    assert len(encoder(one)([TEXT])[0]) > len(encoder(other)([TEXT])[0])


def test_what_a_call_left_behind_changes_nothing():
    used = tiny_models.tokenizer()
    used.pad_token, used.padding_side = used.pad_token or used.eos_token or used.bos_token, "left"
    expected = frame(used, "auto"), encoder(used)([TEXT])[0].tolist(), tokenizer_hash(used)
    used(["a", TEXT], padding="max_length", max_length=9, truncation=True)
    assert (frame(used, "auto"), encoder(used)([TEXT])[0].tolist(), tokenizer_hash(used)) == expected


def test_special_tokens_are_those_of_isin():
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 700):
        some = np.unique(rng.integers(0, 2000, size))
        ids = np.concatenate([rng.integers(-1, 2001, 300), some, some + 1])
        assert np.array_equal(_among(ids, some), np.isin(ids, some))


def test_rows_mark_the_special_tokens_of_the_text_too():
    tokenizer = tiny_models.tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    bos = tokenizer.bos_token or tokenizer.cls_token or tokenizer.eos_token
    row = next(iter(TokenStream([f"a cat {bos} a dog"], tokenizer, bos="never")))
    assert row.special.any()
    assert np.array_equal(row.special, np.isin(row.ids, special_ids(tokenizer)))
