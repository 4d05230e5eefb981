"""What the benchmarks share: their flags, where results are kept, and what is written down beside a figure."""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"  # texts and small trained models, where they are
PACKAGES = ("itda", "torch", "numba", "numpy", "transformers")


def parser(doc, quick):
    """The flags that every benchmark has; `quick` says what its --quick is."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--quick", action="store_true", help=quick)
    flags.add_argument("--data", type=Path, default=DATA, help="the folder of texts and models")
    flags.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return flags


def check_models(args):
    """End where there are no models in --data."""
    if not (args.data / "lms").is_dir():
        sys.exit(f"There are no models in {args.data / 'lms'}: name their folder with --data.")


class Results:
    """The figures of a benchmark by name, in a file that is written whenever one comes."""

    def __init__(self, name, args, ending=""):
        args.out.mkdir(parents=True, exist_ok=True)
        self.path = args.out / f"{name}{ending}{'_quick' * args.quick}.json"
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else {}

    def keep(self, name, **what):
        """Write `what` down as `name`."""
        self.rows[name] = what
        self.path.write_text(json.dumps(self.rows, indent=1, default=float) + "\n")


def told(words):
    """A command line without the folders of this machine: of an absolute path its last part."""
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)


def processor():
    """The name of the processor."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def stamp(**more):
    """What stands beside every figure: the command, the threads, the processor."""
    return dict(command=told(sys.argv), threads=torch.get_num_threads(), cpu=processor()) | more


def machine(device, packages=(), **more):
    """All that a figure of time depends on beside the code."""
    versions = {}
    for name in (*PACKAGES, *packages):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    out = dict(cpu=processor(), cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version())
    out["gpu"] = torch.cuda.get_device_name() if device == "cuda" else None
    out |= dict(versions=versions, date=time.strftime("%Y-%m-%d %H:%M:%S %z"), **more)
    return out | dict(command=told([sys.executable, *sys.argv]))
