"""Training and collecting, killed at random moments and started again, end in the bytes of an undisturbed run.

    make soak [MINUTES=30] [KILLS=50]
    python benchmarks/soak.py [--minutes 30] [--kills 50] [--seed 0] [--model DIR --data FILE] [--folder DIR]
                              [--kinds train streamed refined collect plain sweep]

Until the minutes are over and the kills are reached: a command of --kinds, in turn, into a new folder, in a process
that is ended by a signal (mostly SIGKILL) at a moment drawn from the seed, and the same command again until it is done.
Then every file of the folder is compared with those of an undisturbed run, and a difference or a file more ends the
soak with a sentence and status 1; of a sweep's table and notes all but the seconds. `plain` is `itda.build` of a list
of arrays. What was killed before is killed once more early on, every other time: while it recovers. A moment is so many
seconds after the start, or just after so many changes of the folder, which finds the short moments in which files are
written. The processes are forked from this one, which has everything imported and computes nothing, so that the time
goes into work that can be spoilt.
"""

import argparse
import csv
import importlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

TRAIN = ["train", "--k", "8", "--checkpoint-seconds"]
KINDS = {
    "train": ["--threshold", "0.2"],
    "streamed": ["--threshold", "0.2", "--stream-layers"],
    "refined": ["--n-atoms", "48", "--candidates", "2", "--refine", "2", "--refine-tokens", "500"],
    "collect": [],
    "plain": [],
    "sweep": ["--k", "4", "8", "--threshold", "0.3"],
}
# What the commands import when they are called, so that no attempt spends its time on it.
IMPORTED = ("cli.main", "training.train", "dictionary.build", "reading.collect", "comparison.compare", "training.sweep")
SIGNALS = [signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT]
ENDED = {0, 130, 143, *(-number for number in SIGNALS)}
PATIENCE = 3  # kills of one command before it is left alone, so that every one finishes
SHARD_BYTES = 1 << 18  # small, so that a collecting has something to go on from
STUCK = 600  # seconds


def command(kind, args, out):
    if kind == "plain":
        return ["plain", str(args.tokens), str(args.checkpoint_seconds), str(out)]
    words = ["collect"] if kind == "collect" else [*TRAIN, str(args.checkpoint_seconds)]
    if kind == "sweep":
        words = ["sweep"]
    where = ["--batch-rows", "4", "--layer", *map(str, args.layers), "--tokens", str(args.tokens), "--out", str(out)]
    given = (
        ["--model", str(args.model), "--data", str(args.data)] if kind == "sweep" else [str(args.model), str(args.data)]
    )
    return [words[0], *given, *words[1:], *KINDS[kind], *where]


