"""A sweep that is killed, and killed again while it goes on from there, ends as one that nobody disturbed."""

import csv
import itertools
import re
from contextlib import suppress
from functools import partial

import pytest

import itda
from itda.errors import Interrupted
from itda.training import sweep_worker
from itda.training.sweep import RESULTS, TABLE
from tests import tiny_models
from tests.faulty_disk import Killed, Machine


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("sweep")
    tiny_models.save("gpt2", home / "model")
    (home / "text.txt").write_text("\n".join(tiny_models.DOCUMENTS), "utf-8")
    return home


@pytest.fixture
def swept(home, monkeypatch):
    """A function that sweeps two settings, and keeps what it has after every batch."""
    monkeypatch.setattr(sweep_worker, "train", partial(sweep_worker.train, checkpoint_seconds=0))
    grid = {"model": str(home / "model"), "data": str(home / "text.txt"), "layer": 1, "k": [1, 2]}
    grid |= {"threshold": 0.5, "tokens": 60, "context_length": 16, "batch_rows": 2}
    return lambda out, **how: itda.sweep(grid, out, **how)


def files(out):
    """Every file that a sweep leaves; how long a training took is no part of it."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    rows = csv.DictReader(found.pop(TABLE).decode().splitlines())
    found = {
        name: re.sub(rb'"seconds": [0-9.e-]+', b"", data) if name.endswith((RESULTS, "job.json")) else data
        for name, data in found.items()
    }
    return found | {TABLE: [row | {"seconds": None} for row in rows]}


def killed(at, work):
    """How many steps a machine that dies at step `at` did before, or all that the work takes."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, at)
        with suppress(Killed):
            work()
    return at - max(machine.left, 0)


def test_killed_again_while_it_recovers(swept, tmp_path):
    """At steps all over the first run, then early in what goes on from there, and once more in its middle."""
    total = killed(10**6, lambda: swept(tmp_path / "whole"))
    want = files(tmp_path / "whole")
    for number, first in enumerate(range(1, total, total // 7)):
        out = tmp_path / str(first)
        for at in (first, 2 + 3 * number, (total - first) // 2):
            killed(at, lambda out=out: swept(out))
        swept(out)
        assert files(out) == want, first


def test_stopped_again_while_it_recovers(swept, tmp_path):
    swept(tmp_path / "whole")
    want = files(tmp_path / "whole")
    for stops in ((1, 1), (2, 1, 2), (4, 3)):
        out = tmp_path / "-".join(map(str, stops))
        for after in stops:
            asked = itertools.count(1)
            with suppress(Interrupted):
                swept(out, stop=lambda asked=asked, after=after: next(asked) >= after)
        swept(out)
        assert files(out) == want, stops
