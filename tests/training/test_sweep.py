"""A grid of settings: the trainings it stands for, the table of them, and what is refused before any is begun."""

import importlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

import itda
from itda import locks
from itda.cli.main import main
from itda.dictionary import folder, soundness
from itda.errors import Interrupted
from itda.training.grid import jobs_of, read_grid
from itda.training.sweep import RESULTS, TABLE
from tests import tiny_models

DICTIONARY = (folder.ATOMS, folder.LABELS, folder.SAMPLE, folder.MANIFEST)
FILE = """
model = "{model}"
data = "{data}"
layer = [1, -1]
k = [2, 4]
n-atoms = 40
threshold = 0.5
tokens = 200
context-length = 32
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("sweep")
    tiny_models.save("gpt2", home / "model")
    (home / "text.txt").write_text("\n".join(tiny_models.DOCUMENTS * 3), "utf-8")
    (home / "sweep.toml").write_text(FILE.format(model=home / "model", data=home / "text.txt"), "utf-8")
    return home


@pytest.fixture
def grid(home):
    return {
        "model": str(home / "model"),
        "data": home / "text.txt",
        "layer": [1, 3],
        "k": [2, 4],
        "threshold": 0.5,
        "tokens": 200.0,
        "context_length": 32,
    }


@pytest.fixture(scope="module")
def done(home):
    """The sweep of the file, and the folder with it."""
    return itda.sweep(home / "sweep.toml", home / "done"), home / "done"


def dictionaries(out):
    return {
        f"{path.parent.name}/{path.name}": [(path / name).read_bytes() for name in DICTIONARY]
        for path in sorted(Path(out).glob("*/*"))
        if path.is_dir()
    }


def times(out):
    return {str(path): path.stat().st_mtime_ns for path in Path(out).rglob("*.safetensors")}


# -- what it makes ----------------------------------------------------------------------------------------------------


def test_every_combination_is_what_train_makes(done, home, tmp_path):
    found, out = done
    assert [(row["settings"]["layer"], row["hook_point"]) for row in found.rows[:2]] == [
        (1, "transformer.h.1"),
        (-1, "transformer.h.3"),
    ]
    assert len(found.rows) == 2 * 2 * 2
    assert not found.problems
    assert {(row["k"], row["settings"]["n_atoms"], row["threshold"] == 0.5) for row in found.rows} == {
        (k, n, n is None) for k in (2, 4) for n in (None, 40)
    }
    for row in found.rows:
        model = itda.ITDA.load(out / row["folder"])
        assert (row["n_atoms"], row["fvu"], row["tokens"]) == (len(model), model.cfg["fvu"], 200)
    for row in found.rows[::3]:
        size = {"n_atoms": 40} if row["settings"]["n_atoms"] else {"threshold": 0.5}
        how = {"k": row["k"], "tokens": 200, "context_length": 32, "layer": row["settings"]["layer"], **size}
        itda.train(str(home / "model"), str(home / "text.txt"), tmp_path / row["folder"], **how)
    assert len(dictionaries(tmp_path)) == 3
    assert dictionaries(tmp_path).items() <= dictionaries(out).items()


def test_the_table_is_kept(done):
    found, out = done
    kept = json.loads((out / RESULTS).read_text())
    assert kept["rows"] == found.to_json()["rows"]
    lines = (out / TABLE).read_text().splitlines()
    assert len(lines) == 1 + len(found.rows)
    assert lines[0].startswith(
        "model,data,layer,context_length,hook_point,k,threshold,n_atoms,fvu,tokens,seconds,folder"
    )
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == sorted([RESULTS, TABLE])
    for row in found.rows:
        assert row["folder"] in str(found)


def test_what_is_done_is_not_done_again(done, home):
    found, out = done
    before = times(out)
    again = itda.sweep(str(home / "sweep.toml"), out)
    assert again.rows == found.rows
    assert (found.skipped, again.skipped) == (0, 8)
    assert times(out) == before


def test_only_what_is_missing_is_trained(grid, tmp_path):
    itda.sweep(grid, tmp_path / "out")
    before = times(tmp_path / "out")
    more = itda.sweep({**grid, "layer": [0, 1, 3], "k": [4, 2, 3]}, tmp_path / "out")
    after = times(tmp_path / "out")
    assert len(before) == 4
    assert len(after) == 9 == len(more.rows)
    assert after.items() >= before.items()
    damaged = next(Path(path) for path in before)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert itda.sweep(grid, tmp_path / "out").skipped == 3
    changed = {path for path, time in times(tmp_path / "out").items() if before.get(path, time) != time}
    assert changed == {str(damaged)}


def test_a_failing_training_is_told_and_the_others_go_on(home, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(home)
    words = ["sweep", "--model", "../nowhere", "model", "--data", "text.txt", "--layer", "1", "--k", "2", "70000"]
    words += ["--context-length", "32", "--tokens", "200", "--out", str(tmp_path / "out")]
    assert main([*words, "--json"]) == 2
    out, err = capfd.readouterr()
    rows = json.loads(out)["rows"]
    assert [bool(row["problem"]) for row in rows] == [True, True, False, True]
    assert "`../nowhere` is not there" in rows[0]["problem"]
    assert "`k`" in rows[3]["problem"]
    assert "3 of 4 dictionaries are missing (`../nowhere` is not there" in err
    assert {line.split()[0] for line in err.splitlines()[:-1]} <= {"loading", "reading"}
    assert len(list((tmp_path / "out").glob("*/*/cfg.json"))) == 1
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert "1 dictionary in" in out
    assert "1 there before" in out


def test_a_setting_out_of_range_is_said_before_anything_is_trained(home, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(home)
    words = ["sweep", "--model", "model", "--data", "text.txt", "--layer", "1", "--out", str(tmp_path / "out")]
    for flags, says in ((["--k", "2", "0"], "`k` is 0"), (["--loss", "huber"], "`loss` is 'huber'; choose one of")):
        assert main([*words, *flags]) == 2
        assert says in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_given_beside_a_preset_holds():
    """Also where it is the default without one."""
    grid = {"model": ["m"], "data": ["d"], "layer": [1], "preset": ["paper"], "loss": ["relative", "cosine"]}
    assert [job.settings["loss"] for job in jobs_of(grid)] == ["relative", "cosine"]
    assert "loss" not in jobs_of({**grid, "loss": ["relative"], "preset": [None]})[0].settings


def test_a_layer_has_many_names_and_one_dictionary(grid, tmp_path):
    """-1 and 3, and -4 and 0, in one sweep and in those that go on with it."""
    first = itda.sweep({**grid, "layer": [3, -1, -4, 0], "k": 2}, tmp_path / "out")
    assert [(row["settings"]["layer"], row["hook_point"][-1]) for row in first.rows] == [(3, "3"), (-4, "0")]
    assert "2 dictionaries in" in str(first)
    itda.sweep({**grid, "layer": [-1, 0], "k": 2}, tmp_path / "other")
    assert itda.sweep({**grid, "layer": [-4, 3, 0], "k": 2}, tmp_path / "other").skipped == 2
    before = times(tmp_path / "out")
    for layers in ([3], [-1], [0, -4, 3], [-1, -4]):
        again = itda.sweep({**grid, "layer": layers, "k": 2}, tmp_path / "out")
        assert again.skipped == len(again.rows) == min(2, len(layers))
        assert again.rows[0]["settings"]["layer"] == layers[0]
    named = {name: value for name, value in grid.items() if name != "layer"}
    assert itda.sweep({**named, "hook": "transformer.h.3", "k": 2}, tmp_path / "out").skipped == 1
    assert times(tmp_path / "out") == before


def test_a_layer_that_is_not_there_does_not_fail_the_others(grid, home, tmp_path, capfd):
    found = itda.sweep({**grid, "layer": [9, 1, -5, 3], "k": 2}, tmp_path / "out")
    said = [row["problem"] for row in found.rows]
    assert [bool(problem) for problem in said] == [True, False, True, False]
    assert "has no layer 9: it has 4 layers" in said[0]
    assert "has no layer -5" in said[2]
    kept = json.loads((tmp_path / "out" / RESULTS).read_text())["rows"]
    assert [row["problem"] for row in kept] == said
    alone = itda.sweep({**grid, "layer": [1, 3], "k": 2}, tmp_path / "alone")
    assert dictionaries(tmp_path / "out") == dictionaries(tmp_path / "alone")
    assert len(alone.rows) == 2
    rest = {name: value for name, value in grid.items() if name != "layer"}
    found = itda.sweep({**rest, "hook": ["nothing.here", "h.1", "transformer.h.1.mlp"], "k": 2}, tmp_path / "hooks")
    assert [bool(row["problem"]) for row in found.rows] == [True, False, False]
    words = ["--layer", "9", "1", "-5", "3", "--k", "2", "--out", str(tmp_path / "out")]
    (home / "rest.toml").write_text(f"model = '{grid['model']}'\ndata = '{grid['data']}'\ncontext_length = 32\n"
                                    "tokens = 200\nthreshold = 0.5\n")  # fmt: skip
    assert main(["sweep", str(home / "rest.toml"), *words]) == 2
    assert "2 of 4 dictionaries are missing" in capfd.readouterr().err
    assert all(itda.sweep({**grid, "layer": [7, 8], "k": 2}, tmp_path / "none").problems)


def test_interrupted_and_gone_on_with(grid, tmp_path):
    whole = itda.sweep(grid, tmp_path / "whole")
    for batches in (0, 1, 2, 4):
        asked = iter(range(batches, -1, -1))
        with pytest.raises(Interrupted):
            itda.sweep({**grid, "batch_rows": 2}, tmp_path / "out", stop=lambda asked=asked: next(asked, 0) == 0)
    assert not (tmp_path / "out" / ".lock").exists()
    itda.sweep({**grid, "batch_rows": 2}, tmp_path / "once")
    itda.sweep({**grid, "batch_rows": 2}, tmp_path / "out")
    assert dictionaries(tmp_path / "out") == dictionaries(tmp_path / "once")
    assert len(whole.rows) == 4


def test_one_view_of_the_progress(grid, tmp_path):
    said = []
    itda.sweep(grid, tmp_path / "out", progress=said.append)
    assert said.pop() is None
    assert None not in said
    assert str(said[0]).startswith("0 of 2 trainings done · 1 running")
    assert str(said[-1]).startswith("1 of 2 trainings done · 1 running")
    assert [step.tokens for step in said] == sorted(step.tokens for step in said)
    assert said[-1].tokens == said[-1].total == 400


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of POSIX")
def test_flags_and_file_and_mapping_are_one(done, home, capfd):
    _, out = done
    assert main(["sweep", str(home / "sweep.toml"), "--layer", "3", "--out", str(out), "--json"]) == 0
    again = json.loads(capfd.readouterr().out)
    rows = again["rows"]
    assert len(rows) == again["skipped"] == 4
    assert {row["hook_point"] for row in rows} == {"transformer.h.3"}
    flags = [
        "--model",
        str(home / "model"),
        "--data",
        str(home / "text.txt"),
        "--layer",
        "1",
        "--k",
        "2",
        "--n-atoms",
        "4e1",
    ]
    (home / "rest.toml").write_text("context_length = 32\ntokens = 200\n")
    assert main(["sweep", str(home / "rest.toml"), *flags, "--out", str(out), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["skipped"] == 1


# -- the grid ---------------------------------------------------------------------------------------------------------


def test_names_of_folders_are_safe_and_distinct():
    grid = {
        "model": ["../../etc/passwd", "a/" * 200 + "m" * 500, "C:\\model\\", "/", "..", "org/model ⟦x⟧", "-rf"],
        "revision": ["main", "../..", "x" * 300],
        "data": "text.txt",
        "layer": 1,
        "k": [40, 3, 10**30],
        "seed": [0, 1],
    }
    jobs = jobs_of(read_grid(grid))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(jobs) == 7 * 3 * 3 * 2
    for name in names:
        assert len(name) < 80
        assert name.isascii()
        assert not set(name) & set('/\\:*?"<>| \0')
        assert not name.startswith((".", " "))
    same = {
        **grid,
        "layer": [5, 6],
        "k": [3, 40, 10**30],
        "tokens": 1_000_000,
    }  # defaults and layers are not in the name
    assert {job.name for job in jobs_of(read_grid(same))} == set(names)
    assert {job.name for job in jobs_of(read_grid({**grid, "data": "other.txt"}))}.isdisjoint(names)


@pytest.mark.parametrize("more", [{}, {"bos": "auto", "scale": "none", "max_norm": None, "nonneg": False}], ids=str)
def test_a_setting_that_is_new_changes_no_name(more):
    """Names that earlier versions gave: else their sweeps would be begun anew, and not gone on with."""
    grid = {"model": "org/gpt2", "data": "text.txt", "layer": [4, 8], "k": [20, 40], "threshold": 0.5, "tokens": 5000}
    names = [job.name for job in jobs_of(read_grid(grid | more))]
    assert names == ["gpt2_k20_t0.5-1ae508073323", "gpt2_t0.5-d3a4d9a864b5"]
    (other, _) = jobs_of(read_grid(grid | {"bos": "always"}))
    assert other.name not in names


def test_layers_are_one_pass_and_models_change_slowest():
    jobs = jobs_of(read_grid({"k": [1, 2], "layer": [1, 2, 2], "data": "d", "model": ["a", "b", "a"]}))
    assert [(job.settings["model"], job.settings["k"]) for job in jobs] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert {(job.kind, job.places) for job in jobs} == {("layer", (1, 2))}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"treshold": 0.1}, "there is no setting 'treshold'; perhaps 'threshold' was meant"),
        ({"out": "x"}, "there is no setting 'out'"),
        ({"__class__": 1}, "there is no setting '__class__'"),
        ({"k": []}, "'k' is an empty list"),
        ({"k": "40"}, "'k' is '40': write a whole number, or a list of such"),
        ({"k": [4, True]}, "'k' is True: write a whole number"),
        ({"k": 2.5}, "'k' is 2.5: write a whole number"),
        ({"k": {"from": 1}}, "'k' is {'from': 1}: write a whole number"),
        ({"k": [[1], [2]]}, "'k' is [1]: write a whole number"),
        ({"threshold": "low"}, "'threshold' is 'low': write a number"),
        ({"threshold": float("nan")}, "'threshold' is nan"),
        ({"threshold": [0.5, float("inf")]}, "'threshold' is inf: write a finite number"),
        ({"seed": 10**5000}, "'seed' is int: write a finite number"),
        ({"threshold": 10**5000}, "'threshold' is int: write a number, or a list"),
        ({"tokens": None}, "'tokens' is None: write a whole number"),
        ({"center": 1}, "'center' is 1: write true or false"),
        ({"model": 7}, "'model' is 7: write a text"),
        ({"model": ""}, "'model' is '', which is empty: write a plain text"),
        ({"model": "a\nb"}, r"'model' is 'a\nb', which has control characters in it: write a plain text"),
        ({"data": ["ok", "\x1b[31m"]}, r"'data' is '\x1b[31m', which has control characters in it: write a plain text"),
        ({"revision": "a\0b"}, r"'revision' is 'a\x00b'"),
        ({"model": None}, "'model' is missing: give a sweep at least one"),
        ({"layer": None}, "give either 'layer' or 'hook'"),
        ({"hook": "model.layers.1"}, "give either 'layer' or 'hook'"),
        ({"seed": list(range(200)), "k": list(range(1, 200))}, "make 39,800 trainings"),
        ({"context-length": 16}, "'context_length' is there twice"),
    ],
)
def test_bad_settings_are_refused(grid, tmp_path, change, said):
    with pytest.raises(itda.InputError) as error:
        itda.sweep({**grid, **change}, tmp_path / "out")
    assert said in str(error.value)
    assert str(error.value).isprintable()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"k = [1, 2", "is not TOML"),
        (b"k = 1\nk = 2", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"[model]\nname = 'gpt2'", "'model' is {'name': 'gpt2'}: write a text"),
        (b"data = 2026-11-21", "'data' is datetime.date"),
        (b"modle = 'gpt2'", "perhaps 'model' was meant"),
        (b'"\\u001b[31m" = 1', r"there is no setting '\x1b[31m'"),
        (b"", "'model' is missing"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, said, capfd):
    (tmp_path / "sweep.toml").write_bytes(text)
    assert main(["sweep", str(tmp_path / "sweep.toml"), "--out", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert err.rstrip("\n").isprintable()
    assert not (tmp_path / "out").exists()


def test_one_process_at_a_time(grid, tmp_path):
    with locks.locked(tmp_path / "out", "sweeping into"):
        with pytest.raises(itda.InputError, match=r"Another process is sweeping into .*out: wait for it to end, or ch"):
            itda.sweep(grid, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_places_that_are_none(grid, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for layer in (1, [1, 3]):
        with pytest.raises(itda.InputError, match="The path"):
            itda.sweep({**grid, "layer": layer}, path)
        with pytest.raises(itda.InputError, match="The path"):
            itda.train(grid["model"], grid["data"], path, layer=layer)
    with pytest.raises(itda.InputError, match="The path"):
        itda.sweep(path, tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_other_refusals(grid, tmp_path, monkeypatch):
    with pytest.raises(itda.InputError, match="could not be read"):
        itda.sweep(tmp_path / "none.toml", tmp_path / "out")
    with pytest.raises(itda.InputError, match="`workers` is 0"):
        itda.sweep(grid, tmp_path / "out", workers=0)
    for name in (RESULTS, TABLE):
        (tmp_path / name).write_text("{}")
        with pytest.raises(itda.InputError, match=f"{name} is not of a sweep"):
            itda.sweep(grid, tmp_path)
        (tmp_path / name).unlink()
    for other in ("[]", "7", '"itda sweep"', "null", "[" * 100_000, "9" * 5000, "NaN", '{"format": ["itda sweep"]}'):
        (tmp_path / RESULTS).write_text(other)
        with pytest.raises(itda.InputError, match=f"{RESULTS} is not of a sweep"):
            itda.sweep(grid, tmp_path)
        (tmp_path / RESULTS).unlink()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(itda.InputError, match=r"needs? Ray, which is not installed: `pip install 'itda\[ray\]'`"):
        itda.sweep(grid, tmp_path / "out", workers=2)
    with pytest.raises(itda.InputError, match="Ray, which is not installed"):
        itda.train(grid["model"], str(grid["data"]), tmp_path / "one", layer=1, ray="auto")


def test_notes_of_another_kind_are_harmless(grid, tmp_path):
    """Rows of the results are made anew, and of a note only what is well-formed is believed."""
    first = itda.sweep(grid, tmp_path / "out")
    (tmp_path / "out" / RESULTS).write_text('{"format": "itda sweep", "rows": 7, "grid": [[]]}')
    assert itda.sweep(grid, tmp_path / "out").rows == first.rows
    (note, *_) = (tmp_path / "out").glob("*/job.json")
    kept = note.read_text()
    hook, done = first.rows[0]["hook_point"], {}
    for seconds in (
        "1" + "0" * 400,
        "NaN",
        "-Infinity",
        '"1e999"',
        "[]",
        "{}",
        "null",
        "true",
        "-1",
        "[" * 300 + "]" * 300,
    ):
        forged = json.loads(kept)
        forged["done"]["1"] = {"hook_point": hook, "seconds": "?"}
        note.write_text(json.dumps(forged).replace('"?"', seconds))
        done[seconds] = itda.sweep(grid, tmp_path / "out")
        assert not done[seconds].problems
        json.loads((tmp_path / "out" / RESULTS).read_text(), parse_constant=pytest.fail)
    for name in ("x" * 5000, "\0", "\ud800", "..", ".", "", "a/b", "\x1b[31m", 7, None, ["transformer.h.1"]):
        forged = json.loads(kept)
        forged["done"]["1"] = {"hook_point": name, "seconds": 1.0}
        note.write_text(json.dumps(forged))
        assert itda.sweep(grid, tmp_path / "out").rows[0]["hook_point"] == hook
    note.write_text(json.dumps(json.loads(kept) | {"done": {"1": 7, "9": "?"}}).replace('"?"', "[" * 900 + "]" * 900))
    assert not itda.sweep(grid, tmp_path / "out").problems


def test_a_forged_dictionary_is_trained_again(grid, tmp_path, monkeypatch):
    first = itda.sweep(grid, tmp_path / "out")
    path = tmp_path / "out" / first.rows[0]["folder"]
    forged = itda.ITDA.load(path)
    for value in (10**400, "\x1b[31m", ["a"], {"b": 1}, True):
        for name in ("threshold", "fvu", "tokens"):
            forged.cfg[name] = value
            with monkeypatch.context() as patch:
                patch.setattr(folder, "wrong_setting", lambda *settings: None)
                patch.setattr(soundness, "LARGEST_INT", 2000)
                forged.save(path)
            again = itda.sweep(grid, tmp_path / "out")
            assert again.skipped == 3
            assert not again.problems
            forged = itda.ITDA.load(path)
            assert forged.cfg[name] == again.rows[0][name]


def test_a_sweep_of_the_time_of_another_default_is_not_gone_on_with(grid, home, tmp_path):
    """Settings that now mean drawn atoms meant admitted ones once, in folders of the same names."""
    del grid["threshold"]
    grid |= {"n_atoms": 20, "layer": 1}
    for k in (2, 4):
        (job,) = jobs_of(read_grid(grid | {"k": k, "data": str(grid["data"])}))
        assert job.admission == "online"
        how = {name: value for name, value in job.settings.items() if name not in ("model", "data")}
        old = tmp_path / f"old-{k}" / job.name
        itda.train(str(home / "model"), str(grid["data"]), old, layer=[1], admission="sequential", **how)
        note = {"settings": job.settings, "done": {"1": {"hook_point": "transformer.h.1", "seconds": 1.0}}}
        (old / "job.json").write_text(json.dumps(note))
        before = times(old)
        said = f"{old / 'transformer.h.1'} was trained by admission 'sequential', and these settings mean 'online' now"
        with pytest.raises(itda.InputError, match=re.escape(said)):
            itda.sweep(grid, old.parent)
        assert times(old) == before and os.listdir(old.parent) == [job.name]
    found = itda.sweep(grid | {"admission": "sequential"}, tmp_path / "old-2")  # folders of other names
    assert not found.problems and found.skipped == 0


def test_an_unexpected_error_is_one_row(grid, tmp_path, monkeypatch):
    def fails(*args, **settings):
        raise RuntimeError("of torch\nand more")

    monkeypatch.setattr(importlib.import_module("itda.training.sweep_worker"), "train", fails)
    found = itda.sweep(grid, tmp_path / "out")
    assert set(found.problems) == {"This should not have happened (RuntimeError: of torch): please report it."}
    assert os.listdir(tmp_path / "out")


def test_a_sweep_on_disk_loads_no_model(grid, home, tmp_path, monkeypatch):
    text = {name: grid.pop(name) for name in ("data", "context_length")}
    itda.collect(grid["model"], text["data"], tmp_path / "acts", layer=[1, 3], tokens=200, context_length=32)
    asked = {**grid, "data": str(tmp_path / "acts")}
    itda.train(asked["model"], asked["data"], tmp_path / "alone", layer=1, k=2, threshold=0.5, tokens=200)

    def load(*args, **settings):
        raise AssertionError("a model was loaded")

    for module in ("itda.models.loading", "itda.reading.activations"):
        monkeypatch.setattr(importlib.import_module(module), "load_model", load)
    found = itda.sweep({**asked, "layer": [1, -1, 0]}, tmp_path / "out")
    assert [row["hook_point"] for row in found.rows] == ["transformer.h.1", "transformer.h.3", None] * 2
    assert all("holds transformer.h.1, transformer.h.3" in problem for problem in found.problems)
    assert len(found.problems) == 2
    alone = [(tmp_path / "alone" / name).read_bytes() for name in DICTIONARY]
    assert alone in dictionaries(tmp_path / "out").values()
    before = times(tmp_path / "out")
    again = itda.sweep({**asked, "layer": [1, 3]}, tmp_path / "out")
    assert again.skipped == 4 and times(tmp_path / "out") == before  # -1 and 3 are one
    other = itda.sweep({**asked, "model": "another", "layer": [1]}, tmp_path / "other")
    assert all("holds activations of" in problem for problem in other.problems) and len(other.problems) == 2
