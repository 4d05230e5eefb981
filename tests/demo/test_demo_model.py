"""The shipped model and its text: they load offline, fit in 5 MB, and the model has learned what it was trained on."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from itda import demo

ROWS, CONTEXT = 40, 128  # about 5,000 tokens


@pytest.fixture(scope="module")
def documents():
    return demo.documents()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.model_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.model_path(), local_files_only=True)


def tokens(tokenizer, texts):
    return np.concatenate(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def test_folder_is_small():
    assert sum(path.stat().st_size for path in demo.model_path().rglob("*")) <= 5_000_000


def test_model_loads_in_float32_with_its_weights_finite(model):
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers >= 4
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_tokenizer_has_bos_and_offsets_and_writes_every_text(tokenizer, model):
    text = "Return the naïve 総和 of `x`;\n\traise ValueError 🐍 otherwise.\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokenizer.is_fast
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.bos_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.decode(encoded["input_ids"]) == text
    covered = {i for start, end in encoded["offset_mapping"] for i in range(start, end)}
    assert covered == set(range(len(text)))


def test_model_beats_a_unigram_on_documents_it_never_saw(documents, tokenizer, model):
    size, bos = len(tokenizer), tokenizer.bos_token_id
    seen = tokens(tokenizer, [text for name, text in documents.items() if not demo.held_out(name)])
    unseen = tokens(tokenizer, [text for name, text in documents.items() if demo.held_out(name)])
    n_rows = len(unseen) // (CONTEXT - 1)
    rows = unseen[: n_rows * (CONTEXT - 1)].reshape(n_rows, -1)[:: max(1, n_rows // ROWS)]
    unigram = -np.log((np.bincount(seen, minlength=size) + 1) / (len(seen) + size))[rows].mean()
    ids = torch.from_numpy(np.insert(rows, 0, bos, axis=1))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert rows.size >= 4_000
    # The margin is most of what training bought: an untrained model stands above the unigram.
    assert loss < unigram - 1.5


def test_corpus_is_that_of_every_call_and_large(documents, tokenizer):
    again = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import demo
print(hashlib.sha256("\\0".join(demo.corpus()).encode()).hexdigest())
"""
    command = [sys.executable, "-c", again, str(demo.model_path().parent.parent)]  # no torch, another hash seed
    digest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert digest == hashlib.sha256("\0".join(documents.values()).encode()).hexdigest()
    assert len(tokens(tokenizer, list(documents.values()))) >= 150_000


def test_documents_are_of_the_standard_library_and_not_of_its_tests(documents):
    names = {name for name in documents if not name.startswith("help:")}
    parts = {part for name in names for part in name.split(".")}
    assert list(documents) == sorted(documents)
    assert {"json", "unittest.mock", "doctest", "asyncio.base_events"} <= names
    assert not any(part.startswith(("test", "_test")) for part in parts)
    assert not parts & {"idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "_sysconfigdata"}
    assert all(len(text) >= demo.MIN_CHARACTERS for text in documents.values())


def test_held_out_documents_are_few_and_repeat_no_paragraph_of_the_others(documents):
    def paragraphs(held):
        chosen = [text for name, text in documents.items() if demo.held_out(name) == held]
        return {" ".join(paragraph.split()) for text in chosen for paragraph in text.split("\n\n")}

    assert 0.02 < np.mean([demo.held_out(name) for name in documents]) < 0.1
    assert not paragraphs(True) & paragraphs(False)


def test_a_file_that_is_not_python_and_one_that_is_gone_are_left_out(tmp_path, monkeypatch):
    docstring = '"""' + "Words of a module. " * 40 + '"""'
    (tmp_path / "good.py").write_text(docstring)
    (tmp_path / "short.py").write_text('"""Too short."""')
    (tmp_path / "broken.py").write_text(docstring + "\nprint 'old'")
    (tmp_path / "bytes.py").write_bytes(b"\0\xff")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    for folder in ("test", "site-packages", "package/tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "hidden.py").write_text(docstring.replace("Words", folder))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # a Python without help topics
    assert list(demo.documents()) == ["good"]
