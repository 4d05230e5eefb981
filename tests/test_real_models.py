"""The main commands on two real language models: `make test-real`, a quarter of an hour on two cores.

They run where `make real-models` has been; the text is the demo's, the docstrings of this Python.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import itda
from itda import demo
from itda.cli.main import main

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

ROOT = Path(itda.__file__).parents[1]
BLOCKS = {"smollm2": (30, 576), "gemma3": (18, 640)}
LAYER = {"smollm2": 15, "gemma3": 9}
SENTENCE = "The capital of France is"


def real_models():
    """benchmarks/real_models.py, which knows where they are."""
    spec = importlib.util.spec_from_file_location("real_models", ROOT / "benchmarks" / "real_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=list(BLOCKS))
def name(request):
    if real_models().path_of(request.param) is None:
        pytest.skip(f"{request.param} is not on this machine: run `make real-models`")
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return str(real_models().path_of(name))


@pytest.fixture(scope="module")
def home(tmp_path_factory, name):
    """A folder with text to train on, and other text."""
    home = tmp_path_factory.mktemp(name)
    texts = demo.documents()
    (home / "train").mkdir()
    for other in (False, True):
        text = "\n\n".join(text for key, text in texts.items() if demo.held_out(key) == other)
        (home / ("held.txt" if other else "train/book.txt")).write_text(text, encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def trained(home, model, name):
    """The dictionary that `itda train` makes of 8,000 tokens where nothing else is said."""
    out = home / "dictionary"
    assert main([*train(model, home, name), "--out", str(out)]) == 0
    return out


def train(model, home, name, *more):
    return ["train", model, str(home / "train"), "--layer", str(LAYER[name]), "--tokens", "8000", *more]


def said(capsys, *command):
    """What a command prints with --json."""
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "eval.json"}


def test_the_models_know_what_they_should(model):
    """So their weights were unpacked rightly."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for text, word in (("The opposite of hot is", " cold"), (f"{SENTENCE} Paris. Rome is the capital of", " Italy")):
        with torch.no_grad():
            next_token = int(loaded(**tokenizer(text, return_tensors="pt")).logits[0, -1].argmax())
        assert tokenizer.decode(next_token) == word


def test_hooks_names_every_block(name, model, capsys):
    found = said(capsys, "hooks", model)
    blocks, width = BLOCKS[name]
    assert found["d"] == width
    assert found["n_layers"] == blocks
    outputs = [point for point in found["hook_points"] if str(point["alias"]).endswith("hook_resid_post")]
    assert [point["layer"] for point in outputs] == list(range(blocks))


def test_activations_are_those_of_transformers(name, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    batch = next(iter(itda.activations(model, [SENTENCE * 3], layer=LAYER[name], dtype="float32", bos="always")))
    assert np.asarray(batch.labels.position).tolist() == list(range(1, len(batch.labels) + 1))
    bos = AutoTokenizer.from_pretrained(model).bos_token_id
    ids = torch.tensor([[bos, *np.asarray(batch.labels.token_id).tolist()]])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        states = loaded(ids, output_hidden_states=True).hidden_states[LAYER[name] + 1][0, 1:]
    assert torch.allclose(batch.activations, states, rtol=1e-4, atol=1e-4 * float(states.norm(dim=1).median()))


def test_a_dictionary_beats_random_tokens(trained, home, name, capsys):
    found = said(capsys, "eval", str(trained), str(home / "held.txt"), "--tokens", "3000", "--ce-tokens", "600")
    mine, random = found["systems"]["itda"], found["systems"]["random tokens"]
    assert found["verdict"]["error"]["says"] == "better"
    assert mine["fvu_robust"] < random["fvu_robust"] < 1
    assert 0.9 < mine["ce"]["score"] <= 1.01


def test_a_killed_training_goes_on_to_the_same_bytes(trained, home, model, name):
    out = home / "killed"
    words = [sys.executable, "-m", "itda", *train(model, home, name), "--out", str(out), "--checkpoint-seconds", "1"]
    running = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(home.glob("killed*/**/*.safetensors")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert main([*train(model, home, name), "--out", str(out)]) == 0
    assert files(out) == files(trained)


def test_a_store_gives_the_dictionary_of_its_model(trained, home, model, name):
    store, out = home / "store", home / "stored"
    place = ["--layer", str(LAYER[name]), "--tokens", "8000"]
    assert main(["collect", model, str(home / "train"), *place, "--out", str(store)]) == 0
    assert main(["train", model, str(store), *place, "--out", str(out)]) == 0
    assert torch.equal(itda.ITDA.load(out).atoms, itda.ITDA.load(trained).atoms)


def test_streaming_reads_what_hooking_reads(home, model, name):
    text = (home / "held.txt").read_text(encoding="utf-8")[:4000]
    plain, streamed = (
        torch.cat([b.activations for b in itda.activations(model, [text], layer=LAYER[name], stream_layers=way)])
        for way in (False, True)
    )
    assert torch.equal(plain, streamed)


def test_decompose_adds_up(trained, name):
    found = itda.decompose(str(trained), SENTENCE)
    dictionary = itda.ITDA.load(trained)
    assert found.tokens[found.token] == " is"
    assert 0 < len(found.atoms) <= dictionary.k
    assert sum(atom["share"] for atom in found.atoms) + found.relative_error == pytest.approx(1, abs=0.02)


def test_show_finds_a_word_and_the_atom(trained, capsys):
    shown = said(capsys, "show", str(trained))
    assert shown["n_atoms"] == len(itda.ITDA.load(trained))
    assert said(capsys, "show", str(trained), "--find", "list")


def test_two_models_are_compared_by_the_tokens_they_share(home, capsys):
    models = [real_models().path_of(name) for name in BLOCKS]
    if None in models:
        pytest.skip("one of the two models is not on this machine: run `make real-models`")
    words = ["compare", *map(str, models), "--data", str(home / "held.txt"), "--layer", "4", "12", "--tokens", "1500"]
    found = said(capsys, *words, "--measures", "jaccard", "cka")
    for measure in ("jaccard", "cka"):
        pair = next(pair for pair in found["measures"][measure]["pairs"] if pair["a"] != pair["b"])
        scores = np.asarray(pair["similarity"], dtype=float)
        assert scores.shape == (2, 2)
        assert ((scores >= 0) & (scores < 0.9)).all()


def test_the_export_loads(trained, home):
    pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    from sae_lens import SAE

    out = home / "sae"
    assert main(["export", str(trained), "--to", "saelens", "--out", str(out)]) == 0
    sae = SAE.load_from_disk(str(out))
    assert sae.W_dec.shape[1] == itda.ITDA.load(trained).atoms.shape[1]
