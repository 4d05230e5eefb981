"""Every result says how many files and documents were read, and progress how many tokens there are."""

import json
import warnings

import pytest
from datasets import Dataset

import itda
from itda.cli.main import main
from itda.errors import InputError
from itda.progress import Progress
from itda.text.documents import Unread
from tests import tiny_models

DOCUMENTS = [f"{text} {i}" for i, text in enumerate(tiny_models.DOCUMENTS * 3)]
HOW = {"layer": 1, "context_length": 16, "batch_rows": 4}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return str(tiny_models.save("gpt2", tmp_path_factory.mktemp("gpt2")))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "text"
    place.mkdir()
    for i in range(3):
        (place / f"{i}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS[i::3]))
    (place / "paper.pdf").write_bytes(b"%PDF")
    return place


@pytest.mark.parametrize("settings", [{}, {"seed": 2}, {"pack": True}, {"tokens": 100}], ids=str)
def test_a_dictionary_keeps_how_many_files_and_documents_it_is_of(gpt2, folder, tmp_path, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unread)
        stream = itda.activations(gpt2, folder, **HOW, **settings)
        (trained,) = itda.train(gpt2, folder, tmp_path / "out", k=4, **HOW, **settings)
        stored = itda.collect(gpt2, folder, tmp_path / "store", **HOW, **settings)
    documents = {int(document) for batch in stream for document in batch.labels.document}
    said = itda.ITDA.load(tmp_path / "out").cfg["stream"]
    assert said["files"] == trained.files == stored.files == 3
    assert said["unread"] == trained.unread == stored.unread == {".pdf": 1}
    assert said["documents"] == trained.documents == stored.documents == len(documents)
    assert f"\nread: {len(documents)} document{'s' * (len(documents) > 1)} of 3 files; not read: 1 .pdf" in str(trained)
    (again,) = itda.train(None, tmp_path / "store", tmp_path / "again", k=4)
    assert itda.ITDA.load(again.path).cfg["stream"] == said


def test_after_an_interruption_all_documents_count(gpt2, tmp_path):
    stream = itda.activations(gpt2, DOCUMENTS, **HOW)
    whole = itda.build(stream, k=4, threshold=0.3)
    asked = iter([False] * 3 + [True] * 9)
    with pytest.raises(KeyboardInterrupt):
        itda.build(stream, k=4, threshold=0.3, checkpoint=tmp_path / "ck", stop=lambda: next(asked))
    went_on = itda.build(itda.activations(gpt2, DOCUMENTS, **HOW), k=4, threshold=0.3, checkpoint=tmp_path / "ck")
    assert went_on.cfg["stream"] == whole.cfg["stream"]
    assert whole.cfg["stream"]["documents"] == len(DOCUMENTS)


def test_the_command_names_what_it_does_not_read(gpt2, folder, tmp_path, capfd):
    words = ["train", gpt2, str(folder), "--layer", "1", "--context-length", "16", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert f"Not read in {str(folder)!r}: 'paper.pdf'." in err.splitlines()
    assert "of 3 files; not read: 1 .pdf" in out


def test_progress_counts_to_the_end_of_a_file_that_is_shorter(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr("itda.text.prompts.GROUP", (4, 1000))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS * 4))
    told = []
    (trained,) = itda.train(gpt2, path, tmp_path / "out", k=4, tokens=1_000_000, progress=told.append, **HOW)
    told = [step for step in told if isinstance(step, Progress)]
    assert told[-1].tokens == trained.tokens and told[-1].total == pytest.approx(trained.tokens, rel=0.05)
    assert all(step.total < 2 * trained.tokens for step in told)
    few = []
    itda.train(gpt2, path, tmp_path / "few", k=4, tokens=100, progress=few.append, **HOW)
    assert {step.total for step in few if isinstance(step, Progress)} == {100}


def test_chats_and_bos_reach_the_dictionary(gpt2, tmp_path):
    never = itda.build(itda.activations(gpt2, DOCUMENTS, **HOW, bos="never"), k=4, threshold=0.3)
    assert (never.cfg["stream"]["bos"], never.cfg["stream"]["prefix"]) == ("never", [])
    stored = itda.collect(gpt2, DOCUMENTS, tmp_path / "store", **HOW, bos="never")
    with pytest.raises(InputError, match="collected with `bos` = 'never', and 'always' was asked for"):
        itda.activations(None, stored.path, bos="always")


@pytest.mark.parametrize("asked", [{"split": "test"}, {"seed": 1}, {"bos": "never"}, {"padding": True}], ids=str)
def test_a_cache_of_saelens_has_no_text_to_choose_from(tmp_path, asked):
    Dataset.from_dict({"blocks.0.hook_resid_post": [[[0.5, 1.0]] * 3] * 2}).save_to_disk(tmp_path)
    assert len(list(itda.activations(None, tmp_path)))
    with pytest.raises(InputError, match="is an activation cache"):
        itda.activations(None, tmp_path, **asked)


@pytest.mark.parametrize(
    "asked", [{"split": "test"}, {"config": "en"}, {"data_revision": "main"}, {"column": "x"}], ids=str
)
def test_what_a_text_does_not_have_is_said_before_a_model_is_loaded(folder, asked):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unread)
        with pytest.raises(InputError, match=f"`{next(iter(asked))}`"):
            itda.activations("no-such-model", folder, layer=1, **asked)
