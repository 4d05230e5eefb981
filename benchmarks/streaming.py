"""A model read block by block: what it takes in memory, bytes and time, beside what it must take.

    make bench-streaming [QUICK=1]
    python benchmarks/streaming.py [--quick] [--gb 6.5] [--tokens 4096] [--folder DIR] [--device cuda]

Writes a Llama with random weights of --gb to disk (into --folder, removed at the end), and reads its middle block in a
process of its own. What it must take: the bytes of the embedding and of the blocks up to the middle, at the speed at
which a plain read of the same files gets them from a cold cache; the products of these blocks, at the speed at which
torch computes products of the same shapes. The activations are compared with those of the model read whole.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import shared
import torch
from safetensors.torch import save_file

VOCABULARY, ROWS, LENGTH = 32_000, 8, 128


def write_model(folder, gb, d):
    """A Llama of so many gigabytes, a file for each block; how many blocks it has."""
    from transformers import LlamaConfig

    shapes = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (4 * d, d), "mlp.up_proj": (4 * d, d), "mlp.down_proj": (d, 4 * d)}
    n = round((gb * 1e9 / 4 - VOCABULARY * d) / sum(a * b for a, b in shapes.values()))
    files = {
        "model.embed_tokens.weight": "model-embedding.safetensors",
        "model.norm.weight": f"model-{n - 1}.safetensors",
    }
    save_file({"model.embed_tokens.weight": torch.randn(VOCABULARY, d)}, folder / "model-embedding.safetensors")
    for i in range(n):
        block = {f"{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
        block |= {f"{name}_layernorm.weight": torch.ones(d) for name in ("input", "post_attention")}
        tensors = {f"model.layers.{i}.{name}": x for name, x in block.items()}
        files |= dict.fromkeys(tensors, f"model-{i}.safetensors")
        if i == n - 1:
            tensors["model.norm.weight"] = torch.ones(d)
        save_file(tensors, folder / f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=d, intermediate_size=4 * d, num_hidden_layers=n, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=LENGTH, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return n


def groups(tokens):
    from itda.models.hooked_model import Group

    generator = torch.Generator().manual_seed(0)
    for i in range(max(1, tokens // (ROWS * LENGTH))):
        ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
        yield Group(i, ids, torch.ones_like(ids))


def evict(folder):
    """Let the system forget what it has cached of the files."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(folder, files):
    evict(folder)
    began, size = time.perf_counter(), 0
    for file in files:
        with open(folder / file, "rb", buffering=0) as opened:
            buffer = bytearray(1 << 24)
            while got := opened.readinto(buffer):
                size += got
    return size / (time.perf_counter() - began)


def product_speed(d, device):
    """FLOP/s of products of the shapes of a block, for one group of rows."""
    flops = seconds = 0.0
    for out, into in [(d, d)] * 4 + [(4 * d, d)] * 2 + [(d, 4 * d)]:
        x, w = torch.randn(ROWS * LENGTH, into, device=device), torch.randn(out, into, device=device)
        best = min(timed(lambda: torch.nn.functional.linear(x, w), device) for _ in range(3))  # noqa: B023
        flops, seconds = flops + 2.0 * ROWS * LENGTH * out * into, seconds + best
    return flops / seconds


def timed(function, device):
    began = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def status(name):
    """A size of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def read(folder, layer, tokens, device):
    """In a process of its own: read, and say what it took."""
    from transformers.models.llama import modeling_llama  # noqa: F401 (imports are no part of it)

    from itda.models import loading

    device = torch.device(device)
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], status("RssAnon"))

    began = time.perf_counter()
    thread = threading.Thread(target=watch)
    thread.start()
    model = loading.load_model(folder, object_tokenizer(), hooks=layer, stream_layers=True, device=device)
    total, n = 0.0, 0
    for found in model.read_all(groups(tokens)):
        x = found[model.hook_points[0]]
        total, n = total + float(x.double().sum()), n + x[..., 0].numel()
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    what = dict(seconds=seconds, tokens=n, sum=total, weights=model.bytes_read, peak=peak[0])
    if device.type == "cuda":
        what["device_peak"] = torch.cuda.max_memory_allocated()
    print(json.dumps(what | dict(max_rss=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)))


def object_tokenizer():
    """A tokenizer that nothing here asks: the rows are random ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), unk_token="a")


def whole(folder, layer, tokens, device):
    """The sum of the activations of the model read whole."""
    from itda.models import loading

    model = loading.load_model(folder, object_tokenizer(), hooks=layer, stream_layers=False, device=device)
    return sum(float(found[model.hook_points[0]].double().sum()) for found in model.read_all(groups(tokens)))


def main():
    parser = shared.parser(__doc__, "a small model, to see that it runs")
    parser.add_argument("--gb", type=float, default=6.5)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; of the system's choice by default")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.gb, args.width, args.tokens = 0.05, 256, 1024
    if args.read:
        return read(args.read[0], int(args.read[1]), args.tokens, args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        n = write_model(folder, args.gb, args.width)
        middle = n // 2
        files = ["model-embedding.safetensors", *(f"model-{i}.safetensors" for i in range(middle + 1))]
        disk, speed = disk_speed(folder, files), product_speed(args.width, args.device)
        evict(folder)
        words = [sys.executable, __file__, "--read", place, str(middle), "--tokens", str(args.tokens)]
        words += ["--device", args.device, "--width", str(args.width)]
        took = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        needed = sum((folder / file).stat().st_size for file in files)
        assert took["sum"] == whole(folder, middle, args.tokens, args.device), "the activations differ"
    block = 16 * args.width**2  # parameters: attention 4 d^2, MLP 3 x 4 d^2
    flops = took["tokens"] * (middle + 1) * (2 * block + 2 * args.width * LENGTH * 2)
    least = max(needed / disk, flops / speed)
    row = dict(model_gb=size / 1e9, blocks=n, read_blocks=middle + 1, tokens=took["tokens"], device=args.device)
    row |= dict(needed_gb=needed / 1e9, read_gb=took["weights"] / 1e9, over=took["weights"] / needed - 1)
    row |= dict(peak_gb=took["peak"] / 1e9, states_gb=2 * took["tokens"] * args.width * 4 / 1e9)
    row |= dict(seconds=took["seconds"], least_seconds=least, ratio=took["seconds"] / least)
    row |= dict(disk_gb_s=disk / 1e9, gflops=speed / 1e9, threads=torch.get_num_threads())
    if "device_peak" in took:
        row["device_peak_gb"] = took["device_peak"] / 1e9
    for name, value in row.items():
        print(f"{name:>16}  {value:.4g}" if isinstance(value, float) else f"{name:>16}  {value}")
    shared.Results("streaming", args).keep("streaming", **shared.stamp(), row=row)
    return None


if __name__ == "__main__":
    main()