def plain(tokens, seconds, out):
    """What a notebook does: a dictionary of arrays, kept on the way, and saved."""
    import numpy as np

    import itda

    x = np.random.default_rng(0).normal(size=(int(tokens), 24)).astype(np.float32)
    parts = np.array_split(x, max(1, len(x) // 100))
    model = itda.build(parts, k=4, threshold=0.3, checkpoint=out, checkpoint_seconds=float(seconds))
    model.save(out)
    (Path(out) / "checkpoint.safetensors").unlink(missing_ok=True)
    return 0


def start(words, log):
    """Run a command in a forked process, which says what it has to say in the file `log`; its id."""
    if process := os.fork():
        return process
    status = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(said, 1)
        os.dup2(said, 2)
        status = plain(*words[1:]) if words[0] == "plain" else sys.modules["itda.cli.main"].main(words)
        sys.stdout.flush()
    except KeyboardInterrupt:  # before the command line had its hands on signals
        status = 130
    finally:
        os._exit(status)


def snapshot(out):
    """What a look at the folder tells; another one after any change in it."""
    found = []
    for place, _, names in os.walk(out):
        found.append(place)
        for name in names:
            with suppress(OSError):  # it has gone meanwhile
                there = os.stat(os.path.join(place, name))
                found.append((name, there.st_size, there.st_mtime_ns))
    return found


def attempt(words, out, log, changes=None, seconds=0.0, how=None):
    """Run a command, and send `how` so many `seconds` after its start, or after so many changes of the folder.

    Returns the exit status, and how many changes there were.
    """
    process, began, seen, last, sent = start(words, log), time.monotonic(), 0, [], how is None
    moment = began + seconds if changes is None else None
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), seen
        now = time.monotonic()
        if moment is None and (found := snapshot(out)) != last:
            last, seen = found, seen + 1
            moment = now + seconds if seen >= changes else None
        if not sent and moment is not None and now >= moment:
            os.kill(process, how)
            sent = True
        if now - began > STUCK:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise SystemExit(f"`itda {' '.join(words)}` had not ended after {STUCK} s.")
        time.sleep(0.001 if not sent else 0.01)


def held(out):
    """What a killed process left to go on from; and whether a file was half written."""
    names = {path.name for path in out.rglob("*")}
    begun = names & {"checkpoint.safetensors", "unfinished.json"}
    half = any(".tmp-" in name for name in names)
    if names & {"cfg.json", "activations.json"}:
        return "some of it saved" if begun else "complete", half
    if "states.json" in names:
        return "states", half
    if any(name.startswith("shard-") for name in names):
        return "shards", half
    return "checkpoint" if "checkpoint.safetensors" in names else "nothing", half


def files(out):
    """Every file by its path, with its bytes; folders too, with None. How long a training took is no part of it."""
    found = {str(path.relative_to(out)): path.read_bytes() if path.is_file() else None for path in out.rglob("*")}
    for name, data in found.items():
        if name == "results.csv":
            rows = list(csv.DictReader(data.decode().splitlines()))
            found[name] = [row | {"seconds": None} for row in rows]
        elif Path(name).name in ("results.json", "job.json"):
            found[name] = re.sub(rb'"seconds": [0-9.e-]+', b"", data)
    return found


def difference(found, want):
    """How the files `found` differ from those of an undisturbed run, in words; "" if they do not."""
    said = [f"{name} is missing" for name in want.keys() - found.keys()]
    said += [f"{name} is left over" for name in found.keys() - want.keys()]
    said += [f"{name} differs" for name in want.keys() & found.keys() if found[name] != want[name]]
    return ", ".join(sorted(said))


def last_line(log):
    lines = log.read_text("utf-8", "replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


class Soak:
    """Counts what was killed and what finished."""

    def __init__(self, args, place):
        self.args, self.place, self.random = args, place, random.Random(args.seed)
        self.kills, self.finishes, self.moments, self.signals = 0, Counter(), Counter(), Counter()
        self.half, self.recovering = 0, 0
        self.end = 0.0

    def undisturbed(self, kind):
        """The files of a run that nobody kills, its seconds, and how often its folder changed."""
        out, log, began = self.place / f"{kind}-whole", self.place / "log", time.monotonic()
        status, changes = attempt(command(kind, self.args, out), out, log, changes=sys.maxsize)
        if status:
            raise SystemExit(f"An undisturbed {kind} ended with status {status}, and last said: {last_line(log)}")
        return files(out), time.monotonic() - began, changes

    def over(self):
        return self.kills >= self.args.kills and time.monotonic() >= self.end

    def moment(self, seconds, changes, again):
        """A moment to kill at, of a command that takes so long and changes its folder so often; early if `again`."""
        how = self.random.choice(SIGNALS)
        if again and self.random.random() < 0.5:
            self.recovering += 1
            seconds, changes = 0.2 * seconds, min(2, changes)
        if self.random.random() < 0.5:
            return dict(changes=None, seconds=self.random.uniform(0, 0.8 * seconds), how=how)
        return dict(changes=self.random.randint(1, changes), seconds=self.random.uniform(0, 0.01), how=how)

    def round(self, kind, want, seconds, changes):
        """One command into a new folder, killed until it is done, and its files compared."""
        out, log = self.place / kind, self.place / "log"
        kills, done, words = [], False, command(kind, self.args, out)
        while not done:
            log.unlink(missing_ok=True)
            leave = len(kills) >= PATIENCE or self.over()
            plan = {} if leave else self.moment(seconds, changes, bool(kills))
            status, _ = attempt(words, out, log, **plan)
            what, half = held(out)
            # One that is complete may be killed still; the same command is then refused, and has to change nothing.
            done = status == 0 or (status == 2 and what == "complete" and "a finished ITDA already" in last_line(log))
            if done:
                break
            if status not in ENDED:
                self.fail(kind, kills, f"ended with status {status} after {what}, and last said: {last_line(log)}")
            self.kills += 1
            self.half += half
            self.moments[what] += 1
            self.signals[plan["how"].name if plan else f"status {status}"] += 1
            kills.append(what + " and a half-written file" * half)
        if said := difference(files(out), want):
            self.fail(kind, kills, f"is not what an undisturbed run leaves: {said}")
        self.finishes[kind] += 1
        remove(out)

    def fail(self, kind, kills, what):
        after = f", killed at {'; '.join(kills)}," if kills else ""
        self.report()
        raise SystemExit(f"Run {self.finishes.total() + 1} of seed {self.args.seed}, {kind}{after} {what}.")

    def report(self):
        rows = dict(seed=self.args.seed, kills=self.kills, finishes=self.finishes.total())
        rows |= {f"finished: {kind}": n for kind, n in self.finishes.items()}
        rows |= {f"killed at: {what}": n for what, n in self.moments.most_common()}
        rows |= {"with a half-written file": self.half, "early in a recovery": self.recovering, **self.signals}
        for name, value in rows.items():
            print(f"{name:>28}  {value}", flush=True)


def remove(out):
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    out.rmdir()


def prepared(place):
    """The text of the demo, as a file."""
    import json

    from itda import demo

    path = place / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in demo.corpus()[:200]), "utf-8")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="at least")
    parser.add_argument("--kills", type=int, default=50, help="at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--model", type=Path, help="a folder; the demo's by default")
    parser.add_argument("--data", type=Path, help="a file of text; the demo's by default")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--checkpoint-seconds", type=float, default=0.2)
    parser.add_argument("--folder", type=Path, help="on the disk to write to; of the system's choice by default")
    args = parser.parse_args()
    # Before torch: a forked process has one thread, and needs no network.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    for name in IMPORTED:
        importlib.import_module(f"itda.{name}")
    for name in ("transformers.models.llama.modeling_llama", "pyarrow.parquet"):
        importlib.import_module(name)
    sys.modules["itda.reading.collect"].SHARD_BYTES = SHARD_BYTES
    worker = sys.modules["itda.training.sweep_worker"]
    worker.train = partial(worker.train, checkpoint_seconds=args.checkpoint_seconds)
    from itda import demo

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        place = Path(folder)
        args.model, args.data = args.model or demo.model_path(), args.data or prepared(place)
        soak = Soak(args, place)
        whole = {kind: soak.undisturbed(kind) for kind in args.kinds}
        print(
            "undisturbed:", ", ".join(f"{kind} {seconds:.1f} s" for kind, (_, seconds, _) in whole.items()), flush=True
        )
        soak.end = time.monotonic() + 60 * args.minutes
        while not soak.over():
            for kind in args.kinds:
                soak.round(kind, *whole[kind])
        soak.report()


if __name__ == "__main__":
    main()
