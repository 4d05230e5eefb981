"""The n-th allocation and the n-th system call of every command fail: status 2, one sentence that says what ran out."""

import builtins
import errno
import io
import os
import shutil
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest
import torch

import itda
from itda import InputError, disk
from itda.cli.main import main
from itda.dictionary import folder
from itda.shortages import Shortage, lacking, shortage
from tests import tiny_models
from tests.dictionary.test_itda import golden, same

TRIES = {"train": 3, "collect": 4, "eval": 4, "show": 7, "export": 7}  # of the steps of a command, evenly spaced
FILES = "as many files open as it may"
WANT = {
    errno.EMFILE: FILES,
    errno.ENFILE: "the system has as many files open as it can",
    errno.ENOSPC: "the disk is full",
    errno.ENOMEM: "memory ran out",
}
SYSTEM = {os: ("open", "mkdir", "replace", "rename", "fsync"), builtins: ("open",), io: ("open",)}
MEMORY = {
    torch: ("empty", "zeros", "cat", "stack", "from_numpy"),
    np: ("empty", "zeros", "full", "concatenate", "stack"),
    pa: ("array", "table", "BufferOutputStream"),
}


class Failing:
    """Fails the call `at` of some functions, if this process makes it for a file in `place` or for memory."""

    def __init__(self, patch, functions, at, error, place=None):
        self.at, self.error, self.place, self.count, self.failed = at, error, place, 0, False
        for module, names in functions.items():
            for name in names:
                patch.setattr(module, name, self.watched(getattr(module, name)))

    def watched(self, function):
        def watched(*args, **kwargs):
            if self.place is None or (args and str(args[0]).startswith(str(self.place))):
                self.count += 1
                if self.count == self.at + 1:
                    self.failed = True
                    raise self.error
            return function(*args, **kwargs)

        return watched


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "model")
    (home / "text.txt").write_text("\n".join(tiny_models.DOCUMENTS))
    words = ["--layer", "1", "--context-length", "32"]
    assert main(["collect", str(home / "model"), str(home / "text.txt"), *words, "--out", str(home / "acts")]) == 0
    assert main(["train", str(home / "model"), str(home / "acts"), "--k", "2", "--out", str(home / "d")]) == 0
    return home


def commands(home, out):
    acts, d = str(home / "acts"), str(home / "d")
    evaluated = shutil.copytree(d, out.parent / "own", dirs_exist_ok=True)
    yield "train", ["train", str(home / "model"), acts, "--k", "2", "--out", str(out)]
    yield "collect", ["collect", str(home / "model"), acts, "--out", str(out)]
    yield "show", ["show", d]
    yield "export", ["export", d, "--to", "saelens", "--out", str(out)]
    yield "eval", ["eval", str(evaluated), acts, "--in-sample", "--no-controls"]


KINDS = {
    "handles": (SYSTEM, lambda: OSError(errno.EMFILE, os.strerror(errno.EMFILE)), WANT[errno.EMFILE]),
    "system": (SYSTEM, lambda: OSError(errno.ENFILE, os.strerror(errno.ENFILE)), WANT[errno.ENFILE]),
    "disk": (SYSTEM, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), WANT[errno.ENOSPC]),
    "mapping": (SYSTEM, lambda: OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), WANT[errno.ENOMEM]),
    "memory": (MEMORY, MemoryError, WANT[errno.ENOMEM]),
    "torch": (MEMORY, lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"), WANT[errno.ENOMEM]),
}


def files(place):
    return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["train", "collect", "show", "export", "eval"])
