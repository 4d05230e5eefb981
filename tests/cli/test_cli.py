"""The command line as users have it: exit codes, one sentence for what is wrong, JSON on standard output, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import itda
from itda import locks
from itda.cli import terminal
from itda.cli.main import COMMANDS, main
from itda.labels import Batch, Labels
from itda.settings import verbs
from itda.training import train
from tests import tiny_models

SMALL = ["--layer", "1", "--k", "4", "--context-length", "32", "--tokens", "600"]
FILES = ["atoms.safetensors", "cfg.json", "labels.parquet", "sample.parquet"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and texts in it."""
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "model")
    tiny_models.save("gpt2", home / "other", seed=1)
    (home / "text.txt").write_text("\n".join(tiny_models.DOCUMENTS * 4), encoding="utf-8")
    (home / "long.txt").write_text("\n".join(tiny_models.DOCUMENTS * 40), encoding="utf-8")
    (home / "records.jsonl").write_text(json.dumps({"body": "some text"}) + "\n")
    (home / "empty.txt").write_text("")
    (home / "binary.txt").write_bytes(b"\x7fELF\0\0\0\1")
    (home / "page.pdf").write_bytes(b"%PDF-1.4")
    return home


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.delenv("ITDA_DEBUG", raising=False)


@pytest.fixture(scope="module")
def trained(home):
    """A dictionary trained by the command line, as a path relative to `home`."""
    before = Path.cwd()
    os.chdir(home)
    try:
        assert main(["train", "model", "text.txt", "--out", "trained", *SMALL]) == 0
    finally:
        os.chdir(before)
    return "trained"


