"""One model read by several processes, and trainings side by side: the same bytes, whoever does what, and dies."""

import importlib
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import itda
from itda.dictionary import folder
from itda.models.hooked_model import Group
from itda.training import cluster, reading_workers
from itda.training.cluster import Crew
from tests import tiny_models

READ = {"layer": [1, 3], "k": 4, "threshold": 0.3, "tokens": 1500, "batch_rows": 4, "context_length": 32}
READ |= {"center": False}  # so that there is a checkpoint from the first tokens on
STORE = 80_000_000


def files(out):
    """Every byte of the dictionaries in `out`."""
    paths = [path for path in sorted(Path(out).rglob("*")) if path.is_file() and path.name != "job.json"]
    assert any(path.name == folder.MANIFEST for path in paths)
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if path.parent != Path(out)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("cluster")
    tiny_models.save("gpt2", home / "model")
    texts = [f"{i}. {text}" for i in range(10) for text in tiny_models.DOCUMENTS]
    (home / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
    return home


@contextmanager
def two_threads():
    """Which workers take over; Ray gives them one. The last bits of an activation depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(home):
    """Of a training in this process."""
    with two_threads():
        itda.train(str(home / "model"), str(home / "text.jsonl"), home / "alone", **READ)
    return files(home / "alone")


# -- whose turn it is, with a Ray that is made up ---------------------------------------------------------------------


class Made(Exception):
    pass


class Died(Made):
    pass


class Lost(Made):
    pass


class Failed(Made):
    def __init__(self, cause):
        self.cause = cause


class FakeRay:
    """Calls are done one by one, the latest first; `plan(actor, method, args)` does them or raises."""

    exceptions = SimpleNamespace(RayActorError=Died, ObjectLostError=Lost, WorkerCrashedError=Lost, RayTaskError=Failed)

    def __init__(self, plan=lambda actor, method, args: args):
        self.plan, self.calls, self.killed, self.dead, self.most = plan, {}, [], [], 0

    def remote(self, **wants):
        self.wants = wants
        return lambda kind: SimpleNamespace(remote=self.actor)

    def actor(self):
        return _Actor(self)

    def wait(self, references, num_returns, timeout):
        assert references
        self.most = max(self.most, len(references))
        return [max(references)], []

    def get(self, reference):
        actor, method, args = self.calls.pop(reference)
        if actor in self.dead:
            raise Died("dead before")
        try:
            return self.plan(actor, method, args)
        except Died:
            self.dead.append(actor)
            raise

    def kill(self, actor):
        self.killed.append(actor)

    def cluster_resources(self):
        return {"CPU": 2.0}


class _Actor:
    count = itertools.count()

    def __init__(self, ray):
        self._ray = ray

    def __getattr__(self, method):
        def remote(*args):
            reference = next(_Actor.count)
            self._ray.calls[reference] = (self, method, args)
            return reference

        return SimpleNamespace(remote=remote)


def crew(ray, size=2, **settings):
    return Crew(ray, object, (), size, **settings)


def test_every_call_is_answered_and_none_is_far_ahead():
    ray = FakeRay()
    done = list(crew(ray, 3).run("read", ((i,) for i in range(50)), each=2, ahead=4))
    assert sorted(done) == [(i, (i,)) for i in range(50)]
    assert done != sorted(done), "the latest come first, so this tells nothing of order"
    for place, (number, _) in enumerate(done):
        left = {n for n, _ in done[place:]}
        assert number < min(left) + 4
    assert ray.most <= 6
    assert list(crew(ray).run("read", [])) == []


def test_what_a_dead_worker_had_is_done_again():
    deaths = iter([True, False, False, True, True, False, True])

    def plan(actor, method, args):
        if method == "read" and next(deaths, False):
            raise Died("killed")
        return args

    ray = FakeRay(plan)
    made = crew(ray, 2)
    assert sorted(made.run("read", ((i,) for i in range(9)), each=2)) == [(i, (i,)) for i in range(9)]
    assert len(ray.dead) == 4
    assert ray.killed == ray.dead
    assert len(made.workers) == 2
    assert not any(worker.actor in ray.dead for worker in made.workers)


def test_a_result_that_was_lost_is_made_again_by_the_same_workers():
    lost = iter([True])

    def plan(actor, method, args):
        if method == "read" and next(lost, False):
            raise Lost("evicted")
        return args

    made = crew(FakeRay(plan))
    before = list(made.workers)
    assert sorted(made.run("read", [(0,), (1,)])) == [(0, (0,)), (1, (1,))]
    assert made.workers == before


def test_a_call_that_kills_is_given_up():
    tried = Counter()

    def plan(actor, method, args):
        if method == "read" and args == (3,):
            tried["3"] += 1
            raise Died("out of memory\nmore of it")
        return args

    with pytest.raises(itda.InputError, match=r"lost with its worker 4 times \(out of memory\)"):
        list(crew(FakeRay(plan)).run("read", ((i,) for i in range(6))))
    assert tried["3"] == cluster.RETRIES + 1
    done = dict(crew(FakeRay(plan)).run("read", ((i,) for i in range(6)), instead=lambda error: "given up"))
    assert done == {i: (i,) for i in range(6)} | {3: "given up"}


def test_workers_that_never_start_are_given_up(monkeypatch):
    def plan(actor, method, args):
        raise Died("no module named itda")

    ray = FakeRay(plan)
    with pytest.raises(itda.InputError, match=r"6 workers died one after another \(no module named itda\)"):
        crew(ray).first()
    assert len(ray.dead) == 6
    ray = FakeRay()
    ray.wait = lambda *args, **settings: ([], [])
    monkeypatch.setattr(cluster, "PATIENCE", 0.01)
    with pytest.raises(itda.InputError, match="each wants a CPU and 1 GPUs, and the cluster has 2 CPUs and 0 GPUs"):
        crew(ray, gpus=1).first()


def test_what_a_worker_raises_is_raised_here():
    def plan(actor, method, args):
        raise Failed(itda.InputError("There is no such layer."))

    with pytest.raises(itda.InputError, match="no such layer"):
        crew(FakeRay(plan)).first()


def test_workers_must_be_alike():
    one = reading_workers.Description({}, 9, {"h.1": {"fingerprint": "a"}}, {"torch": "2"}, "AVX512", 1, 1)
    alike = reading_workers.Description({}, 9, {"h.1": {"fingerprint": "a"}}, {"torch": "2"}, "AVX512", 1, 2)
    assert one.differs(alike) is None
    for values, said in (
        ({"provenance": {"h.1": {"fingerprint": "b"}}}, "weights"),
        ({"versions": {"torch": "3"}}, "versions"),
        ({"processor": "AVX2"}, "processors"),
    ):
        assert said in one.differs(reading_workers.Description(**{**vars(one), **values}))


def test_how_many_workers():
    def ray(gpus, machines):
        nodes = [{"Alive": True}] * machines + [{"Alive": False}]
        return SimpleNamespace(cluster_resources=lambda: {"GPU": float(gpus)}, nodes=lambda: nodes)

    assert cluster.shares(ray(0, 3), None) == (3, 0)
    assert cluster.shares(ray(0, 3), 5) == (5, 0)
    assert cluster.shares(ray(8, 2), None) == (8, 1)
    assert cluster.shares(ray(8, 2), None, "cpu") == (2, 0)
    assert cluster.shares(ray(8, 1), 2, "cuda") == (2, 1)
    assert cluster.shares(ray(8, 1), 2, None, "auto") == (2, 4)
    assert cluster.shares(ray(8, 1), None, None, "auto") == (1, 8)


def test_being_connected_disturbs_nothing(capsys, monkeypatch):
    """Not the handler of SIGTERM, not standard output; and what was connected before stays so."""

    class Module:
        begun, ended = False, 0

        def init(self, address, **settings):
            if address != "local":
                raise ConnectionError(f"nobody\x1b at {address}\nand more")
            signal.signal(signal.SIGTERM, lambda *_: None)
            print("Ray is here")
            self.begun = True

        def is_initialized(self):
            return self.begun

        def shutdown(self):
            self.begun, self.ended = False, self.ended + 1

    module = Module()
    monkeypatch.setattr(cluster, "_installed", lambda: module)
    before = signal.getsignal(signal.SIGTERM)
    with cluster.connected(True, 2) as found:
        assert found is module
        assert signal.getsignal(signal.SIGTERM) is before
        print("a machine died")
        with cluster.connected(True, 2):
            pass
        assert module.ended == 0
    assert module.ended == 1
    assert capsys.readouterr().out == ""
    sentence = r"not reached at 'there:1' \(ConnectionError: nobody� at there:1\)"
    with pytest.raises(itda.InputError, match=sentence), cluster.connected("there:1", None):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_cannot_be_read_by_workers(home):
    from itda.models import loading

    loaded = loading.load_model(home / "model", hooks=1)
    with pytest.raises(itda.InputError, match="give its id or its folder"):
        itda.train(loaded, str(home / "text.jsonl"), home / "no", layer=1, workers=2)
    with pytest.raises(itda.InputError, match="`workers` is 0"):
        itda.train(str(home / "model"), str(home / "text.jsonl"), home / "no", layer=1, workers=0)
    assert not (home / "no").exists()


# -- with Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes():
    """Two machines on this one, with room for two workers and for one."""
    ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'itda[ray]'")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    settings = {"object_store_memory": STORE, "include_dashboard": False}
    made = Cluster()
    made.add_node(num_cpus=2, **settings)
    made.second = made.add_node(num_cpus=1, **settings)
    ray.init(made.address, log_to_driver=False, logging_level=logging.ERROR)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def three(nodes, home):
    """Three workers that have loaded the model."""
    with two_threads(), reading_workers.workers_of(str(home / "model"), READ["layer"], workers=3, ray=True) as found:
        yield found


def wait_for_all(found):
    """Until all workers are ready, those that were killed replaced."""
    one = torch.zeros(1, 4, dtype=torch.int64)
    while not all(worker.ready for worker in found.crew.workers):
        found.read(one, one + 1)


def train(model, home, out, at=None, what=None):
    """Train with workers; at batch number `at`, `what()`."""
    batches = iter(range(10_000))

    def progress(state):
        if next(batches) == at:
            what()

    itda.train(model, str(home / "text.jsonl"), out, **READ, progress=progress)
    return files(out)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bytes(three, alone, home, tmp_path, monkeypatch, number):
    wait_for_all(three)
    assert [worker.answer.threads for worker in three.crew.workers] == [2] * 3
    assert len({worker.answer.pid for worker in three.crew.workers} - {os.getpid()}) == 3
    monkeypatch.setattr(three.crew, "workers", three.crew.workers[:number])
    assert train(three, home, tmp_path / "out") == alone


def test_read_all_gives_what_read_gives_in_order(three, home):
    from itda.models import loading

    whole = loading.load_model(home / "model", hooks=READ["layer"])
    groups = [Group(i, torch.randint(0, 300, (2, 3 + i)), torch.ones(2, 3 + i, dtype=torch.int64)) for i in range(20)]
    for group, found in zip(groups, three.read_all(iter(groups)), strict=True):
        want = whole.read(group.ids, group.mask)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)
    for hook in whole.hook_points:
        assert three.provenance(hook) == whole.provenance(hook)
    assert three.max_length == whole.max_length
    with pytest.raises(itda.InputError, match="These workers read"):
        itda.activations(three, ["text"], layer=2)


def test_a_worker_is_killed_in_the_middle(three, alone, home, tmp_path):
    wait_for_all(three)
    pids = [worker.answer.pid for worker in three.crew.workers]
    assert train(three, home, tmp_path / "out", 3, lambda: os.kill(pids[0], signal.SIGKILL)) == alone
    assert train(three, home, tmp_path / "again") == alone  # by when the loss was seen
    assert pids[0] not in [worker.answer.pid for worker in three.crew.workers if worker.ready]
    assert set(pids[1:]) <= {worker.answer.pid for worker in three.crew.workers if worker.ready}
    assert len(three.crew.workers) == 3


def test_a_machine_is_lost_in_the_middle(three, nodes, alone, home, tmp_path):
    wait_for_all(three)
    try:
        assert train(three, home, tmp_path / "out", 3, lambda: nodes.remove_node(nodes.second, False)) == alone
        # The rest may have been done before the loss was seen: nobody can be asked to work there any more.
        assert train(three, home, tmp_path / "again") == alone
    finally:
        three.crew.close()  # for the next test


def test_a_sweep_survives_a_killed_worker(nodes, home, tmp_path, monkeypatch):
    grid = {**READ, "model": str(home / "model"), "data": str(home / "text.jsonl"), "k": [2, 3, 4]}
    want = itda.sweep(grid, tmp_path / "alone")
    crews, said, killed = [], [], []

    class Seen(Crew):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            crews.append(self)

    def progress(step):
        said.append(step)
        if not killed and step is not None and step.tokens:
            killed.append(next(worker.answer for worker in crews[0].workers if worker.ready))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(importlib.import_module("itda.training.sweep"), "Crew", Seen)
    found = itda.sweep(grid, tmp_path / "side by side", workers=2, ray=True, progress=progress)
    assert killed
    assert not found.problems
    assert files(tmp_path / "side by side") == files(tmp_path / "alone")
    assert [row["folder"] for row in found.rows] == [row["folder"] for row in want.rows]
    assert said[-1] is None
    assert any("2 running" in str(step) for step in said)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_command_is_interrupted_and_leaves_nothing_behind(home, tmp_path):
    pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'itda[ray]'")
    out = tmp_path / "out"
    flags = "--layer 1 3 --k 4 --threshold 0.3 --tokens 1500 --batch-rows 4 --context-length 32 --no-center"
    words = ["train", "model", "text.jsonl", *flags.split(), "--workers", "1", "--json", "--out", str(out)]
    words += ["--checkpoint-seconds", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(itda.__file__).parents[1])}
    run = subprocess.Popen([sys.executable, "-m", "itda", *words], cwd=home, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    while run.poll() is None and not list(out.glob(f"*/{folder.CHECKPOINT}")):
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said, complained = run.communicate()
    assert said == ""
    assert run.returncode == 130, complained
    assert complained.splitlines()[-1].startswith("interrupted after"), complained
    sessions = {path: session(path) for path in Path("/proc").glob("[0-9]*")}
    assert run.pid not in sessions.values()


def session(path):
    try:
        return int((path / "stat").read_text().rsplit(")", 1)[1].split()[3])
    except OSError:
        return None
