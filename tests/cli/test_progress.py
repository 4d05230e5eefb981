"""How far a long work is: on terminals of every width, and in logs."""

import io
import sys

import pytest
import torch

import itda
from itda import progress
from itda.progress import Progress, Step, bar

LONG = Progress(1_234_567, 10_000_000, 16_384, 0.0123, 10_000.0)


@pytest.mark.parametrize("width", [60, 73, 80, 120])
@pytest.mark.parametrize("what", [LONG, Step("reading a/model-with-a-long-name (1 of 2)", 123_456, 10_000_000, 3000.0)])
def test_what_is_left_to_wait_is_seen_at_every_width(what, width):
    said = " · ".join(what.parts(width))
    assert len(said) <= width and said.endswith(" left") and f"{what.tokens:,} of 10,000,000" in said


def test_at_80_columns_nothing_is_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown, before = Terminal(), sys.stderr
    try:
        sys.stderr = shown
        report = bar()
        report(LONG)
        report(None)
    finally:
        sys.stderr = before
    assert "…" not in shown.getvalue() and " left" in shown.getvalue() and "16,384 atoms" in shown.getvalue()


def test_hours_are_told_as_hours():
    assert str(Step("x", 1, 4001, 1.0)).endswith("1:06:40 left")
    assert str(Step("x", 1, 101, 1.0)).endswith("1:40 left")


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    report = bar()
    for second in range(100):
        now[0] = float(second)
        report(Step("reading", second, 1000, float(second)))
    report(None)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and [line.split(" · ")[1] for line in lines] == ["30 of 1,000", "60 of 1,000", "90 of 1,000"]


def test_a_stage_is_told_when_it_begins_and_a_part_with_the_name_of_the_whole():
    said = []
    report = progress.part_of(said.append, "untrained model")
    done = progress.stage(report, "reading", 3)
    done(2)
    report(Progress(5, 10, 2, 0.5, 4.0))
    report(None)
    progress.stage(report, "choosing text")
    assert [(step.what, step.tokens, step.total) for step in said] == [
        ("untrained model: reading", 0, 3),
        ("untrained model: reading", 2, 3),
        ("untrained model: building", 5, 10),
        ("untrained model: choosing text", 0, None),
    ]
    assert str(said[2]).endswith("5 of 10 · 0:04 left") and str(said[3]) == "untrained model: choosing text"


def test_a_closed_log_ends_no_work(monkeypatch):
    monkeypatch.setattr(progress, "SELDOM", 0.0)
    for closed in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", closed)
        report = bar()
        if closed is not None:
            closed.close()
        report(Step("reading", 1, 2, 1.0))
        report(None)


def test_the_search_for_a_threshold_names_its_layer():
    x, said = torch.randn(2500, 8, generator=torch.Generator().manual_seed(0)), []
    both = [{"model.layers.2": part, "model.layers.4": 2 * part} for part in x.split(500)]
    itda.build(both, n_atoms=50, tokens=2500, k=2, progress=said.append)
    told = dict.fromkeys(step.what for step in said if isinstance(step, Step))
    assert list(told) == [f"choosing a threshold for model.layers.{layer}" for layer in (2, 4)]
    said.clear()
    itda.build([x], n_atoms=50, k=2, progress=said.append)
    assert {step.what for step in said if isinstance(step, Step)} == {"choosing a threshold"}
