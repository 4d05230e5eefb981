"""A minute of benchmarks/soak.py: killed at random moments, every file is that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from itda.cli.main import main
from tests import tiny_models

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals and forks of POSIX")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny model and some 3,000 tokens of text."""
    place = tmp_path_factory.mktemp("given")
    text = place / "text.jsonl"
    documents = [f"{i}. {document}" for i in range(6) for document in tiny_models.DOCUMENTS]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents), "utf-8")
    return tiny_models.save("llama", place / "model", max_position_embeddings=128), text


def test_killed_at_random_moments(given, tmp_path):
    model, text = given
    words = [sys.executable, str(SOAK), "--minutes", "0", "--kills", "8"]
    words += ["--kinds", "train", "streamed", "collect", "plain"]
    words += ["--model", str(model), "--data", str(text), "--folder", str(tmp_path)]
    words += ["--tokens", "1500", "--checkpoint-seconds", "0.01"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = dict(line.strip().rsplit(maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert int(said["kills"]) >= 8 and int(said["finishes"]) >= 4
    assert not any(tmp_path.iterdir())


def test_a_second_process_is_told(given, tmp_path, capfd):
    """While the first is stopped in the middle; it goes on as if nothing had been."""
    model, text = given
    out = tmp_path / "out"
    words = ["train", str(model), str(text), "--layer", "2", "--threshold", "0.2", "--out", str(out)]
    words += ["--checkpoint-seconds", "0"]
    first = subprocess.Popen([sys.executable, "-m", "itda", *words], stderr=subprocess.PIPE, text=True)
    try:
        while first.poll() is None and not (out / "checkpoint.safetensors").exists():
            time.sleep(0.001)
        first.send_signal(signal.SIGSTOP)
        assert first.poll() is None, first.stderr.read()
        there = sorted(os.listdir(out))
        assert main(words) == 2
        said = capfd.readouterr().err
        assert f"itda: error: Another process is training into {out}" in said.splitlines()[-1]
        assert sorted(os.listdir(out)) == there
    finally:
        first.send_signal(signal.SIGCONT)
        _, said = first.communicate()
    assert first.returncode == 0, said
    assert "cfg.json" in os.listdir(out) and "checkpoint.safetensors" not in os.listdir(out)
