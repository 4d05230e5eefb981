"""Under a limit of memory or processes: a command that a library ends says so, with status 2, and does not hang."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from itda import shortages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs limits and /proc of Linux")
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, -1))"
CODE = """
import atexit, ctypes, os, signal, sys, threading, time
from itda.cli import main, watch
from itda.errors import InputError
{limit}
watch.LOOK, watch.STUCK = 0.05, 0.3
def say(what):
    os.write(1, (str(what) + chr(10)).encode())
def run(words):
    {run}
main._run = run
sys.argv[1:] = ["show", "x"]
sys.exit(main.main())
"""


def began(run, limit=LIMITED, **how):
    code = CODE.format(limit=limit, run=run)
    return subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, **how)


def ended(run, limit=LIMITED, **how):
    process = began(run, limit, **how)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


SAID = "most likely because memory ran out: end other programs, raise the limit where one is set (`ulimit -v`), or"


@pytest.mark.parametrize(
    ("run", "how"),
    [
        ("os.abort()", "was ended by SIGABRT"),
        ("ctypes.string_at(0)", "was ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
        ("os._exit(1)", "was ended by a library"),  # as libgomp does where a thread cannot be started
        ("os._exit(0)", "was ended by a library"),
        ("lock = threading.Lock(); lock.acquire(); lock.acquire()", "stood still"),
    ],
)
def test_what_ends_without_a_word_is_told(run, how):
    assert ended(run) == (2, "", f"itda: error: `itda show` {how}, {SAID} take a machine with more.\n")


def test_openblas_asks_for_no_buffers_of_threads_where_memory_is_limited():
    """Without room for them it asks for ever, as scipy is imported, and no signal reaches Python."""
    tells = "say(os.environ.get('OPENBLAS_NUM_THREADS')); return 0"
    bare = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    assert ended(tells, env=bare) == (0, "1\n", "")
    assert ended(tells, env=bare | {"OPENBLAS_NUM_THREADS": "2"}) == (0, "2\n", "")
    assert ended(tells, limit="", env=bare) == (0, "None\n", "")


@pytest.mark.parametrize(
    "wait",
    [
        "time.sleep(1)",
        "os.read(os.pipe()[0], 1)",
        "threading.Thread(target=os.read, args=(os.pipe()[0], 1), daemon=True).start(); threading.Event().wait()",
        "event = threading.Event(); [event.wait(0.1) for _ in range(10)]",
    ],
)
def test_a_wait_for_anything_but_a_thread_is_no_standstill(wait):
    """A network, a disk, another process, or a turn that comes: all may take as long as they like."""
    alarm = "signal.signal(signal.SIGALRM, lambda *_: os._exit(3)); signal.setitimer(signal.ITIMER_REAL, 1)"
    assert "stood still" not in ended(f"{alarm}; {wait}")[2]


@pytest.mark.parametrize(
    ("run", "status", "says"),
    [
        ("say(7)", 0, ""),
        ("raise InputError('No.')", 2, "itda: error: No.\n"),
        ("raise ValueError('x')", 1, "itda: error: this should not have happened (ValueError: x)"),
        ("atexit.register(os.abort)", 0, ""),  # it had done its work
    ],
)
def test_what_ends_with_a_word_is_as_ever(run, status, says):
    found, out, err = ended(run)
    assert (found, out) == (status, "7\n" if "7" in run else "") and err.startswith(says) and err.count("\n") <= 1


def test_without_a_limit_there_is_no_other_process():
    run = "say(os.getppid())"
    assert ended(run, limit="")[1] == f"{os.getpid()}\n"
    assert ended(run)[1] != f"{os.getpid()}\n"


COUNTED = (
    "seen = []; [signal.signal(n, lambda n, _: seen.append(n)) for n in (2, 15, 1)]; say(os.getpid());"
    " time.sleep(0.5); time.sleep(0.5); say(seen)"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("all_of_them", [False, True], ids=["the process", "its group"])
def test_a_signal_comes_once(number, all_of_them):
    """As one of a terminal, which goes to the whole group."""
    process = began(COUNTED, start_new_session=True)
    assert int(process.stdout.readline()) != process.pid
    (os.killpg if all_of_them else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"[{number:d}]\n"), err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_the_same_status(number, status):
    process = began("say(1); time.sleep(60)")
    process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "interrupted\n" and process.returncode == status


def state(process):
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def until(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_stopped_and_goes_on_as_one():
    process = began("say(os.getpid()); time.sleep(1); say('done')", start_new_session=False)
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGTSTP)
    until(lambda: state(child) == state(process.pid) == "T")
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "done\n" and process.returncode == 0


def test_it_ends_with_the_one_that_watches():
    process = began("say(os.getpid()); time.sleep(60)")
    child = int(process.stdout.readline())
    process.kill()
    process.communicate()
    until(lambda: not os.path.exists(f"/proc/{child}") or state(child) == "Z")


def test_no_other_process_can_be_started():
    few = "import resource as r; r.setrlimit(r.RLIMIT_NPROC, (900, r.getrlimit(r.RLIMIT_NPROC)[1]))"
    refused = f"{few}; import errno\ndef fork(): raise BlockingIOError(errno.EAGAIN, 'x')\nos.fork = fork"
    status, out, err = ended("say(1)", limit=refused)
    assert (status, out) == (2, "") and err.startswith(
        "itda: error: `itda show` could not begin, because no more threads or processes can be started: "
    )


def test_which_limits_count(tmp_path, monkeypatch):
    import resource

    limits = {}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits.get(which, resource.RLIM_INFINITY), 0))
    monkeypatch.setattr(shortages, "_PROC", tmp_path)
    monkeypatch.setattr(shortages, "_GROUPS", tmp_path / "groups")
    (tmp_path / "self").mkdir()
    (tmp_path / "groups/a/b").mkdir(parents=True)
    assert not shortages.is_memory_limited() and not shortages.are_processes_few()
    for name in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        limits[name] = 1 << 40
        assert shortages.is_memory_limited()
        limits.clear()
    for number, few in ((200, True), (4096, False)):
        limits[resource.RLIMIT_NPROC] = number
        assert shortages.are_processes_few() == few and not shortages.is_memory_limited()
    (tmp_path / "self/cgroup").write_text("1:cpu:/x\n0::/a/b\n")
    for place in ("a/b", "a", "."):
        (tmp_path / "groups" / place / "memory.max").write_text("max\n")
        assert not shortages.is_memory_limited()
    (tmp_path / "groups/a/memory.max").write_text("1000000\n")
    assert shortages.is_memory_limited()
    (tmp_path / "self/cgroup").write_text("0::/\n")
    assert not shortages.is_memory_limited()


@pytest.mark.parametrize("room", [400_000, 700_000, 1 << 30])  # KiB
def test_a_command_that_has_no_room_says_so(room):
    dictionary = Path(__file__).parents[1] / "dictionary" / "golden" / "tiny"
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({room << 10}, -1))\n"
    code += f"sys.argv[1:] = ['show', {str(dictionary)!r}]\nfrom itda.cli.main import main\nsys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    wanted = {400_000: (2,), 700_000: (0, 2), 1 << 30: (0,)}  # in between it depends on the libraries
    assert done.returncode in wanted[room], done.stderr
    if done.returncode:
        assert "Traceback" not in done.stderr and not done.stdout
        assert done.stderr.splitlines()[-1].startswith("itda: error: `itda show` ")
        assert "because memory ran out" in done.stderr.splitlines()[-1]
