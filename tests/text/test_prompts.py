"""Laws of the token stream: rows against the tokenizer itself, one definition for every source, and bad input."""

import hashlib
import json
import os
import struct
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from itda.errors import InputError
from itda.text import files as files_module
from itda.text import prompts
from itda.text.prompts import Row, StreamHash, TokenStream, hash_rows, valid
from itda.text.tokenizers import tokenizer_hash

ASCII = ["The quick brown fox jumps over the lazy dog; " * 9 + "\n\n  end. ", "", "A mouse.\n", "cat sat mat " * 20]
WIDE = ["naïve café — 東京 🙂🙂 ok " * 6, "e\u0301 \u200b\x07\x00 x", " \n\t "]


def byte_level(bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama 3 has it: the post-processor trims blanks off the spans, and puts BOS in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trimmed = processors.ByteLevel(trim_offsets=True)
    opened = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)])
    tokenizer.post_processor = processors.Sequence([trimmed, opened]) if bos else trimmed
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ASCII, trainer)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)


def word_piece() -> PreTrainedTokenizerFast:
    """WordPiece as BERT has it."""
    words = "[PAD] [UNK] [CLS] [SEP] the quick brown fox jump ##s over lazy dog ; . a mouse cat sat mat end ##e"
    vocab = {word: i for i, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZERS = {"bos": byte_level(), "cls": word_piece(), "none": byte_level(bos=False)}
BOS = TOKENIZERS["bos"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def rows_of(data, tokenizer=BOS, **settings) -> list[Row]:
    return list(TokenStream(data, tokenizer, **{"context_length": 16, **settings}))


def plain(rows: list[Row]) -> list[tuple]:
    """Rows as values that `==` compares."""
    arrays = ("ids", "starts", "ends", "special")
    return [
        (row.prompt, row.document, *(getattr(row, a).tolist() for a in arrays), row.text, row.text_start)
        for row in rows
    ]


def body(row: Row, stream: TokenStream, name: str = "ids") -> list[int]:
    return getattr(row, name)[len(stream.prefix) : len(row.ids) - len(stream.suffix)].tolist()


def written(tmp_path, form: str, documents: list[str]):
    """`documents` as data of each form."""
    if form == "list":
        return documents
    if form == "records":
        return [{"text": document, "id": 3} for document in documents]
    if form == "folder":
        (tmp_path / "folder" / ".git").mkdir(parents=True)
        (tmp_path / "folder" / ".git" / "0.txt").write_text("hidden")
        (tmp_path / "folder" / "notes.csv").write_text("of another kind")
        for i, document in enumerate(documents):
            path = tmp_path / "folder" / f"{i:02} *'\n[x] ü" / "a.TXT"
            path.parent.mkdir()
            path.write_bytes(document.encode())
        return tmp_path / "folder"
    path = tmp_path / f"documents.{form}"
    if form == "jsonl":
        lines = [json.dumps({"text": document, "other": 1}) for document in documents]
        path.write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8")
    else:
        pq.write_table(pa.table({"id": range(len(documents)), "text": documents}), path)
    return str(path)


# -- rows


@pytest.mark.parametrize("context_length", [3, 5, 128])
def test_rows_are_the_tokens_of_each_document_framed_and_cut(tokenizer, context_length):
    documents = ASCII + WIDE
    stream = TokenStream(documents, tokenizer, context_length=context_length)
    rows = list(stream)
    assert [row.prompt for row in rows] == list(range(len(rows)))
    for i, document in enumerate(documents):
        own = [row for row in rows if row.document == i]
        expected = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        assert [token for row in own for token in body(row, stream)] == expected
        assert all(len(row.ids) == context_length for row in own[:-1])
        assert not own or len(stream.prefix) + len(stream.suffix) < len(own[-1].ids) <= context_length
    for row in rows:
        assert row.ids[: len(stream.prefix)].tolist() == stream.prefix
        assert row.ids[len(row.ids) - len(stream.suffix) :].tolist() == stream.suffix
        assert row.ids.dtype == row.starts.dtype == row.ends.dtype == np.int64
        assert len(row.ids) == len(row.starts) == len(row.ends) == len(row.special)


def test_frame_is_bos_or_cls_and_sep():
    frames = {
        name: (stream.prefix, stream.suffix) for name, t in TOKENIZERS.items() if (stream := TokenStream(ASCII, t))
    }
    assert frames == {"bos": ([0], []), "cls": ([2], [3]), "none": ([], [])}


def test_spans_are_those_of_the_document(tokenizer):
    documents = ASCII + WIDE
    stream = TokenStream(documents, tokenizer, context_length=7)
    for row in stream:
        framed = len(stream.prefix), len(row.ids) - len(stream.suffix)
        assert (row.starts[: framed[0]] == -1).all() and (row.ends[framed[1] :] == -1).all()
        starts, ends = body(row, stream, "starts"), body(row, stream, "ends")
        assert row.text == documents[row.document][starts[0] : ends[-1]] and row.text_start == starts[0]
        for token, start, end in zip(body(row, stream), starts, ends, strict=True):
            own = row.text[start - row.text_start : end - row.text_start]
            assert own == documents[row.document][start:end]
            if row.document < len(ASCII) and tokenizer.cls_token is None:  # byte-level: exactly the token, blanks too
                assert own == tokenizer.decode([token])
            elif row.document < len(ASCII):
                assert tokenizer.decode([token]).removeprefix("##") in ("[UNK]", own.lower())
            else:
                assert own


def covered(rows: list[Row]) -> set[tuple[int, int]]:
    """(document, character) of every character that a token stands for."""
    spans = [(row.document, span) for row in rows for span in zip(row.starts, row.ends, strict=True)]
    return {(document, i) for document, span in spans for i in range(*span)}


def test_spans_leave_no_character_out_where_the_tokens_are_bytes():
    documents = ASCII + WIDE
    assert covered(rows_of(documents)) == {(d, i) for d, text in enumerate(documents) for i in range(len(text))}


def test_special_and_valid():
    row = rows_of(["a <eos> b"])[0]
    assert row.special.tolist() == [True] + [token == 1 for token in row.ids[1:]] and row.special.sum() == 2
    assert valid(row).tolist() == (~row.special).tolist()
    assert valid(row, special_tokens=True).all() and len(valid(row, special_tokens=True)) == len(row.ids)
    without = rows_of(["a b"], TOKENIZERS["none"])[0]
    assert not without.special.any() and valid(without).tolist() == [False] + [True] * (len(without.ids) - 1)
    unknown = rows_of(["zzz the"], TOKENIZERS["cls"])[0]
    assert unknown.ids.tolist() == [2, 1, 4, 3] and valid(unknown).tolist() == [False, True, True, False]


def test_every_special_token_is_special_and_dropout_and_splitting_are_as_the_tokenizer_says():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.add_special_tokens(["<|chat|>"])  # as chat formats have them: no role, only a flag
    assert rows_of(["<|chat|>a"], tokenizer)[0].special.tolist() == [True, True, False]
    tokenizer.split_special_tokens = True  # then it is text like any other, and BOS alone is special
    assert rows_of(["<|chat|>a"], tokenizer)[0].special.sum() == 1
    backend = json.loads(byte_level().backend_tokenizer.to_str())
    backend["model"]["dropout"] = 0.5
    dropping = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<bos>")
    assert hash_rows(rows_of(ASCII, dropping)) == hash_rows(rows_of(ASCII))


def test_truncate_keeps_the_first_row_of_each_document(tokenizer):
    first = {}
    for row in rows_of(ASCII + WIDE, tokenizer):
        first.setdefault(row.document, row)
    kept = rows_of(ASCII + WIDE, tokenizer, truncate=True)
    assert [p[1:] for p in plain(kept)] == [p[1:] for p in plain(list(first.values()))]
    assert [row.prompt for row in kept] == list(range(len(first)))


def test_truncate_reads_on_until_the_row_is_full(monkeypatch):
    monkeypatch.setattr(prompts, "PIECE", 8)
    monkeypatch.setattr(prompts, "GROUP", (1, 8))
    text = "a mouse\n" * 40
    assert plain(rows_of([text], truncate=True)) == plain(rows_of([text]))[:1]


def test_truncate_does_not_read_on(monkeypatch):
    monkeypatch.setattr(prompts, "PIECE", 50)
    monkeypatch.setattr(prompts, "GROUP", (9, 100))

    def blocks():
        yield from ["cat sat mat on the dog\n"] * 20
        raise AssertionError("read on")

    stream = TokenStream(["x"], BOS, context_length=16, truncate=True)
    stream._documents = lambda: iter([blocks(), ("a mouse",)])
    assert [row.document for row in stream] == [0, 1]


def test_pack_is_one_document_of_all_texts(tokenizer):
    documents = ["", *ASCII, *WIDE, ""]
    stream = TokenStream(documents, tokenizer, context_length=11, pack=True)
    rows, whole, expected = list(stream), "".join(documents), []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        between = [] if tokenizer.eos_token_id is None or not expected or not ids else [tokenizer.eos_token_id]
        expected += between + ids
    assert [token for row in rows for token in body(row, stream)] == expected
    assert {row.document for row in rows} == {0} and {len(row.ids) for row in rows[:-1]} == {11}
    for row in rows:
        assert row.text == whole[row.text_start : row.text_start + len(row.text)]
        for token, start, end in zip(row.ids, row.starts, row.ends, strict=True):
            if start >= 0 and row.text.isascii() and tokenizer.cls_token is None:
                assert whole[start:end] == tokenizer.decode([token])
    assert [row.text for row in rows if (row.starts == -1).all()] == []


def test_pack_puts_eos_between_documents_and_not_between_pieces(monkeypatch):
    monkeypatch.setattr(prompts, "PIECE", 8)
    rows = rows_of(["a mouse\n" * 40, "cat sat\n" * 40, "end"], pack=True)
    assert sum((row.ids == BOS.eos_token_id).sum() for row in rows) == 2
    assert covered(rows) - {(0, -1)} == {(0, i) for i in range(643)}


def test_lone_surrogates_are_replaced_and_offsets_kept():
    rows = rows_of(["a\ud800b\udfff mat"])
    assert "".join(row.text for row in rows) == "a\ufffdb\ufffd mat"
    assert rows[-1].ends.max() == 8


def test_slow_tokenizers_find_their_spans():
    text = "the  cat sat;\n é mat"
    row = rows_of([text], ByT5Tokenizer(), context_length=64)[0]
    assert row.ids.tolist() == ByT5Tokenizer()(text, add_special_tokens=False)["input_ids"]
    for token, start, end in zip(row.ids, row.starts, row.ends, strict=True):
        assert text[start:end] == (chr(token - 3) if token - 3 < 128 else "")


def test_slow_tokenizers_of_other_makes():
    class Slow:
        """Word pieces that decode with the marks of BERT and SentencePiece."""

        words = ("<s>", " the", "cat", "##s", "<unk>", " sat")
        bos_token_id, unk_token_id, all_special_ids, added_tokens_decoder = 0, 4, [0, 4], {}

        def __call__(self, texts, add_special_tokens=True, **_):
            return {"input_ids": [[0] * add_special_tokens + [1, 2, 3, 4, 5] for _ in texts]}

        def decode(self, ids):
            return self.words[ids[0]]

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

    text = "the cats ÿ sat"
    row = rows_of([text], Slow())[0]
    assert [text[start:end] for start, end in zip(row.starts[1:], row.ends[1:], strict=True)] == [
        "the",
        "cat",
        "s",
        "",
        "sat",
    ]
    assert row.text == text and row.special.tolist() == [True] + [False] * 5


def test_the_users_tokenizer_is_left_alone():
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    before = backend.to_str()
    rows = rows_of(ASCII, tokenizer)
    assert backend.to_str() == before and plain(rows) == plain(rows_of(ASCII))


# -- order, identity


@pytest.mark.parametrize("form", ["records", "jsonl", "parquet", "folder"])
@pytest.mark.parametrize("settings", [{}, {"truncate": True}, {"pack": True}, {"seed": 3}], ids=str)
def test_every_source_gives_the_same_rows(tmp_path, form, settings, tokenizer):
    documents = ASCII + WIDE[:1] + WIDE[2:]
    reference, rows = (rows_of(data, tokenizer, **settings) for data in (documents, written(tmp_path, form, documents)))
    assert plain(rows) == plain(reference)
    assert hash_rows(rows) == hash_rows(reference)


def test_txt_is_one_document_as_it_stands(tmp_path):
    text = "The quick\r\n東京 fox\rcat\n\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert plain(rows_of(tmp_path / "a.txt")) == plain(rows_of([text]))


def test_a_folder_is_sorted_by_name_level_by_level(tmp_path):
    for name in ("b.txt", "a/z.txt", "a b.txt", "a/é.jsonl", "B.txt", "a/b/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"text": name}) if name.endswith("l") else name
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = [row.text for row in rows_of(tmp_path)]
    assert found == ["B.txt", "a/b/c.txt", "a/z.txt", "a/é.jsonl", "a b.txt", "b.txt"]


def test_null_is_an_empty_document(tmp_path):
    path = written(tmp_path, "parquet", ["a", None, "b"])
    assert [row.document for row in rows_of(path)] == [0, 2]


def test_pieces_are_the_same_for_file_and_list(tmp_path, monkeypatch):
    text = "The quick brown 東京 fox\n\n" * 40 + "no line end " * 60 + "\nend"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    whole = rows_of([text])
    monkeypatch.setattr(prompts, "PIECE", 64)
    monkeypatch.setattr(files_module, "BLOCK", 10**6)
    reference = rows_of([text])
    for block in (1, 2, 7, 100):
        monkeypatch.setattr(files_module, "BLOCK", block)
        assert plain(rows_of(tmp_path / "a.txt")) == plain(reference)
    starts, pieces = zip(*prompts._cut_text([text]), strict=True)
    assert "".join(pieces) == text and starts == tuple(np.cumsum([0, *map(len, pieces)])[:-1])
    assert {len(piece) for piece in pieces if not piece.endswith("\n")} == {128, len(pieces[-1])}
    assert all(len(piece) >= 64 and "\n" not in piece[63:-1] for piece in pieces[:-1])
    assert covered(reference) == covered(whole) == {(0, i) for i in range(len(text))}
    monkeypatch.setattr(prompts, "GROUP", (2, 150))
    assert plain(rows_of([text, *ASCII]))[: len(reference)] == plain(reference)


def test_every_iteration_yields_the_same_rows(tokenizer):
    for settings in ({}, {"seed": 0}):
        stream = TokenStream(ASCII, tokenizer, context_length=8, **settings)
        first, second = iter(stream), iter(stream)  # side by side, too
        both = list(zip(first, second, strict=True))
        assert plain([a for a, _ in both]) == plain([b for _, b in both]) == plain(list(stream))


@pytest.mark.parametrize("held", [16, 100, 1 << 21])
def test_seed_permutes_the_rows(monkeypatch, held):
    monkeypatch.setattr(prompts, "SHUFFLE_TOKENS", held)
    plainly, one, again, other = (rows_of(ASCII, seed=seed) for seed in (None, 1, 1, 2))
    without_prompt = [[p[1:] for p in plain(rows)] for rows in (plainly, one, other)]
    assert plain(one) == plain(again)
    assert sorted(without_prompt[0]) == sorted(without_prompt[1]) == sorted(without_prompt[2])
    assert [row.prompt for row in one] == list(range(len(one)))
    for rows in without_prompt[1:]:  # no row comes before the buffer can have reached it
        assert all(without_prompt[0].index(row) <= i + held // 16 for i, row in enumerate(rows))
    if held > 16:  # a buffer of one row shuffles nothing
        assert len({str(order) for order in without_prompt}) == 3


def test_seeded_order_is_pinned():
    # The order is part of what a seed means: no other version of this library or of NumPy may change it.
    documents = [f"{i}" for i in range(10)]
    assert [row.document for row in rows_of(documents, seed=7)] == [3, 8, 2, 9, 1, 7, 0, 5, 6, 4]


def test_hash_follows_ids_order_length_and_document():
    rows = rows_of(ASCII)
    whole = hash_rows(rows)

    def changed(i, **values):
        fields = {name: getattr(rows[i], name) for name in Row.__slots__}
        return hash_rows([*rows[:i], Row(**{**fields, **values}), *rows[i + 1 :]])

    others = [
        hash_rows(rows[:-1]),
        hash_rows([*rows[1:], rows[0]]),
        changed(2, ids=rows[2].ids + (np.arange(len(rows[2].ids)) == 3)),
        changed(2, **{name: getattr(rows[2], name)[:-1] for name in ("ids", "starts", "ends", "special")}),
        changed(2, document=5),
        hash_rows(rows_of(ASCII, context_length=15)),
    ]
    assert len({whole, *others}) == 7
    assert changed(2, text="other", ids=rows[2].ids.astype(">i4")) == whole == hash_rows(rows_of(ASCII))


def test_hash_is_what_its_docstring_says():
    rows, digest = rows_of(ASCII), hashlib.sha256(b"").digest()
    for row in rows:
        values = struct.pack(f"<{2 + len(row.ids)}q", row.document, len(row.ids), *row.ids)
        digest = hashlib.sha256(digest + values).digest()
    assert hash_rows(rows) == digest.hex()


def test_hash_can_be_left_and_taken_up_again():
    rows = rows_of(ASCII)
    first = StreamHash()
    for row in rows[:3]:
        first.update(row)
    assert first.hexdigest() == hash_rows(rows[:3]) == first.hexdigest()
    second = StreamHash(first.hexdigest())
    for row in rows[3:]:
        first.update(row)
        second.update(row)
    assert first.hexdigest() == second.hexdigest() == hash_rows(rows) and len(hash_rows([])) == 64


def test_tokenizer_hash_is_of_the_tokenizer_and_not_of_its_use(tmp_path):
    used = byte_level()
    fresh = tokenizer_hash(byte_level())
    used(["a cat", "b"], truncation=True, max_length=2, padding="max_length", return_offsets_mapping=True)
    used.backend_tokenizer.enable_truncation(7)
    assert tokenizer_hash(used) == fresh
    used.save_pretrained(tmp_path)
    assert tokenizer_hash(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == fresh
    used.add_tokens(["<new>"])
    assert len({tokenizer_hash(used), fresh, *map(tokenizer_hash, (TOKENIZERS["cls"], ByT5Tokenizer()))}) == 4


def test_provenance_is_json_and_says_the_settings(tmp_path):
    path = written(tmp_path, "parquet", ASCII)
    stream = TokenStream(path, BOS, context_length=16, seed=3)
    assert json.loads(json.dumps(stream.provenance)) == {
        "kind": "file",
        "data": path,
        "revision": None,
        "config": None,
        "split": None,
        "column": "text",
        "context_length": 16,
        "truncate": False,
        "pack": False,
        "bos": "auto",
        "seed": 3,
        "tokenizer_hash": tokenizer_hash(BOS),
        "prefix": [0],
        "suffix": [],
        "files": 1,
    }
    assert TokenStream(ASCII, BOS).provenance["data"] is None


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux what was read")
@pytest.mark.parametrize("line", ["The quick brown fox\n", "no line end "], ids=["lines", "one line"])
def test_a_large_file_is_never_held(tmp_path, monkeypatch, line):
    monkeypatch.setattr(prompts, "GROUP", (1024, 1 << 18))
    path = tmp_path / "large.txt"
    path.write_text(line * (30_000_000 // len(line)))
    stream = iter(TokenStream(path, BOS))
    tracemalloc.start()
    for _ in range(100):
        next(stream)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read_of(path) < 1_200_000 and peak < 50_000_000  # of 30 MB, whose tokens would take ten times as much
    stream.close()


def read_of(path) -> int:
    """How far this process has read into the file that it has open."""
    for descriptor in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == os.path.realpath(path):
            return os.lseek(int(descriptor), 0, os.SEEK_CUR)
    raise AssertionError("not open")


# -- bad input


def refusal(data, *parts: str, **settings) -> None:
    """Iterating over `data` is refused in one sentence that holds every part."""
    with pytest.raises(InputError) as caught:
        list(TokenStream(data, settings.pop("tokenizer", BOS), **settings))
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 700, sentence
    for part in parts:
        assert part in sentence, sentence


BAD_DATA = {
    "generator": ((text for text in ASCII), ["type generator", "only once", "list(data)"]),
    "number": (17, ["type int", "list of strings"]),
    "bytes": (b"text", ["type bytes", "list of strings"]),
    "dict": ({"text": ASCII}, ["type dict", "list of strings"]),
    "set": ({"a", "b"}, ["type set", "order"]),
    "empty list": ([], ["type list", "empty"]),
    "number in list": (["a", 3], ["`data[1]`", "type int", "a string was wanted"]),
    "None in list": ([None], ["`data[0]`", "NoneType"]),
    "record in list": ([{"id": 3, "title": "x"}], ["`data[0]`", "no column 'text'", "'id', 'title'", "`column`"]),
    "empty documents": (["", "", ""], ["no tokens", "empty"]),
    "bare text": ("The cat sat.", ["'The cat sat.'", "neither a path", "list of strings", "[text]"]),
    "long text": ("word " * 500, ["...", "[text]"]),
    "NUL": ("a\0b", ["neither a path", "[text]"]),
    "empty string": ("", ["''", "[text]"]),
    "missing file": ("no/such.jsonl", ["'no/such.jsonl'", "no such file"]),
    "missing folder": ("./data", ["'./data'", "no such file or folder"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name):
    data, parts = BAD_DATA[name]
    refusal(data, "`data", *parts)


BAD_FILES = {
    "empty.txt": (b"", ["the file 'empty.txt'", "is empty"]),
    "empty.parquet": (b"", ["the file", "is empty"]),
    "bom.txt": (b"\xef\xbb\xbf", ["no tokens"]),
    "binary.txt": (b"\x7fELF\0\0", ["'binary.txt'", "binary file", "UTF-8"]),
    "utf16.jsonl": (
        '{"text": "a"}'.encode("utf-16"),
        ["is UTF-16 text", "UTF-8 was wanted", "`iconv -f UTF-16 -t UTF-8`"],
    ),
    "utf16le.txt": ("Without a mark.\n".encode("utf-16-le"), ["is UTF-16 text"]),
    "utf16be.txt": ("Without a mark.\n".encode("utf-16-be"), ["is UTF-16 text"]),
    "utf32.txt": ("a".encode("utf-32"), ["is UTF-32 text", "UTF-32 -t UTF-8"]),
    "latin.txt": (b"x" * 70 + b"caf\xe9 x", ["'latin.txt'", "not UTF-8 at byte 73"]),
    "cut.txt": (b"\xef\xbb\xbf" + b"x" * 30 + "é".encode()[:1], ["not UTF-8 at byte 33"]),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', ["not UTF-8 at byte 24"]),
    "broken.jsonl": (
        b'{"text": "a"}\n\n{"text": "b"\n',
        ["line 3 of 'broken.jsonl'", "not JSON", "mend or remove that line"],
    ),
    "deep.jsonl": (b"[" * 200_000, ["line 1 of 'deep.jsonl'", "not JSON"]),
    "list.jsonl": (b'["a"]\n', ["line 1 of 'list.jsonl'", "type list", 'JSON object, {"text": "..."}']),
    "column.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n', ["line 2 of", "no column 'text'", "'body', 'id'"]),
    "type.jsonl": (b'{"text": 7}\n', ["'text' of line 1", "type int", "not text", "`column`"]),
    "blank.jsonl": (b"\n \n", ["no tokens"]),
    "false.parquet": (b"text", ["'false.parquet'", "no sound parquet file"]),
    "a.pdf": (b"%PDF", ["'a.pdf'", ".txt, .jsonl or .parquet", "convert"]),
    "none": (b"text", ["'none'", ".txt, .jsonl or .parquet"]),
}


@pytest.mark.parametrize("block", [8, 1 << 18])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(files_module, "BLOCK", block)
    monkeypatch.chdir(tmp_path)
    content, parts = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    refusal(name, "`data`", *parts)


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    refusal(path, "a.parquet", "no column 'text'", "'id', 'body'", "`column`")
    refusal(path, "'id' of row 0", "type int", "not text", column="id")
    pq.write_table(pa.table({"text": pa.array(["ok", "x"]).cast(pa.binary())}), path)
    refusal(path, "type bytes", "not text")
    invalid = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], "<i4")), pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"text": invalid}), path)
    refusal(path, "no sound parquet file", "utf-8")
    pq.write_table(pa.table({"text": ["a mouse " * 50] * 3000}), path, compression="none", use_dictionary=False)
    content = path.read_bytes()
    path.write_bytes(content[:2000] + b"\xff" * 900_000 + content[902_000:])
    refusal(path, "no sound parquet file")


def test_bad_folders_and_paths(tmp_path):
    refusal(tmp_path, "no files", ".txt, .jsonl or .parquet")
    (tmp_path / "a.csv").touch()
    (tmp_path / "Makefile").touch()
    (tmp_path / ".b.txt").write_text("hidden")
    refusal(tmp_path, "'.csv', 'Makefile'", ".txt, .jsonl or .parquet")
    (tmp_path / "c.txt").symlink_to("nowhere.txt")
    refusal(tmp_path, "c.txt", "cannot be read", "No such file")
    refusal(tmp_path / "missing", "missing'", "no such file or folder")
    os.mkfifo(tmp_path / "pipe.txt")
    refusal(tmp_path / "pipe.txt", "pipe.txt", "not a regular file")


def test_unreadable(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("text")

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    refusal(path, "a.txt", "cannot be read", "Permission denied")
    monkeypatch.setattr("os.scandir", refuse)
    refusal(tmp_path, "cannot be read", "Permission denied", "folder")


BAD_SETTINGS = {
    "context_length": [
        ({"context_length": n}, [f"`context_length` is {n!r}", wanted])
        for n, wanted in ((1, "at least 2"), (0, "1 or more"), (-5, "1 or more"), (True, "a whole number, 1 or more"))
    ],
    "encoder": [({"context_length": 2, "tokenizer": TOKENIZERS["cls"]}, ["`context_length` is 2", "at least 3"])],
    "seed": [({"seed": seed}, [f"`seed` is {seed!r}", "a whole number, 0 or more"]) for seed in (-1, True)],
    "both": [({"truncate": True, "pack": True}, ["`truncate`", "`pack`"])],
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name):
    for settings, parts in BAD_SETTINGS[name]:
        refusal(ASCII, *parts, **settings)


@pytest.mark.parametrize("data", ["no-such-data", "nobody/no-such-data"])
def test_hub_out_of_reach(monkeypatch, data):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refusal(data, repr(data), "neither a local path nor a Hub dataset", "split='train'", "network", ".jsonl")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub dataset `user/data` with one split, streamed by `datasets` itself from a local file."""
    import datasets

    path = tmp_path / "rows.parquet"
    load, asked = datasets.load_dataset_builder, []

    def loader(name, config=None, *, revision=None):
        asked.append((name, config, revision))
        builder = load("parquet", data_files={"train": str(path)}, cache_dir=str(tmp_path))
        builder.hash = "0123456789" * 4
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", loader)
    return path, asked


def test_hub(hub):
    path, asked = hub
    pq.write_table(pa.table({"id": range(len(ASCII)), "text": ASCII}), path)
    stream = TokenStream("user/data", BOS, context_length=16, config="en", data_revision="main")
    assert plain(list(stream)) == plain(list(stream)) == plain(rows_of(ASCII))
    assert asked == [("user/data", "en", "main")]
    found = {key: stream.provenance[key] for key in ("kind", "data", "revision", "config", "split", "column")}
    assert found == {
        "kind": "hub",
        "data": "user/data",
        "revision": "0123456789" * 4,
        "config": "en",
        "split": "train",
        "column": "text",
    }
    refusal("user/data", "split='test'", "train", split="test")
    refusal("user/data", "user/data", "no column 'body'", "'id', 'text'", column="body")
    with pytest.raises(InputError, match=r"^`data`: 'id' of row 0 .* type int"):
        rows_of("user/data", column="id")


def test_hub_that_breaks_off(hub):
    path, _ = hub
    pq.write_table(pa.table({"text": ASCII}), path)
    stream = TokenStream("user/data", BOS)
    path.unlink()
    with pytest.raises(InputError, match="'user/data' broke off"):
        list(stream)


def test_hub_of_chats(hub):
    path, _ = hub
    chats = [{"messages": [{"role": "user", "content": text}]} for text in ASCII]
    pq.write_table(pa.Table.from_pylist(chats), path)
    tokenizer = byte_level()
    tokenizer.chat_template = "<bos>{{ messages[0]['content'] }}"
    stream = TokenStream("user/data", tokenizer, context_length=16, column="messages")
    assert plain(list(stream)) == plain(rows_of([f"<bos>{text}" for text in ASCII]))
    assert len(stream.provenance["chat_template"]) == 64
    pq.write_table(pa.table({"text": ASCII}), path)
    assert "chat_template" not in TokenStream("user/data", tokenizer).provenance
