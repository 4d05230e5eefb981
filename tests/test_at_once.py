"""Two of save, load, export, eval and train at once: one is held up at every file it touches while another runs."""

import builtins
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch

import itda
from itda import InputError, locks
from itda.dictionary import folder
from itda.evaluation import evaluate as evaluating
from itda.evaluation.evaluate import Evaluation, content_hash
from itda.interop import saelens
from itda.models import loading
from itda.saes import folder as sae_folder
from tests import tiny_models
from tests.dictionary.test_itda import golden, random_itda, same

CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "open")
PAUSES = 12  # of one call at most, evenly spaced
REFUSED = re.compile(
    r"Another process is \w+ into|has no cfg\.json|training of .* has not finished|There is no folder"
    r"|holds another dictionary than was measured|holds a finished ITDA already|holds no cfg\.json|was replaced while"
    r"|is not of the export that|cfg\.json could not be read|could not be read \(No such file"
)


class Held:
    """Runs a function in a thread, which waits before the system call `at` until it is let go."""

    def __init__(self, at):
        self.at, self.count = at, 0
        self.reached, self.go = threading.Event(), threading.Event()
        self.error, self.thread = None, None

    def step(self):
        if threading.current_thread() is self.thread:
            if self.count == self.at:
                self.reached.set()
                assert self.go.wait(60)
            self.count += 1

    @contextmanager
    def running(self, work):
        def run():
            try:
                work()
            except BaseException as error:
                self.error = error
            finally:
                self.reached.set()

        with pytest.MonkeyPatch.context() as patch:
            for module, names in ((os, CALLS), (builtins, ["open"]), (io, ["open"])):
                for name in names:
                    patch.setattr(module, name, self.watched(getattr(module, name)))
            self.thread = threading.Thread(target=run)
            self.thread.start()
            try:
                assert self.reached.wait(60)
                yield
            finally:
                self.go.set()
                self.thread.join(60)

    def watched(self, function):
        def watched(*args, **kwargs):
            self.step()
            return function(*args, **kwargs)

        return watched


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    for module in (folder, evaluating, sae_folder):
        monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(locks, "SETTLING", 0.1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    place = tmp_path_factory.mktemp("store")
    model = loading.load_model(tiny_models.module("gpt2"), tiny_models.tokenizer("gpt2"), hooks=1)
    itda.collect(model, tiny_models.DOCUMENTS[:3], place, layer=1, context_length=32)
    return place


FIRST, SECOND = golden(), random_itda(4, 3, 5, sampled=False)


def evaluation(dictionary):
    names = dict.fromkeys(Evaluation.__dataclass_fields__)
    names |= dict.fromkeys(("dictionary", "model", "hook_point", "denominator"), "x") | {"tokens": 1}
    names |= {name: {} for name in ("held_out", "variance", "systems", "seconds")}
    return Evaluation(**names | {"settings": {"dictionary": {"sha256": content_hash(dictionary)}}})


def loaded(path):
    """A dictionary as a reader gets it, which is whole."""
    found = itda.ITDA.load(path)
    assert same(found, FIRST) or same(found, SECOND) or found.cfg.get("stream"), found


def exported(out):
    """An export as a reader gets it: labels and weights of one dictionary."""
    if not (out / "cfg.json").exists():
        raise InputError("It holds no cfg.json.")  # as `load_sae` says
    digest, _ = sae_folder.digests(out)
    try:
        data = (out / "cfg.json").read_bytes()
    except FileNotFoundError:
        raise InputError("It was replaced while it was read.") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise InputError("It was replaced while it was read.")
    cfg = json.loads(data)
    found = {len(d): d.d for d in (FIRST, SECOND)}
    assert found[len(cfg["metadata"]["itda"]["labels"])] == cfg["d_in"]


def trained(path, store):
    itda.train(None, store, path, k=2, threshold=0.3, overwrite=True, checkpoint_seconds=0)


WORKS = {
    "save": lambda path, store: FIRST.save(path),
    "save another": lambda path, store: SECOND.save(path),
    "load": lambda path, store: loaded(path),
    "eval": lambda path, store: evaluation(FIRST).save(path),
    "train": trained,
    "export": lambda path, store: saelens.export(FIRST, path),
    "export another": lambda path, store: saelens.export(SECOND, path),
    "load an export": lambda path, store: exported(path),
}
OF_DICTIONARIES = ["save", "save another", "load", "eval", "train"]
OF_EXPORTS = ["export", "export another", "load an export"]
READERS = {"load", "load an export"}
PAIRS = [
    pair
    for works in (OF_DICTIONARIES, OF_EXPORTS)
    for pair in itertools.product(works, repeat=2)
    if not set(pair) <= READERS  # somebody writes
]
# Where nothing is there before, these; the others go as where something is.
NEW = [("save", "save another"), ("save", "load"), ("export", "export another"), ("train", "save")]


def check(path):
    """What lies in the folder when all is over is whole, and what stands beside a dictionary is about it."""
    if (path / "cfg.json").exists() and "metadata" in json.loads((path / "cfg.json").read_bytes()):
        exported(path)
        assert sorted(os.listdir(path)) == ["cfg.json", "sae_weights.safetensors"]
        return
    loaded(path)
    names = set(os.listdir(path))
    assert names <= {folder.MANIFEST, folder.ATOMS, folder.LABELS, folder.SAMPLE, folder.EVAL}
    if folder.EVAL in names:
        about = json.loads((path / folder.EVAL).read_bytes())["settings"]["dictionary"]["sha256"]
        assert about == content_hash(itda.ITDA.load(path))


@contextmanager
def told():
    """Whatever is refused is refused for what the other one does."""
    try:
        yield
    except InputError as error:
        if not REFUSED.search(str(error)):
            raise AssertionError(error) from error
        raise


@pytest.mark.parametrize(
    ("first", "second", "there"),
    [pytest.param(a, b, True, id=f"{a} and {b}, replacing") for a, b in PAIRS]
    + [pytest.param(a, b, False, id=f"{a} and {b}, new") for a, b in NEW],
)
def test_one_held_up_at_every_step(tmp_path, store, first, second, there):
    def prepared(i):
        path = tmp_path / str(i) / "x"
        if there:
            saelens.export(FIRST, path) if first in OF_EXPORTS else FIRST.save(path)
        else:
            path.parent.mkdir()
        return path

    def tried(work):
        with suppress(InputError), told():
            work()
            return True
        return False

    path = prepared("counted")
    counted = Held(-1)
    with counted.running(lambda: WORKS[first](path, store)):
        pass
    assert counted.error is None or REFUSED.search(str(counted.error)), counted.error
    most = PAUSES if "train" not in (first, second) else 4
    for at in range(0, counted.count, max(1, -(-counted.count // most))):
        path, held = prepared(at), Held(at)
        with held.running(lambda path=path: WORKS[first](path, store)):
            done = tried(lambda path=path: WORKS[second](path, store))
        assert held.error is None or (isinstance(held.error, InputError) and REFUSED.search(str(held.error))), (
            held.error
        )
        if there or done or held.error is None:
            check(path)


def test_a_short_writing_is_waited_for_and_then_read(tmp_path, monkeypatch):
    """A save waits for another, and a reader for one that is just moving files in."""
    monkeypatch.setattr(folder, "PATIENCE", 30.0)
    monkeypatch.setattr(locks, "SETTLING", 30.0)
    path = tmp_path / "x"
    FIRST.save(path)
    moved, replaced = threading.Event(), os.replace

    def slow(*args):
        moved.set()
        time.sleep(0.05)
        return replaced(*args)

    monkeypatch.setattr(os, "replace", slow)
    thread = threading.Thread(target=lambda: SECOND.save(path))
    thread.start()
    assert moved.wait(30)
    assert not (path / "cfg.json").exists()
    assert same(itda.ITDA.load(path), SECOND)
    FIRST.save(path)
    thread.join(30)
    assert same(itda.ITDA.load(path), FIRST)


def test_where_nothing_can_be_locked_it_is_said(tmp_path, monkeypatch):
    import fcntl

    def none(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(locks.NoLocks, match="x cannot be locked there: see to it that no two processes write into it"):
        FIRST.save(tmp_path / "x")
    assert same(itda.ITDA.load(tmp_path / "x"), FIRST)


def test_weights_of_another_export_are_refused(tmp_path):
    out, other = (saelens.export(d, tmp_path / name) for d, name in ((FIRST, "a"), (SECOND, "b")))
    (out / "sae_weights.safetensors").write_bytes((other / "sae_weights.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"is not of the export that cfg\.json is of .*: export the dictionary again"):
        sae_folder.digests(out)


def test_figures_of_a_dictionary_that_was_replaced_stay_away(tmp_path):
    SECOND.save(tmp_path / "x")
    with pytest.raises(InputError, match=r"holds another dictionary than was measured.*name a file.*\(`--out`\)"):
        evaluation(FIRST).save(tmp_path / "x")
    evaluation(FIRST).save(tmp_path / "x.json")
    (tmp_path / "x" / "eval.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match=r"eval\.json is no evaluation of itda's, so it stays: name another file"):
        evaluation(SECOND).save(tmp_path / "x")


def _saves(path, seed, until):
    torch.set_num_threads(1)
    model = replace(FIRST, cfg={**FIRST.cfg, "seed": seed}) if seed % 2 else SECOND
    while time.time() < until:
        model.save(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that begin at once")
def test_processes_that_save_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE", 60.0)
    monkeypatch.setattr(locks, "SETTLING", 20.0)
    path, until = tmp_path / "x", time.time() + 1.5
    FIRST.save(path)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_saves, args=(path, seed, until)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    reads = 0
    while time.time() < until:
        found = itda.ITDA.load(path)
        assert same(found, SECOND) or torch.equal(found.atoms, FIRST.atoms)
        reads += 1
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert reads > 3
    assert len(itda.ITDA.load(path)) in (3, 4)
    assert not [name for name in os.listdir(path) if ".tmp-" in name] and os.listdir(tmp_path) == ["x"]