def fails(capfd, *words, code=2):
    """Run a command line that must fail; the last line on standard error, before which are stages of its work alone."""
    assert main([str(word) for word in words]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    *stages, last = err.splitlines()
    assert all(line.split()[0] in ("loading", "reading", "choosing") for line in stages), err
    assert last.isprintable(), ascii(last)
    return last


def document(capfd, *words):
    """Run a command line with --json; what it says."""
    assert main([*words, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def process(*words, **settings):
    """The same in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(itda.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings}
    return subprocess.Popen([sys.executable, "-m", "itda", *words], env=environment, **settings)


def same_files(a, b, names=FILES):
    """Whether two dictionaries have the same bytes, except for how often float64 had to decide."""
    for name in names:
        one, other = ((Path(folder) / name).read_bytes() for folder in (a, b))
        if name == "cfg.json":
            one, other = (json.loads(cfg) for cfg in (one, other))
        assert one == other, name
    return True


# -- what works -------------------------------------------------------------------------------------------------------


def test_a_size_without_a_seed_is_advised_to_shuffle(trained, capfd, tmp_path):
    for name, more, advised in (("a", [], True), ("b", ["--seed", "0"], False)):
        words = ["train", "model", "text.txt", "--out", str(tmp_path / name), *SMALL, "--n-atoms", "40", *more]
        assert main(words) == 0
        assert ("--seed 0 shuffles them" in capfd.readouterr().err) == advised


def test_train_in_a_process_and_by_the_library_give_the_same_bytes(trained, tmp_path):
    out = tmp_path / "by process"
    with process("train", "model", "text.txt", "--out", str(out), *SMALL, "--json") as run:
        said, err = run.communicate()
    assert run.returncode == 0, err
    result = json.loads(said)
    assert result["path"] == str(out)
    assert (result["k"], result["threshold"], result["hook_point"]) == (4, None, "transformer.h.1")
    assert {"n_atoms", "tokens", "fvu", "seconds", "tokens_per_second", "settled_share"} <= set(result)
    (by_library,) = train.train(
        "model", "text.txt", tmp_path / "by library", layer=1, k=4, context_length=32, tokens=600
    )
    assert by_library.n_atoms == result["n_atoms"] == len(itda.ITDA.load(out))
    assert by_library.tokens == result["tokens"] == 600
    assert sorted(os.listdir(out)) == FILES
    assert same_files(out, trained)
    assert same_files(out, tmp_path / "by library")


def test_several_layers_make_a_folder_each(capfd, trained, tmp_path):
    out = tmp_path / "both"
    results = document(capfd, "train", "model", "text.txt", "--out", str(out), *SMALL[2:], "--layer", "1", "3")
    assert [result["path"] for result in results] == [str(out / f"transformer.h.{i}") for i in (1, 3)]
    assert sorted(os.listdir(out)) == ["transformer.h.1", "transformer.h.3"]
    assert same_files(out / "transformer.h.1", trained)
    assert "transformer.h.1" in fails(capfd, "show", out)


def test_hook_numbers_and_the_rest_of_the_flags(capfd, tmp_path):
    flags = "--hook blocks.2.hook_resid_post --k 4 --tokens 3e2 --threshold 0.5 --context-length 1_6 --batch-rows 4"
    flags += " --no-center --max-atoms 20 --seed 3 --pack --loss squared --chunk-size 64"
    result = document(capfd, "train", "model", "text.txt", "--out", str(tmp_path / "out"), *flags.split())
    cfg = itda.ITDA.load(tmp_path / "out").cfg
    assert result["hook_point"] == "transformer.h.2"
    assert (cfg["threshold"], cfg["loss"], cfg["center"], cfg["batch_rows"]) == (0.5, "squared", False, 4)
    assert (cfg["stream"]["context_length"], cfg["stream"]["pack"], cfg["stream"]["seed"]) == (16, True, 3)
    assert result["n_atoms"] == 20


def test_preset_is_the_published_practice(capfd, tmp_path):
    flags = ["--layer", "1", "--context-length", "32", "--tokens", "300", "--k", "4", "--preset", "paper"]
    flags += ["--out", str(tmp_path / "paper")]
    sentence = fails(capfd, "train", "model", "text.txt", *flags)
    assert "keeps the first row of each document, and text.txt is one document: give a .jsonl" in sentence
    lines = [json.dumps({"text": line}) for line in Path("text.txt").read_text("utf-8").splitlines() if line]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), "utf-8")
    result = document(capfd, "train", "model", str(tmp_path / "texts.jsonl"), *flags)
    cfg = itda.ITDA.load(tmp_path / "paper").cfg
    assert (cfg["loss"], cfg["admission"], cfg["batch_rows"], result["threshold"]) == ("cosine", "paper", 128, 4e-4)
    assert cfg["center"] is False
    assert (cfg["special_tokens"], cfg["padding"], cfg["stream"]["truncate"]) == (True, True, True)
    given = verbs.TRAIN.complete("train", {"preset": "paper", "loss": "relative", "admission": None, "batch_rows": 8})
    assert {name: given[name] for name in verbs.PRESETS["paper"]} == {
        "loss": "relative", "admission": "paper", "center": False, "batch_rows": 8,
        "truncate": True, "special_tokens": True, "padding": True,
    }  # fmt: skip


def test_decompose_by_number_and_by_text(capfd, trained):
    text = "The mouse sat on the carpet"
    last = document(capfd, "decompose", trained, text, "--token", "-1")
    assert last["token"] == len(last["tokens"]) - 1
    assert "".join(last["tokens"]) == text
    assert sum(part["share"] for part in last["atoms"]) + last["relative_error"] == pytest.approx(1)
    assert document(capfd, "decompose", trained, text, "--token", last["tokens"][-1]) == last
    assert document(capfd, "decompose", trained, text, "--token", "0")["tokens"][0] == last["tokens"][0]
    every = document(capfd, "decompose", trained, text, "Another text")["texts"]
    assert [said["text"] for said in every] == [text, "Another text"] and every[0]["tokens"] == last["tokens"]
    assert every[0] | every[0]["decompositions"][-1] == last | {"decompositions": every[0]["decompositions"]}
    assert main(["decompose", trained, text]) == 0
    assert "⟦" in capfd.readouterr().out
    assert "one text" in fails(capfd, "decompose", trained, text, text, "--token", "0")
    assert "TEXT" in fails(capfd, "decompose", trained)


def test_another_model_only_with_force(capfd, trained):
    words = ["decompose", trained, "The mouse", "--model", "other"]
    assert "weights" in fails(capfd, *words)
    assert document(capfd, *words, "--force")["texts"][0]["model"] == "other"


def test_another_tokenizer_only_with_force(capfd, trained):
    shutil.copytree("model", "spelled")
    words = tiny_models.tokenizer()
    words.add_tokens(["qqqq"])
    words.save_pretrained("spelled")
    assert "tokenizer" in fails(capfd, "decompose", trained, "The mouse", "--model", "spelled")
    assert document(capfd, "decompose", trained, "The mouse", "--model", "spelled", "--force")["texts"]


def test_show(capfd, trained):
    built = itda.ITDA.load(trained)
    found = document(capfd, "show", trained)
    assert (found["n_atoms"], found["d"], found["k"]) == (len(built), built.d, 4)
    atom = document(capfd, "show", trained, "--atom", "1")
    assert atom["label"]["token"] == built.labels.token(1)
    assert main(["show", trained]) == 0
    assert f"{len(built)} atoms" in capfd.readouterr().out
    assert main(["show", trained, "--atom", "1"]) == 0
    assert "⟦" in capfd.readouterr().out
    at, word = next((i, token.strip()) for i in range(len(built)) if (token := built.labels.token(i)).strip())
    named = document(capfd, "show", trained, "--find", word)
    assert at in [row["atom"] for row in named["atoms"]] and named["n_atoms"] == found["n_atoms"]
    assert "choose one of them" in fails(capfd, "show", trained, "--atom", "1", "--find", word)


def test_the_command_line_is_a_module_too():
    for module in ("itda", "itda.cli.main"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("itda ")


def test_piped_output_is_plain_and_not_cut(capfd, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    plain(tmp_path / "d", 20, "before " * 20, " after" * 20)
    assert main(["show", str(tmp_path / "d")]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert not any("\x1b" in line for line in lines)
    assert max(map(len, lines)) > 110
    assert all(line == line.rstrip() for line in lines)


def test_piped_output_is_as_wide_as_columns_says(capfd, tmp_path, monkeypatch):
    plain(tmp_path / "d", 20, "before " * 20, " after" * 20)
    for said, width in (("70", 70), ("0", 400), ("wide", 400)):
        monkeypatch.setenv("COLUMNS", said)
        assert main(["show", str(tmp_path / "d")]) == 0
        longest = max(map(len, capfd.readouterr().out.splitlines()))
        assert longest <= width and (longest > 110) == (width > 110)


def plain(folder, n, before, after):
    """Save a dictionary of plain arrays, its labels in long texts."""
    texts, count = tuple(f"{before}{i}{after}" for i in range(n)), np.arange(n)
    start = np.full(n, len(before))
    end = start + [len(str(i)) for i in range(n)]
    labels = Labels(count, count, count, count, start, end, count, texts, count * 0)
    built = itda.build([Batch(torch.eye(n), labels)], k=2)
    built.save(folder)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help(capfd, words):
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert ("itda 0" if words == ["--version"] else "usage: itda") in out
    if words[1:]:
        assert f"itda {words[0]} " in out.split("options")[0].replace("\n", " \n")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--k", "ten"]], ids=" ".join)
def test_help_and_usage_errors_load_no_library_of_models(words, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    with process(*words) as run:
        _, err = run.communicate()
    loaded = {line.split("|")[-1].strip() for line in err.splitlines()}
    assert "itda.cli.main" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "pyarrow", "numpy"}


# -- what does not ----------------------------------------------------------------------------------------------------

USAGE = {
    "no such command": (
        ["tran"],
        "choose one of train, sae, sweep, collect, hooks, decompose, show, uses, page, eval, compare, diff, "
        "export, demo",
    ),
    "nothing given": (["train"], "MODEL, DATA, --out DIR are wanted"),
    "one thing missing": (["train", "model", "text.txt"], "--out DIR is wanted"),
    "unknown flag": (["train", "model", "text.txt", "--out", "x", "--layr", "1"], "--layer was meant"),
    "word too many": (["show", "trained", "more"], "has no use for more"),
    "not a number": (["train", "model", "text.txt", "--out", "x", "--k", "ten"], "--k: 'ten' came"),
    "not a whole number": (["show", "trained", "--atom", "1.5"], "whole number"),
    "not finite": (["train", "model", "text.txt", "--out", "x", "--tokens", "inf"], "whole number"),
    "not a layer": (["train", "model", "text.txt", "--out", "x", "--layer", "two"], "--layer"),
    "no value": (["train", "model", "text.txt", "--out", "x", "--k"], "--k wants a value"),
    "not a choice": (["train", "model", "text.txt", "--out", "x", "--loss", "l2"], "cosine or relative or squared"),
}
INPUT = {
    "neither layer nor hook": (["model", "text.txt"], "Pass one of `layer`"),
    "layer and hook": (["model", "text.txt", "--layer", "1", "--hook", "transformer.h.1"], "Pass one of `layer`"),
    "model that is not there": (["no-one/no-model", "text.txt", "--layer", "1"], "no-one/no-model"),
    "model folder that is not there": (["./nowhere", "text.txt", "--layer", "1"], "nowhere"),
    "layer beyond the model": (["model", "text.txt", "--layer", "4"], "it has 4 layers"),
    "hook of no module": (["model", "text.txt", "--hook", "transformer.h.1.mpl"], "no module `transformer.h.1.mpl`"),
    "file that is not there": (["model", "nowhere.txt", "--layer", "1"], "nowhere.txt"),
    "empty file": (["model", "empty.txt", "--layer", "1"], "empty"),
    "binary file": (["model", "binary.txt", "--layer", "1"], "binary"),
    "file of another kind": (["model", "page.pdf", "--layer", "1"], "page.pdf"),
    "column that is not there": (["model", "records.jsonl", "--layer", "1"], "no column 'text', it has 'body'"),
    "k": (["model", "text.txt", "--layer", "1", "--k", "0"], "`k` is 0"),
    "threshold": (["model", "text.txt", "--layer", "1", "--threshold", "-0.1"], "`threshold` is -0.1"),
    "threshold nan": (["model", "text.txt", "--layer", "1", "--threshold", "nan"], "`threshold` is nan"),
    "n_atoms": (["model", "text.txt", "--layer", "1", "--n-atoms", "0"], "`n_atoms` is 0"),
    "both": (["model", "text.txt", "--layer", "1", "--n-atoms", "9", "--threshold", "0.2"], "choose one of them"),
    "tokens": (["model", "text.txt", "--layer", "1", "--tokens", "0"], "`tokens` is 0"),
    "context too long": (["model", "text.txt", "--layer", "1", "--context-length", "65"], "64"),
    "dtype": (["model", "text.txt", "--layer", "1", "--dtype", "float9"], "float9"),
    "seed": (["model", "text.txt", "--layer", "1", "--seed", "-1"], "`seed` is -1"),
}


@pytest.mark.parametrize(("words", "sentence"), USAGE.values(), ids=USAGE)
def test_usage(capfd, words, sentence):
    said = fails(capfd, *words)
    assert said.startswith("itda: error: ")
    assert sentence in said
    assert "--help`" in said
    assert not Path("x").exists()


@pytest.mark.parametrize(("words", "sentence"), INPUT.values(), ids=INPUT)
def test_input(capfd, words, sentence):
    length = [] if "--context-length" in words else ["--context-length", "32"]
    said = fails(capfd, "train", *words, *length, "--out", "x")
    assert said.startswith("itda: error: ")
    assert sentence in said
    assert not Path("x").exists()  # not even an empty folder


def test_activations_that_are_not_finite(capfd, tmp_path):
    module = tiny_models.module("gpt2", len(tiny_models.tokenizer()))
    with torch.no_grad():
        module.transformer.h[1].mlp.c_proj.bias[3] = torch.nan
    module.save_pretrained(tmp_path / "broken")
    tiny_models.tokenizer().save_pretrained(tmp_path / "broken")
    capfd.readouterr()
    said = fails(capfd, "train", tmp_path / "broken", "text.txt", *SMALL, "--out", tmp_path / "x")
    assert "prompt 0, position 1 is not finite" in said
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_not_ours(capfd, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in fails(capfd, "train", "model", "text.txt", *SMALL, "--out", tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert "is a file" in fails(capfd, "train", "model", "text.txt", *SMALL, "--out", tmp_path / "thesis.tex")
    layers = ["--layer", "1", "2", *SMALL[2:]]
    assert "is a file" in fails(capfd, "train", "model", "text.txt", *layers, "--out", tmp_path / "thesis.tex")


def test_a_finished_dictionary_is_not_overwritten(capfd, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "d")
    words = ["train", "model", "text.txt", "--out", str(tmp_path / "d"), *SMALL]
    assert "--overwrite" in fails(capfd, *words, "--k", "3")
    assert same_files(tmp_path / "d", trained)
    assert document(capfd, *words, "--k", "3", "--overwrite")["k"] == 3
    assert sorted(os.listdir(tmp_path / "d")) == FILES
    layers = ["--layer", "1", "2", *SMALL[2:]]
    assert "is an ITDA" in fails(capfd, "train", "model", "text.txt", *layers, "--out", tmp_path / "d")
    (tmp_path / "both").mkdir()
    shutil.copytree(trained, tmp_path / "both" / "transformer.h.2")
    assert "--overwrite" in fails(capfd, "train", "model", "text.txt", *layers, "--out", tmp_path / "both")


def test_a_finished_dictionary_beside_an_unfinished_one_is_not_overwritten(capfd, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "transformer.h.1")
    words = {"layer": [2, 3], "k": 4, "context_length": 32, "batch_rows": 4, "tokens": 2500, "center": False}
    stops = iter([False, False, True])
    with pytest.raises(train.Interrupted):
        train.train("model", "long.txt", tmp_path, **words, stop=lambda: next(stops))
    with pytest.raises(itda.InputError, match="holds a finished ITDA already"):
        train.train("model", "long.txt", tmp_path, **words | {"layer": [1, 2, 3]})
    assert same_files(tmp_path / "transformer.h.1", trained)
    assert (tmp_path / "transformer.h.2" / "checkpoint.safetensors").exists()


def test_two_trainings_into_one_folder(capfd, tmp_path):
    with locks.locked(tmp_path / "out", "training into"):
        assert "Another process" in fails(capfd, "train", "model", "text.txt", *SMALL, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk(capfd, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        said = fails(capfd, "train", "model", "text.txt", *SMALL, "--out", disk / "d")
        assert "disk is full" in said
        assert not (disk / "d").exists() or not (disk / "d" / "cfg.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("atom", ["-1", "100000"])
def test_atoms_out_of_range(capfd, trained, atom):
    assert f"`atom` is {atom}" in fails(capfd, "show", trained, "--atom", atom)


def test_what_is_no_dictionary(capfd, tmp_path):
    assert "no folder" in fails(capfd, "show", tmp_path / "nowhere")
    assert "cfg.json" in fails(capfd, "show", tmp_path)
    assert "not a folder" in fails(capfd, "show", "text.txt")
    (tmp_path / "cfg.json").write_text("{")
    assert "cfg.json" in fails(capfd, "decompose", tmp_path, "text")


def test_a_model_that_moved(capfd, trained, tmp_path):
    shutil.copytree("model", tmp_path / "moved")
    Path("model").rename("elsewhere")
    try:
        said = fails(capfd, "decompose", trained, "The mouse")
        assert "--model" in said
        assert "model" in said
        assert document(capfd, "decompose", trained, "The mouse", "--model", str(tmp_path / "moved"))["texts"]
    finally:
        Path("elsewhere").rename("model")


def test_a_token_that_is_not_there(capfd, trained):
    assert "0 'The'" in fails(capfd, "decompose", trained, "The", "--token", "cat")
    assert "`token` is 99" in fails(capfd, "decompose", trained, "The", "--token", "99")
    assert "0 'The'" in fails(capfd, "decompose", trained, "The", "--token", "9" * 5000)


def test_file_names_that_are_hostile(capfd, tmp_path):
    name = tmp_path / "a\n\x1b[31mred [bold]b $(touch x) ⟦é⟧.txt"
    fails(capfd, "train", "model", name, *SMALL, "--out", tmp_path / "x")
    shutil.copy("text.txt", name)
    out = tmp_path / "-out\n\x1b[2J[red]"
    assert main(["train", "model", str(name), *SMALL, "--out", str(out)]) == 0
    assert main(["show", str(out)]) == 0
    said = capfd.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "[bold]b" in said.out
    bytes_name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.txt")
    shutil.copy("text.txt", bytes_name)
    out = str(tmp_path / "d")
    assert document(capfd, "train", "model", bytes_name, *SMALL, "--out", out)["tokens"] == 600
    assert document(capfd, "show", out)["cfg"]["stream"]["data"] == bytes_name
    assert main(["show", out]) == 0


SAID = [  # flags, and what is said of them
    (["--k", "nan"], "--k: 'nan' came, and a whole number was wanted"),
    (["--layer", "1.5"], "--layer: '1.5' came, and whole numbers were wanted"),
    (["--layr", "2"], "`itda train` has no use for --layr, 2 (perhaps --layer was meant)"),
    (["--loss", "foo"], "--loss: 'foo' came, and cosine or relative or squared was wanted"),
    (["--tokenizer", "-x"], "--tokenizer wants a value (--tokenizer=VALUE if it begins with a dash)"),
]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize(("flags", "sentence"), SAID, ids=[flags[0] for flags, _ in SAID])
def test_flags_are_refused_in_one_sentence_in_every_encoding(capfd, monkeypatch, encoding, flags, sentence):
    """tyro draws its boxes with other characters where standard output is not UTF-8."""
    with open(os.dup(1), "w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["train", "model", "text.txt", "--out", "x", *flags]) == 2
    assert capfd.readouterr().err == f"itda: error: {sentence}: see `itda train --help`.\n"


@pytest.mark.parametrize("device", ["xyz", "", "meta", "cuda:99"])
def test_devices_that_are_not_there(capfd, tmp_path, device):
    (tmp_path / "text.txt").write_text("Some text.")
    said = fails(capfd, "train", "model", str(tmp_path / "text.txt"), "--out", "x", *SMALL, "--device", device)
    assert f"`device` is {device!r}, which cannot be used here (" in said and "): pass " in said


def test_a_fault_of_ours_is_one_sentence_and_a_traceback_only_on_demand(capfd, monkeypatch):
    monkeypatch.setattr("itda.report.summary", lambda _: {}["gone"])
    assert "KeyError: 'gone'" in fails(capfd, "show", "trained", code=1)
    assert main(["show", "trained", "--debug"]) == 1
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.setenv("ITDA_DEBUG", "1")
    assert main(["show", "trained"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_no_permission(capfd, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr("itda.report.summary", refuse)
    assert "/secret: Permission denied" in fails(capfd, "show", "trained")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_closed_pipe(trained):
    read, write = os.pipe()
    os.close(read)  # what `head -1` does when it has its line
    with process("show", trained, stdout=write) as run:
        os.close(write)
        err = run.stderr.read()
    assert (run.returncode, err) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_output_that_cannot_be_written(trained):
    with open("/dev/full", "w") as full, process("show", trained, stdout=full) as run:
        err = run.stderr.read()
    assert (run.returncode, len(err.splitlines())) == (2, 1)
    assert "No space left" in err


def test_a_terminal_that_knows_ascii_only(trained, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with process("show", trained, "--atom", "0") as run:
        out, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    assert "?C?all me Ishmael" in out


# -- signals ----------------------------------------------------------------------------------------------------------

LONG = ["--layer", "1", "2", "--k", "4", "--context-length", "32", "--batch-rows", "4", "--tokens", "2500"]
LONG += ["--threshold", "0.6", "--no-center"]  # which begins with the first token


@pytest.fixture(scope="module")
def uninterrupted(home):
    """What `LONG` gives if nothing comes between."""
    layers = {"layer": [1, 2], "k": 4, "context_length": 32, "batch_rows": 4, "tokens": 2500, "threshold": 0.6}
    layers |= {"center": False}
    train.train(str(home / "model"), str(home / "long.txt"), home / "uninterrupted", **layers)
    return home / "uninterrupted"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_and_then_the_same_command(capfd, home, uninterrupted, tmp_path, number, code):
    words = ["train", str(home / "model"), str(home / "long.txt"), *LONG, "--out", str(tmp_path / "out")]
    with process(*words, "--checkpoint-seconds", "0", "--json") as run:
        last = tmp_path / "out" / "transformer.h.2" / "checkpoint.safetensors"
        deadline = time.monotonic() + 120
        while not last.exists():
            assert run.poll() is None, run.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(number)
        out, err = run.communicate()
    assert (run.returncode, out) == (code, ""), err
    *stages, line = err.splitlines(keepends=True)
    assert all(stage.split()[0] in ("loading", "reading", "training", "choosing") for stage in stages), err
    done, rest = line.removeprefix("interrupted after ").split(" ", 1)
    assert 0 < int(done.replace(",", "")) < 2500
    assert rest == "tokens; the same command goes on from there\n"
    assert "not finished" in fails(capfd, "show", last.parent)
    assert [result["tokens"] for result in document(capfd, *words)] == [2500, 2500]
    for name in ("transformer.h.1", "transformer.h.2"):
        assert same_files(tmp_path / "out" / name, uninterrupted / name)
        assert sorted(os.listdir(tmp_path / "out" / name)) == FILES


def test_a_kill_between_two_saves(capfd, home, uninterrupted, tmp_path, monkeypatch):
    words = ["train", str(home / "model"), str(home / "long.txt"), *LONG, "--out", str(tmp_path / "out")]
    save, saved = itda.ITDA.save, []

    def save_once(self, path):
        if saved:
            raise SystemExit(99)  # as a kill: nothing after it runs
        saved.append(path)
        save(self, path)

    monkeypatch.setattr(itda.ITDA, "save", save_once)
    assert main(words) == 99
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert (saved[0] / "cfg.json").exists()
    assert [result["tokens"] for result in document(capfd, *words)] == [2500, 2500]
    for name in ("transformer.h.1", "transformer.h.2"):
        assert same_files(tmp_path / "out" / name, uninterrupted / name)


def test_other_settings_do_not_go_on(capfd, home, tmp_path):
    stops = iter([False, False, True])
    words = {"layer": 1, "k": 4, "context_length": 32, "batch_rows": 4, "tokens": 2500, "center": False}
    with pytest.raises(train.Interrupted) as stopped:
        train.train(home / "model", home / "long.txt", tmp_path / "out", **words, stop=lambda: next(stops))
    assert 0 < stopped.value.tokens < 1000
    said = fails(capfd, "train", "model", "long.txt", *SMALL, "--out", tmp_path / "out")
    assert "was started with" in said
    with pytest.raises(itda.InputError, match=r"started with model.hook_point = 'transformer.h.1', and .*'transformer"):
        train.train(home / "model", home / "long.txt", tmp_path / "out", **words | {"layer": 2})
    with pytest.raises(itda.InputError, match="whose training has not finished, and several hook points need"):
        train.train(home / "model", home / "long.txt", tmp_path / "out", **words | {"layer": [1, 2]})
    assert os.listdir(tmp_path / "out") == ["checkpoint.safetensors"]


def test_seldom_may_be_never(home, tmp_path):
    for seconds in (1e12, float("inf")):
        out = tmp_path / str(seconds)
        words = {"layer": 1, "context_length": 32, "tokens": 100, "checkpoint_seconds": seconds}
        assert train.train(home / "model", home / "long.txt", out, **words)[0].tokens == 100


def test_a_signal_before_any_batch_ends_at_once(capfd, monkeypatch):
    monkeypatch.setattr("itda.report.summary", lambda _: signal.raise_signal(signal.SIGTERM))
    assert fails(capfd, "show", "trained", code=143) == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_second_signal_does_not_wait():
    signals = terminal.Signals()
    with signals.caught():
        assert not signals.stop()
        signal.raise_signal(signal.SIGINT)
        assert signals.stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
