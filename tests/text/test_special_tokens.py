"""BOS and its kind: where the tokenizer itself has them, never twice, and for dictionaries of before as it was."""

import json
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from itda.errors import InputError
from itda.text.prompts import TokenStream, hash_rows
from itda.text.reread import cut_of, settings_of, stream_of
from tests import tiny_models

TEXTS = ["a mouse and a cat " * 6, "", "the end"]
CHAT = [
    [{"role": "user", "content": "What is a cat?"}, {"role": "assistant", "content": "A beast."}],
    [{"role": "user", "content": "And a dog?"}],
]
TEMPLATE = "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def words(bos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte pairs with a BOS, which the tokenizer puts before a text or, without `bos`, does not (SmolLM2, GPT-2)."""
    out = tiny_models.tokenizer()
    if not bos:
        out.backend_tokenizer.post_processor = processors.ByteLevel()
    out.chat_template = template
    return out


WITH, WITHOUT, BERT = words(), words(bos=False), tiny_models.tokenizer("bert")
TOKENIZERS = {"with": WITH, "without": WITHOUT, "bert": BERT}


def rows_of(data, tokenizer, **settings):
    return list(TokenStream(data, tokenizer, **{"context_length": 16, **settings}))


def ids_of(data, tokenizer, **settings) -> list[list[int]]:
    return [row.ids.tolist() for row in rows_of(data, tokenizer, **settings)]


def whole(text: str, tokenizer, **settings) -> list[int]:
    return ids_of([text], tokenizer, context_length=1000, **settings)[0]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_auto_is_what_the_tokenizer_does_itself(name):
    tokenizer = TOKENIZERS[name]
    for text in TEXTS[::2]:
        assert whole(text, tokenizer) == whole(text, tokenizer, bos="auto") == tokenizer(text)["input_ids"]
        assert whole(text, tokenizer, bos="never") == tokenizer(text, add_special_tokens=False)["input_ids"]
        own = whole(text, tokenizer, bos="never")
        assert whole(text, tokenizer, bos="always") == ([2, *own, 3] if name == "bert" else [0, *own])


def test_bos_counts_after_other_special_tokens():
    """As GLM's `[gMASK] <sop>`: BOS is not the first that the tokenizer puts in."""
    tokenizer = words()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sop>"]})
    sop = tokenizer.convert_tokens_to_ids("<sop>")
    for template, prefix in (("<sop> <s> $A", [0]), ("<sop> $A <s>", []), ("<s> <sop> $A", [0]), ("<sop> $A", [])):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<sop>", sop), ("<s>", 0)]
        )
        assert TokenStream(TEXTS, tokenizer, bos="auto").prefix == prefix, template


@pytest.mark.parametrize("blanks", [" ", "\n\n", " \t\n "])
@pytest.mark.parametrize("bos", ["auto", "always"])
def test_blanks_before_a_bos_of_the_text_bring_no_second_one(blanks, bos):
    text = f"{blanks}<s>{TEXTS[0]}"
    own = WITH(text, add_special_tokens=False)["input_ids"]
    assert own[0] != 0
    for length in (1000, 16, 9):
        rows = ids_of([text], WITH, bos=bos, context_length=length)
        assert rows[0] == own[:length] and rows[0].count(0) == 1
        assert all(row[0] == 0 for row in rows[1:]) and all(len(row) == length for row in rows[:-1])
    assert whole(f"{blanks}a<s>b", WITH, bos=bos)[0] == 0
    assert whole(text, WITH, bos=None) == [0, *own]


def test_a_tokenizer_that_was_used_is_asked_all_the_same():
    tokenizer = words()
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.enable_padding(length=5, direction="left", pad_id=7)
    before = tokenizer.backend_tokenizer.to_str()
    assert TokenStream(TEXTS, tokenizer).prefix == [0]
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_is_doubled(name, bos):
    """A rendered chat has its BOS; what was written out by a tokenizer may have all of them."""
    tokenizer = TOKENIZERS[name]
    begin, end = ("[CLS]", "[SEP]") if name == "bert" else ("<s>", "")
    own = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    first, last = ([2], [3]) if name == "bert" else ([0], [])
    for length in (1000, 16, 9):
        rows = ids_of([f"{begin}{TEXTS[0]}{end}"], tokenizer, bos=bos, context_length=length)
        plain = ids_of([TEXTS[0]], tokenizer, bos="always", context_length=length)
        assert rows[0][0] == first[0] and max(map(len, rows)) <= length
        assert all(a != b or a not in (*first, *last) for row in rows for a, b in pairwise(row))
        if bos == "always":
            assert rows == plain
        if bos == "never":
            assert [token for row in rows for token in row] == [*first, *own, *last]


