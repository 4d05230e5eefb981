"""What a folder or an argument asks for is read, or refused, or named: kinds of files, splits, links, pointers."""

import bz2
import gzip
import json
import lzma
import os
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from itda.errors import InputError
from itda.reading.saelens_cache import is_cache
from itda.text.documents import Unread, open_documents
from itda.text.prompts import TokenStream, hash_rows
from itda.text.reread import settings_of, stream_of
from tests import tiny_models

DOCUMENTS = ["A mouse.\nAnd a cat.", "", 'naïve 東京 🙂 "quoted", with\ttabs', "the end"]
RECORDS = [{"text": text, "id": i} for i, text in enumerate(DOCUMENTS)]
WORDS = tiny_models.tokenizer()


def texts(data, **source) -> list[str]:
    """The documents of `data`."""
    given = {"column": "text", "split": None, "config": None, "data_revision": None, **source}
    return ["".join(blocks) for blocks in open_documents(data, given)[1]()]


def stream(data, **settings) -> TokenStream:
    return TokenStream(data, WORDS, context_length=16, **settings)


def refusal(data, *parts: str, **source) -> None:
    with pytest.raises(InputError) as caught:
        texts(data, **source)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 700, sentence
    for part in parts:
        assert part in sentence, sentence


@pytest.fixture(autouse=True)
def nothing_unread():
    """No file is left unread, unless a test says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Unread)
        yield


# -- kinds of files


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}


def table(separator: str) -> bytes:
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator)
    writer.writerows([("id", "text"), *((i, text) for i, text in enumerate(DOCUMENTS))])
    return b"\xef\xbb\xbf" + out.getvalue().encode()


KINDS = {
    ".jsonl": "\n".join(map(json.dumps, RECORDS)).encode(),
    ".ndjson": "\n".join(map(json.dumps, RECORDS)).encode(),
    ".json": json.dumps(RECORDS).encode(),
    ".pretty.json": json.dumps(RECORDS, indent=2).encode(),
    ".lines.json": "\r\n".join(map(json.dumps, RECORDS)).encode(),
    ".several.json": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    ".csv": table(","),
    ".tsv": table("\t"),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_documents(tmp_path, monkeypatch, kind, packed):
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACKED[packed](KINDS[kind]))
    assert texts(path) == texts(tmp_path) == DOCUMENTS
    for block in (1, 7):
        monkeypatch.setattr("itda.text.files.BLOCK", block)
        assert texts(path) == DOCUMENTS


@pytest.mark.parametrize("packed", PACKED)
def test_packed_text_is_one_document(tmp_path, packed):
    (tmp_path / f"A.TXT{packed}").write_bytes(PACKED[packed]("\ufeffnaïve\r\n".encode() * 2))
    assert texts(tmp_path) == ["naïve\r\n\ufeffnaïve\r\n"]


@pytest.mark.parametrize("packed", [".gz", ".zst", ".bz2", ".xz"])
def test_packed_files_of_several_parts_and_cut_ones(tmp_path, packed):
    whole = PACKED[packed](b"one ") + PACKED[packed](b"two")
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(whole)
    assert texts(path) == ["one two"]
    path.write_bytes(PACKED[packed](os.urandom(5000).hex().encode())[:-100])
    refusal(path, f"no sound {packed} file", "fetch it again")
    path.write_bytes(b"no packing")
    refusal(path, f"no sound {packed} file", "fetch it again")


BAD = {
    "cut.json": (b'[{"text": "a"}, {"text": "b"', ["cut short", "record 1", "fetch it again"]),
    "cut in a string.json": (b'[{"text": "a"}, {"text": "b', ["cut short", "record 1", "fetch it again"]),
    "cut after a record.json": (b'[{"text": "a"}, {"text": "b"}\n', ["cut short", "record 2", "fetch it again"]),
    "cut after a comma.json": (b'[{"text": "a"}, ', ["cut short", "record 1", "fetch it again"]),
    "cut at once.json": (b"[", ["cut short", "record 0", "fetch it again"]),
    "comma.json": (b'[{"text": "a"} {"text": "b"}]', ["not JSON", "'{' before record 1", "',' or ']'", "mend"]),
    "commas.json": (b'[{"text": "a"},,,]]]],{"text": "b"}', ["record 1 of", "not JSON", "mend"]),
    "last comma.json": (b'[{"text": "a"},]', ["record 1 of", "not JSON", "mend"]),
    "ends.json": (b'[{"text": "a"}]]]', ["not JSON", "']' after its list", "mend"]),
    "more.json": (b'[{"text": "a"}, {"text": "b"}] {"text": "c"}', ["not JSON", "'{' after its list", "mend"]),
    "odd.json": (b'[{"text": "a"}, {text}, 1]' + b" " * 99, ["record 1 of", "not JSON"]),
    "strings.json": (b'["a", "b"]', ["record 0 of", "type str", 'JSON object, {"text": "..."}']),
    "columns.json": (b'{"text": ["a", "b"]}', ["'text' of record 0", "type list", "`column`"]),
    "deep.json": (b"[" * 200_000, ["not JSON"]),
    "fields.csv": (b"id,text\n1,a\n2\n", ["row 1 of", "1 field,", "names 2"]),
    "column.csv": (b"id,body\n1,a\n", ["no column 'text'", "'id', 'body'", "`column`"]),
    "bare.csv": (b"id,body\n", ["no column 'text'"]),
    "quote.csv": (b'text\n"a"b\n', ["row 0 of", ".csv", "mend"]),
    "latin.csv": (b"text\n\xe9\n", ["not UTF-8"]),
    "pretty.jsonl": (json.dumps(RECORDS[0], indent=2).encode(), ["pretty-printed JSON", "rename it to .json"]),
    "list.jsonl": (json.dumps(RECORDS, indent=2).encode(), ["pretty-printed JSON", "rename it to .json"]),
    "cut.jsonl": (b'{"text": "a"', ["line 1 of", "not JSON"]),
    "utf16.csv": ("text\na\n".encode("utf-16"), ["is UTF-16 text"]),
    "dump.gz": (gzip.compress(b"text"), ["'dump.gz'", ".txt, .jsonl or .parquet", "rename"]),
    "a.parquet.gz": (b"x", ["'a.parquet.gz'", "all but .parquet"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(BAD[name][0])
    for block in (1 << 18, 7):
        if len(BAD[name][0]) < 1000:
            monkeypatch.setattr("itda.text.files.BLOCK", block)
        refusal(name, "`data`", *BAD[name][1])


def test_a_column_that_is_there_twice(tmp_path):
    """Which of them is meant, nobody can tell; of another column it does not matter."""
    for names, refused in ((["text", "text"], True), (["text", "id", "id"], False)):
        table = pa.Table.from_arrays([pa.array([name]) for name in "abc"[: len(names)]], names=names)
        pq.write_table(table, tmp_path / "a.parquet")
        (tmp_path / "a.csv").write_text(",".join(names) + "\n" + ",".join("abc"[: len(names)]) + "\n")
        for path in (tmp_path / "a.parquet", tmp_path / "a.csv"):
            if refused:
                refusal(path, "has 2 columns 'text'", "rename")
            else:
                assert texts(path) == ["a"]


def test_lists_without_records_and_records_without_a_list(tmp_path):
    path = tmp_path / "a.json"
    for written, read in (("[]", []), (" [ ]\n", []), ('{"text": "a"}{"text": "b"}', ["a", "b"]), (" ", [])):
        path.write_text(written)
        assert texts(path) == read


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_has_as_many_documents_as_rows(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    for rows in range(4):
        path.write_text("text\n" + "x\n" * rows)
        assert texts(path) == ["x"] * rows
        path.write_text("text\n" + "\nx\n" * rows)
        assert texts(path) == ["x"] * rows


def test_advice_about_pretty_printed_files_works(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORDS, indent=2))
    refusal(path, "rename it to .json")
    assert texts(path.rename(tmp_path / "a.json")) == DOCUMENTS


def test_a_long_json_is_read_in_pieces_and_a_broken_one_no_further(tmp_path, monkeypatch):
    monkeypatch.setattr("itda.text.files.BLOCK", 1000)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "word " * 1000}] * 300) + " ")
    documents = open_documents(path, {"column": "text"})[1]
    first = documents()
    next(first)
    assert documents.reading.here < 20_000 < path.stat().st_size
    path.write_text('[{"text": "a"}, {"text" "b"}, ' + '{"text": "c"}, ' * 100_000 + "{}]")
    documents = open_documents(path, {"column": "text"})[1]
    with pytest.raises(InputError, match="record 1 of"):
        list(documents())
    assert documents.reading.here < 20_000


# -- folders


def test_a_readme_beside_packed_files_is_not_all_that_is_read(tmp_path):
    (tmp_path / "README.txt").write_text("Read me.")
    for i in range(3):
        (tmp_path / f"{i}.json.gz").write_bytes(gzip.compress(json.dumps([{"text": f"{i}"}, {"text": "x"}]).encode()))
    assert texts(tmp_path) == ["0", "x", "1", "x", "2", "x", "Read me."]
    assert stream(tmp_path).provenance["files"] == 4


def test_what_is_data_like_and_not_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "meta.json").write_text('{"source": "x"}')
    (tmp_path / "more").mkdir()
    for name in ("b.pdf", "c.pdf", "more/d.zip", "e.docx"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("README.md", "LICENSE", "dataset_infos.json", ".hidden.pdf"):
        (tmp_path / name).write_text("about the data")
    with pytest.warns(Unread, match=r"Not read in .*: 'b.pdf', 'c.pdf', 'e.docx' and 2 more \(2 .pdf, 1 .docx, 1 .zip"):
        found = stream(tmp_path)
    assert found.provenance["unread"] == {".pdf": 2, ".docx": 1, ".zip": 1, ".json": 1}
    assert found.provenance["files"] == 1


def test_tables_without_the_column_are_refused_where_there_is_nothing_else(tmp_path):
    (tmp_path / "a.csv").write_text("body\nx\n")
    refusal(tmp_path, "no column 'text'", "'body'", "`column`")


@pytest.mark.parametrize(
    ("pointer", "what", "how"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n",
            "Git LFS",
            "git lfs pull",
        ),
        ("/annex/objects/SHA256E-s12345--" + "0" * 64 + ".txt\n", "git-annex", "git annex get"),
    ],
)
def test_pointer_files_are_called_that(tmp_path, pointer, what, how):
    for name in ("a.txt", "b.parquet", "c.json.gz", "d.csv"):
        (tmp_path / "one").mkdir(exist_ok=True)
        for path in (tmp_path / name, tmp_path / "one" / name):
            path.write_text(pointer)
        refusal(tmp_path / name, f"is a {what} pointer", how)
        refusal(tmp_path / "one", f"is a {what} pointer", how)
        (tmp_path / "one" / name).unlink()
    (tmp_path / "one" / "z.pdf").write_text(pointer)
    refusal(tmp_path / "one", f"is a {what} pointer", how)


def test_linked_folders_are_read_once(tmp_path):
    for name in ("data/b/1.txt", "data/b/2.txt", "data/.git/0.txt", "other/3.txt", "other/deep/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    data = tmp_path / "data"
    (data / "a").symlink_to(data / "b")  # sorts before what it leads to
    (data / "c").symlink_to(tmp_path / "other")
    (data / "d").symlink_to(tmp_path / "other" / "deep")
    (data / "loop").symlink_to(data)
    (tmp_path / "other" / "back").symlink_to(data)
    assert texts(data) == ["data/b/1.txt", "data/b/2.txt", "other/3.txt", "other/deep/4.txt"]
    (tmp_path / "way").symlink_to(data)
    assert texts(tmp_path / "way") == texts(data)


def test_linked_files_are_read_once(tmp_path):
    data = tmp_path / "data"
    write(data / "b.txt", "b")
    write(data / "train" / "c.txt", "c")
    write(tmp_path / "other.txt", "other")
    (data / "a.txt").symlink_to("b.txt")  # sorts before what it leads to
    (data / "z.txt").symlink_to(data / "train" / "c.txt")
    for name in ("x.txt", "y.txt"):
        (data / name).symlink_to(tmp_path / "other.txt")
    assert texts(data) == ["b", "c", "other"]
    assert stream(data).provenance["files"] == 3


def test_a_link_from_one_split_to_another_stays_in_both(tmp_path):
    write(tmp_path / "train.txt", "x")
    (tmp_path / "test.txt").symlink_to("train.txt")
    (tmp_path / "latest.txt").symlink_to("train.txt")
    assert texts(tmp_path) == texts(tmp_path, split="test") == texts(tmp_path, split="all") == ["x"]


@pytest.mark.parametrize("name", ["state.json", "config.json", "dataset_info.json"])
def test_records_under_a_name_of_a_file_about_data_are_read(tmp_path, name):
    write(tmp_path / name, json.dumps(RECORDS))
    assert texts(tmp_path) == DOCUMENTS
    write(tmp_path / "a.txt", "a")
    assert texts(tmp_path) == ["a", *DOCUMENTS]
    for about in ('{"model_type": "x"}', '{"text": {"features": 1}}', "{broken", "[1]", ""):
        write(tmp_path / name, about)
        assert texts(tmp_path) == ["a"]


# -- splits, configurations


def write(path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    else:
        path.write_text(text)


LAYOUTS = {
    "hub": ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    "own names": [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/odd-00000-of-00001.parquet",
    ],
    "files": ["train.txt", "test.txt", "validation.txt"],
    "folders": ["train/a.txt", "train/b.txt", "test/a.txt"],
    "keywords": ["my-training-1.txt", "my_dev_1.txt"],
    "odd [names]": ["train [x].txt", "test * ?.txt"],
    "plain": ["a.txt", "b/c.txt"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_of_datasets(tmp_path, layout):
    folder = tmp_path / "clone"
    for name in LAYOUTS[layout]:
        write(folder / name, name)
    kind = "parquet" if LAYOUTS[layout][0].endswith("parquet") else "text"
    whole = {"sample_by": "document"} if kind == "text" else {}
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), **whole)
    for split, rows in theirs.items():
        assert texts(folder, split=split) == rows["text"]
        assert stream(folder, split=split).provenance["split"] == split
    assert texts(folder) == theirs["train"]["text"]
    assert sorted(texts(folder, split="all")) == sorted(LAYOUTS[layout])
    refusal(folder, "`split` is 'dev'", "name one that is there", split="dev")


def test_a_name_alone_makes_no_split_unasked(tmp_path):
    for name in ("a train to town.txt", "b.txt"):
        write(tmp_path / name, name)
    assert texts(tmp_path) == ["a train to town.txt", "b.txt"]
    with pytest.warns(Unread, match=r"'b\.txt'"):
        assert texts(tmp_path, split="train") == ["a train to town.txt"]
    write(tmp_path / "the test.txt", "x")
    with pytest.warns(Unread, match=r"'b\.txt'"):
        assert texts(tmp_path) == ["a train to town.txt"]


@pytest.mark.parametrize("asked", ["split", "config", "data_revision"])
@pytest.mark.parametrize("kind", ["list", "file", "folder", "saved"])
def test_what_has_no_effect_is_refused(tmp_path, kind, asked):
    path = tmp_path / "a"
    if kind == "file":
        path = tmp_path / "a.txt"
        path.write_text("text")
    elif kind == "folder":
        write(path / "a.txt", "text")
    elif kind == "saved":
        Dataset.from_list(RECORDS).save_to_disk(path)
    data = ["text"] if kind == "list" else path
    refusal(data, f"`{asked}` is 'other'", **{asked: "other"})
    with pytest.raises(InputError, match=f"`{asked}` is 'other'"):
        stream(data, **{asked: "other"})
    assert texts(data, split="train", config="default") == texts(data, split="all") == texts(data)


def test_configurations_are_those_of_the_readme(tmp_path):
    for name in ("en/train.txt", "en/test.txt", "de/train.txt"):
        write(tmp_path / name, name)
    head = "".join(f"- config_name: {c}\n  data_dir: {c}\n" for c in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{head}---\n# Data\n")
    assert texts(tmp_path, config="en") == ["en/train.txt"]
    assert texts(tmp_path, config="en", split="test") == ["en/test.txt"]
    assert texts(tmp_path, config="de", split="all") == ["de/train.txt"]
    said = stream(tmp_path, config="de").provenance
    assert (said["config"], said["split"], said["files"], said["unread"]) == ("de", "train", 1, {})
    refusal(tmp_path, "README.md names configurations", "`config` is None", "en")
    refusal(tmp_path, "`config` is 'fr'", "en", config="fr")
    refusal(tmp_path, "`split` is 'test'", "'train'", config="de", split="test")


BAD_READMES = {
    "yaml": ("configs:\n- config_name: en\n   data_files: [a.txt\n", None, ["cannot be read ("]),
    "kind": ("configs: en\n", None, ["cannot be read ("]),
    "pattern": ("configs:\n- config_name: en\n  data_files: b*.txt\n", None, ["match no file"]),
    "named": ("configs:\n- config_name: en\n  data_files: b*.txt\n", "en", ["match no file"]),
    "folder": ("configs:\n- config_name: en\n  data_dir: b\n", "en", ["match no file"]),
}


@pytest.mark.parametrize("name", BAD_READMES)
def test_a_readme_that_names_no_files_is_blamed_itself(tmp_path, name):
    head, config, parts = BAD_READMES[name]
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "README.md", f"---\n{head}---\n# Data\n")
    refusal(tmp_path, "README.md", "`configs`", "mend or remove", *parts, config=config)
    with pytest.raises(InputError) as caught:
        texts(tmp_path, config=config)
    assert "`config` is" not in str(caught.value)


# -- `save_to_disk`


def test_saved_data_sets_are_read(tmp_path):
    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "one", num_shards=2)
    assert not is_cache(tmp_path / "one") and texts(tmp_path / "one") == DOCUMENTS
    assert hash_rows(stream(tmp_path / "one")) == hash_rows(stream(DOCUMENTS))
    refusal(tmp_path / "one", "no column 'body'", "'text', 'id'", column="body")
    halves = {"train": Dataset.from_list(RECORDS[:2]), "odd": Dataset.from_list(RECORDS[2:], split="odd")}
    DatasetDict(halves).save_to_disk(tmp_path / "dict")
    assert texts(tmp_path / "dict") == texts(tmp_path / "dict", split="train") == DOCUMENTS[:2]
    assert texts(tmp_path / "dict", split="odd") == DOCUMENTS[2:]
    assert texts(tmp_path / "dict", split="all") == DOCUMENTS
    refusal(tmp_path / "dict", "`split` is 'test'", "'train', 'odd'", split="test")
    assert texts(tmp_path / "dict" / "odd", split="odd") == DOCUMENTS[2:]
    refusal(tmp_path / "dict" / "odd", "`split` is 'test'", split="test")


def test_saved_data_sets_in_a_folder_are_read_as_one_file_each(tmp_path):
    Dataset.from_list(RECORDS[:2]).save_to_disk(tmp_path / "a")
    Dataset.from_list(RECORDS[2:]).save_to_disk(tmp_path / "b")
    assert texts(tmp_path) == DOCUMENTS
    assert stream(tmp_path).provenance["files"] == 2


def test_saved_tokens_are_no_cache_of_activations_and_no_text(tmp_path):
    Dataset.from_dict({"input_ids": [[1, 2], [3]]}).save_to_disk(tmp_path / "a")
    assert not is_cache(tmp_path / "a")
    refusal(tmp_path / "a", "no column 'text'", "'input_ids'")
    Dataset.from_dict({"blocks.0.hook_resid_post": [[[0.5, 1.0]]], "token_ids": [[1]]}).save_to_disk(tmp_path / "b")
    assert is_cache(tmp_path / "b")


# -- dictionaries of before


def test_a_folder_is_read_again_as_it_was(tmp_path):
    for name in ("train.txt", "test.txt", "a.csv"):
        write(tmp_path / name, name if name.endswith("txt") else "text\nx\n")
    write(tmp_path / ".beside" / "b.txt", "b")
    (tmp_path / "link").symlink_to(tmp_path / ".beside")
    old = {"kind": "folder", "data": str(tmp_path), "split": None, "context_length": 16, "tokenizer_hash": "x"}
    assert settings_of(old)["bos"] is None
    assert [row.text for row in stream_of(old, tmp_path, WORDS)] == ["test.txt", "train.txt"]
    with pytest.warns(Unread, match=r"'a\.csv', 'link/b\.txt'"):
        now = stream(tmp_path, split="train").provenance
    with pytest.warns(Unread):
        assert [row.text for row in stream_of(now, tmp_path, WORDS)] == ["train.txt"]