def test_every_step_of_a_command(home, tmp_path, capfd, command, kind):
    functions, error, said = KINDS[kind]
    place = None if functions is MEMORY else tmp_path.parent.parent
    whole = tmp_path / "whole"
    whole.mkdir()
    words = dict(commands(home, whole / "x"))[command]
    with pytest.MonkeyPatch.context() as patch:
        counted = Failing(patch, functions, -1, None, place)
        assert main(words) == 0, capfd.readouterr().err
    before, met = files(home), 0
    for at in range(0, counted.count, max(1, -(-counted.count // TRIES[command]))):
        out = tmp_path / str(at)
        out.mkdir()
        words = dict(commands(home, out / "x"))[command]
        capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, functions, at, error(), place)
            status = main(words)
        err = capfd.readouterr().err
        if status:  # a step that may be left out, as the removal of what is left over, may fail
            met += 1
            assert status == 2, err
            errors = [line for line in err.splitlines() if line.startswith("itda: error: ")]
            assert len(errors) == 1 and said in errors[0], (at, err)
            assert "copy" not in errors[0] and "damaged" not in errors[0] and "Traceback" not in err
        assert files(home) == before
        if command != "show":  # nothing is lost: the same command ends as if nothing had been
            assert main(words) in ((0,) if status else (0, 2))
            capfd.readouterr()
            assert files(out).keys() == files(whole).keys()
    assert met


def test_a_dictionary_is_not_damaged_where_memory_is_short(tmp_path, monkeypatch):
    golden().save(tmp_path / "x")

    def none(*args, **kwargs):
        raise pa.ArrowMemoryError("malloc of size 4294967296 failed")

    with monkeypatch.context() as patch:
        patch.setattr(pa, "BufferReader", none)
        with pytest.raises(Shortage, match=r"could not be read, because memory ran out: end other programs"):
            itda.ITDA.load(tmp_path / "x")
    assert same(itda.ITDA.load(tmp_path / "x"), golden())


LACKING = {
    "memory": [MemoryError(), pa.ArrowMemoryError("x"), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
               OSError(errno.ENOMEM, "x"), Exception("Cannot allocate memory (os error 12)"),
               ImportError("libx.so: failed to map segment from shared object")],
    "files": [OSError(errno.EMFILE, "x"), Exception("Too many open files (os error 24)")],
    "files of the system": [OSError(errno.ENFILE, "x"), Exception("Too many open files in system (os error 23)")],
    "disk": [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), Exception("No space left on device")],
    "threads": [RuntimeError("can't start new thread")],
    None: [ValueError("x"), OSError(errno.ENOENT, "x"), InputError("It says: out of memory."), KeyboardInterrupt()],
}  # fmt: skip


@pytest.mark.parametrize("kind", LACKING, ids=str)
def test_what_libraries_raise(kind):
    for error in LACKING[kind]:
        assert lacking(error) == kind, error
        said = shortage(error, "It could not be done")
        assert (said is None) == (kind is None)
        assert kind is None or (str(said).count(": ") == 1 and str(said).endswith("."))
        outer = ValueError("It is damaged.")
        outer.__cause__ = error
        assert lacking(outer) == kind


@pytest.mark.parametrize(
    "error",
    [
        SystemError("<built-in function f> returned NULL: error return without exception set"),
        OSError("Could not find/load shared object file 'libllvmlite.so' from resource location 'llvmlite.binding'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_unsaid_is_memory_where_that_has_a_limit(error, monkeypatch):
    resource = pytest.importorskip("resource")
    outer = ImportError("numba needs llvmlite")
    outer.__cause__ = error
    for limit, kind in ((resource.RLIM_INFINITY, None), (1 << 30, "memory")):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: (limit, resource.RLIM_INFINITY))
        assert lacking(error) == lacking(outer) == kind
    assert lacking(SystemError("error return without exception set: cannot allocate memory")) == "memory"
    assert lacking(ImportError("libx.so: failed to map segment from shared object")) == "memory"
    assert lacking(ImportError("No module named 'x'")) is None


def test_a_thread_has_no_stack_where_memory_has_a_limit(monkeypatch):
    resource = pytest.importorskip("resource")
    limits = {}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits.get(which, resource.RLIM_INFINITY), 0))
    error = RuntimeError("can't start new thread")
    assert lacking(error) == "threads"
    limits[resource.RLIMIT_AS] = 1 << 30
    assert lacking(error) == "memory"
    limits[resource.RLIMIT_NPROC] = 60
    assert lacking(error) == "threads"


def test_a_note_that_could_not_be_read_is_no_empty_one(tmp_path, monkeypatch):
    """Else all that it says is done would be done again."""
    (tmp_path / "job.json").write_text('{"done": {}}')

    def none(*args, **kwargs):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(disk, "small_file", none)
    with pytest.raises(Shortage, match=r"job\.json could not be read, because this process has as many files open"):
        disk.json_object(tmp_path / "job.json")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs limits of Linux")
def test_a_real_limit_of_files(tmp_path):
    import resource

    golden().save(tmp_path / "x")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, before[1]))
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for work in (lambda: itda.ITDA.load(tmp_path / "x"), lambda: golden().save(tmp_path / "x")):
            with pytest.raises(Shortage, match=FILES):
                work()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert same(itda.ITDA.load(tmp_path / "x"), golden())
    assert sorted(os.listdir(tmp_path / "x")) == sorted([folder.MANIFEST, folder.ATOMS, folder.LABELS, folder.SAMPLE])