def test_a_row_that_begins_with_bos_inside_a_document_is_full_and_has_one():
    text = "<s>".join(["abc"] * 40)
    rows = ids_of([text], WITH, context_length=5)
    assert not any(a == b == 0 for row in rows for a, b in pairwise(row))
    assert all(row[0] == 0 for row in rows) and all(len(row) == 5 for row in rows[:-1])
    own = WITH(text, add_special_tokens=False)["input_ids"]
    assert [token for row in rows for token in row if token] == [token for token in own if token]


def test_spans_and_special_of_a_bos_of_the_text():
    row = rows_of(["<s>a mouse"], WITH)[0]
    assert row.text == "<s>a mouse" and row.starts[0] == 0 and row.ends[0] == 3 and row.special[0]
    assert row.starts.min() == 0 and not row.special[1:].any()


@pytest.mark.parametrize("name", ["with", "without"])
def test_packed_documents_have_one_eos_between_them(name):
    tokenizer = TOKENIZERS[name]  # whose BOS is its EOS, as GPT-2's
    frame = [0] * (name == "with")
    cat, dog = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a cat", "a dog"))
    for documents in (["a cat", "a dog"], ["a cat<s>", "a dog"], ["a cat", "", "<s>a dog"]):
        assert ids_of(documents, tokenizer, pack=True, context_length=99) == [[*frame, *cat, 0, *dog]]
    both = ["a cat<s>", "<s>a dog"]  # what stands in the text stays
    assert ids_of(both, tokenizer, pack=True, context_length=99) == [[*frame, *cat, 0, 0, *dog]]
    assert ids_of(both, tokenizer, pack=True, context_length=99, bos=None) == [[0, *cat, 0, 0, 0, *dog]]


# -- old dictionaries


@pytest.mark.parametrize("name", TOKENIZERS)
def test_without_a_word_on_bos_rows_are_those_of_before(name):
    tokenizer = TOKENIZERS[name]
    texts = [*TEXTS, "<s>a mouse", "[CLS]a mouse[SEP]"]
    frame = ([2], [3]) if name == "bert" else ([0], [])
    room = 16 - len(frame[0]) - len(frame[1])
    expected = []
    for text in texts:  # the rule of before, written down once more
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected += [[*frame[0], *own[at : at + room], *frame[1]] for at in range(0, len(own), room)]
    assert ids_of(texts, tokenizer, bos=None) == expected
    old = {k: v for k, v in TokenStream(texts, tokenizer, context_length=16).provenance.items() if k != "bos"}
    assert settings_of(old)["bos"] is None and cut_of(old, "other")["bos"] is None
    assert [row.ids.tolist() for row in stream_of(old, texts, tokenizer)] == expected
    now = TokenStream(texts, tokenizer, context_length=16, bos="never").provenance
    assert hash_rows(stream_of(now, texts, tokenizer)) == hash_rows(rows_of(texts, tokenizer, bos="never"))


def test_where_it_lies_is_kept_for_its_own_data_alone():
    said = {
        "kind": "hub",
        "data": "user/data",
        "split": "test",
        "config": "en",
        "column": "body",
        "tokenizer_hash": "x",
    }
    assert cut_of(said, "user/data") == {"split": "test", "config": "en", "column": "body", "bos": None}
    assert cut_of(said, "other.jsonl") == {"column": "body", "bos": None}


def test_provenance_says_it():
    for bos in ("auto", "always", "never"):
        said = TokenStream(TEXTS, WITHOUT, bos=bos).provenance
        assert (said["bos"], said["prefix"]) == (bos, [0] if bos == "always" else [])
    with pytest.raises(InputError, match="`bos` is 'yes'; choose one of 'auto', 'always', 'never'"):
        TokenStream(TEXTS, WITHOUT, bos="yes")


# -- chats


@pytest.mark.parametrize("form", ["list", "jsonl", "parquet", "saved"])
def test_messages_go_through_the_chat_template(tmp_path, form):
    tokenizer = words(template=TEMPLATE)
    records = [{"messages": messages, "id": i} for i, messages in enumerate(CHAT)]
    data = tmp_path / f"a.{form}"
    if form == "list":
        data = records
    elif form == "jsonl":
        data.write_text("\n".join(map(json.dumps, records)))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(records), data)
    else:
        datasets.Dataset.from_list(records).save_to_disk(data)
    rendered = ["<s>user: What is a cat?\nassistant: A beast.\n", "<s>user: And a dog?\n"]
    stream = TokenStream(data, tokenizer, column="messages", context_length=16)
    assert [row.ids.tolist() for row in stream] == ids_of(rendered, tokenizer)
    assert ids_of(rendered, tokenizer, context_length=99) == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered
    ]
    other = TokenStream(data, words(template=TEMPLATE + " "), column="messages").provenance["chat_template"]
    assert stream.provenance["chat_template"] != other and len(other) == 64
    assert "chat_template" not in TokenStream(TEXTS, tokenizer).provenance


