"""How fast activations go to disk and back, beside what the disk does with the same bytes: the table of docs/LOG.md.

    python benchmarks/store.py [--folder DIR] [--megabytes 512] [--d 768] [--rounds 9]

No model is read: batches are made before. Plain writing is one file of the same bytes, written and flushed to the disk;
plain reading is the store's own files into memory, when they are still in the system's cache, and when they are not.
The store checks all that it reads. Medians over rounds; ratios are taken within each round, as other work on a machine
comes and goes. What was read is compared with what was written before reading is timed.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from itda.labels import Batch, Labels
from itda.reading.collect import Writer
from itda.reading.store import Contents, Store

TOKENS = 4064  # of a batch: 32 rows of 127


def batches(megabytes, d, dtype):
    """Batches that are views of one block of random activations, as many as are wanted, and their labels."""
    x = torch.randn(TOKENS, d).to(dtype)
    count = max(1, megabytes * 10**6 // (x.numel() * x.element_size()))
    text = "The quick brown fox jumps over the lazy dog. " * 12
    for i in range(count):
        row = np.repeat(np.arange(32), 127)
        position = np.tile(np.arange(1, 128), 32)
        columns = [32 * i + row, position, position * 7 % 50_000, row, 4 * position, 4 * position + 4, row]
        yield {"h": Batch(x, Labels(*columns, (text,) * 32, np.arange(32)))}, f"{i:064x}"


def written(folder, megabytes, d, dtype):
    """Seconds that a store takes, how many bytes of activations it has, and those of each batch."""
    provenance = {"h": {"model": {}, "stream": {}}}
    every = list(batches(megabytes, d, dtype))
    folder.mkdir()
    os.sync()
    began = time.perf_counter()
    with Writer(folder) as writer:
        writer.begin(Contents(provenance, None, {"h": (dtype, d)}))
        for item, read in every:
            writer.add(item, read)
        writer.flush()
        writer.finish()
    took, x = time.perf_counter() - began, every[0][0]["h"].activations
    return took, len(every) * x.nbytes, x


def plain(path, size):
    """Seconds for as many bytes in one file."""
    os.sync()
    block = np.random.default_rng(0).integers(0, 255, 12_500_000, np.uint8)
    began = time.perf_counter()
    with open(path, "wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def forget(paths):
    """Have the system forget what it holds of files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plain(folder):
    """Seconds to read the files of a store into memory that is used again."""
    memory = np.empty(1 << 27, np.uint8)
    memory[:] = 0
    began = time.perf_counter()
    for path in sorted(folder.iterdir()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(memory):
                pass
    return time.perf_counter() - began


def read_store(folder):
    """Seconds to read a store, and check all of it."""
    began = time.perf_counter()
    for _ in Store(folder):
        pass
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print("| dtype | what | the disk, MB/s | a store, MB/s | ratio |\n|---|---|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        seconds: dict[str, list[float]] = {}
        for number in range(args.rounds):
            with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
                folder, path = Path(temporary) / "acts", Path(temporary) / "plain"
                if number % 2:  # whichever comes second may find the disk busy
                    by_itself = plain(path, args.megabytes * 10**6)
                took, size, want = written(folder, args.megabytes, args.d, dtype)
                if not number % 2:
                    by_itself = plain(path, args.megabytes * 10**6)
                assert all(torch.equal(batch.activations, want) for batch in Store(folder))
                found = {"write": (by_itself, took)}
                for what in ("read, cached", "read, not cached"):
                    took = {}
                    for read in (read_plain, read_store) if number % 2 else (read_store, read_plain):
                        if "not" in what:
                            forget(folder.iterdir())
                        took[read] = read(folder)
                    found[what] = (took[read_plain], took[read_store])
                for what, pair in found.items():
                    seconds.setdefault(what, []).append(pair)
        for what, pairs in seconds.items():
            disk, store = (size / 1e6 / statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(plain / ours for plain, ours in pairs)
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {what} | {disk:,.0f} | {store:,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
