"""A training that is killed, really, at several points, and started again with the same command: the same bytes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from itda import demo
from itda.dictionary import folder

LAYERS = ("1", "3")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    import json

    path.write_text("\n".join(json.dumps({"text": document}) for document in demo.corpus()[:120]), "utf-8")
    return path


def command(text, out):
    flags = ["--k", "8", "--threshold", "0.05", "--tokens", "12000", "--checkpoint-seconds", "0.1"]
    return [sys.executable, "-m", "itda", "train", str(demo.model_path()), str(text), "--layer", *LAYERS, *flags,
            "--out", str(out)]  # fmt: skip


def files(out):
    names = (folder.ATOMS, folder.LABELS, folder.SAMPLE)
    return [(path / name).read_bytes() for path in sorted(out.iterdir()) for name in names]


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    began = time.monotonic()
    subprocess.run(command(text, out), check=True, capture_output=True)
    return files(out), time.monotonic() - began


def checkpoints(out):
    paths = out.glob(f"*/{folder.CHECKPOINT}") if out.exists() else []
    return sum(path.stat().st_mtime_ns for path in paths if path.exists())


def kill_after(process, out, changes, how):
    """Send signal `how` once the checkpoints have changed so often (0: before there is one)."""
    seen, last = 0, checkpoints(out)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if changes == 0 and out.exists():
            break
        if (now := checkpoints(out)) != last:
            seen, last = seen + 1, now
            if seen >= changes:
                break
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(how)
    process.communicate()
    return process.returncode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of POSIX")
def test_killed_again_and_again(text, undisturbed, tmp_path):
    want, _ = undisturbed
    out = tmp_path / "out"
    plan = [(0, signal.SIGKILL), (1, signal.SIGKILL), (3, signal.SIGKILL), (2, signal.SIGTERM), (2, signal.SIGINT)]
    ended = []
    for changes, how in plan:
        process = subprocess.Popen(command(text, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        ended.append(kill_after(process, out, changes, how))
        if ended[-1] == 0:  # it had finished before the signal came
            break
    assert ended[:3] == [-signal.SIGKILL] * 3
    assert set(ended[3:]) <= {143, 130, 0}
    assert not any((path / folder.MANIFEST).exists() for path in out.iterdir()) or 0 in ended
    done = subprocess.run(command(text, out), capture_output=True, text=True)
    if 0 not in ended:
        assert done.returncode == 0, done.stderr
    assert files(out) == want
    assert not list(out.glob(f"*/{folder.CHECKPOINT}"))
    assert sorted(os.listdir(out)) == ["model.layers.1", "model.layers.3"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of POSIX")
def test_killed_while_saving(text, undisturbed, tmp_path):
    """Killed as soon as the first of the two dictionaries is complete: the second run completes both."""
    want, _ = undisturbed
    out = tmp_path / "out"
    process = subprocess.Popen(command(text, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(out.glob(f"*/{folder.MANIFEST}")):
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    if list(out.glob(f"*/{folder.CHECKPOINT}")):  # else it had finished before the signal came
        assert subprocess.run(command(text, out), capture_output=True).returncode == 0
    assert files(out) == want


def test_text_that_changed_meanwhile_is_refused(tmp_path):
    import itda

    texts = demo.corpus()[:40]

    def train(documents, stop=bool):
        stream = itda.activations(demo.model_path(), documents, layer=1, tokens=9000, batch_rows=8)
        return itda.build(stream, k=4, threshold=0.3, center=False, checkpoint=tmp_path, stop=stop)

    asked = iter(range(99))
    with pytest.raises(KeyboardInterrupt):
        train(texts, stop=lambda: next(asked) == 2)
    with pytest.raises(itda.InputError, match=r"text has changed in its first \S+ tokens since this training began"):
        train(["Another first document, of some length.", *texts[1:]])
    assert len(train(texts)) > 10