def test_a_template_that_asks_for_the_date_gets_the_same_every_day():
    template = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }} {{ messages[0]['content'] }}"
    row = rows_of([{"messages": CHAT[1]}], words(template=template), column="messages", context_length=99)[0]
    assert row.text == "26 Jul 2024 2024-07-26 And a dog?"
    template = (
        "{% macro day() %}{{ strftime_now('%B %d, %Y') }}{% endmacro %}{{ day() }} {{ strftime_now('%A %-d %%') }}"
    )
    row = rows_of([{"messages": CHAT[1]}], words(template=template), column="messages", context_length=99)[0]
    assert row.text == "July 26, 2024 Friday 26 %"


BAD_CHATS = {
    "no template": (
        None,
        CHAT[0],
        ["'messages' of `data[0]` is a chat", "no chat template", "instruct model", "`tokenizer`"],
    ),
    "several": (
        {"rag": TEMPLATE, "tool_use": TEMPLATE},
        CHAT[0],
        ["is a chat", "several chat templates", "'rag', 'tool_use'", "none is its default", "`chat_template`"],
    ),
    "refused": ("{{ raise_exception('roles must alternate') }}", CHAT[0], ["does not take it", "roles must alternate"]),
    "no role": (TEMPLATE, [{"from": "human", "value": "x"}], ["type list, not text", "`role` and `content`"]),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats(name):
    template, messages, parts = BAD_CHATS[name]
    with pytest.raises(InputError) as caught:
        rows_of([{"messages": messages}], words(template=template), column="messages")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# -- how much there is


@pytest.mark.parametrize("settings", [{}, {"truncate": True}, {"pack": True}, {"seed": 1}], ids=str)
@pytest.mark.parametrize("form", ["txt", "jsonl", "jsonl.gz", "parquet", "csv", "folder"])
def test_how_many_tokens_there_are_is_told_from_the_part_that_was_read(tmp_path, monkeypatch, form, settings):
    import gzip

    monkeypatch.setattr("itda.text.prompts.PIECE", 200)
    monkeypatch.setattr("itda.text.prompts.GROUP", (20, 2000))
    monkeypatch.setattr("itda.text.files.BLOCK", 5000)
    monkeypatch.setattr("itda.text.prompts.SHUFFLE_TOKENS", 200)
    generator = np.random.default_rng(0)
    some = ["".join(generator.choice([*"abcdefghijklmnopqrstuvwxyz", "é", "京"], 5)) for _ in range(5000)]
    texts = [" ".join(generator.choice(some, 90)) + "\n" for _ in range(300)]
    data = tmp_path / f"a.{form}"
    if form == "txt":
        data.write_text("".join(texts), "utf-8")
    elif form == "jsonl":
        data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    elif form == "jsonl.gz":
        data.write_bytes(gzip.compress("\n".join(json.dumps({"text": text}) for text in texts).encode()))
    elif form == "parquet":
        pq.write_table(pa.table({"text": texts}), data)
    elif form == "csv":
        data.write_text("text\n" + "".join(f'"{text}"\n' for text in texts), "utf-8")
    else:
        for part in range(4):
            (tmp_path / "a.folder").mkdir(exist_ok=True)
            lines = "\n".join(json.dumps({"text": text}) for text in texts[part::4])
            (tmp_path / "a.folder" / f"{part}.jsonl").write_text(lines)
    stream = TokenStream(data, WITH, context_length=16, **settings)
    assert stream.tally.expected is None
    told, count = [], 0
    for row in stream:
        told.append(stream.tally.expected)
        count += int((row.starts >= 0).sum())
    if not (settings.get("truncate") and form == "txt"):
        assert told[-1] == pytest.approx(count, rel=0.02)
        assert told[len(told) // 2] == pytest.approx(count, rel=0.2)
    assert TokenStream(texts, WITH).tally.expected is None


def test_a_list_has_no_estimate():
    stream = TokenStream(TEXTS, WITH)
    list(stream)
    assert stream.tally.expected is None
