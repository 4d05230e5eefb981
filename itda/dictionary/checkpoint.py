"""The state of an unfinished build, in one file that is replaced atomically."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from itda.dictionary.builder import Builder
from itda.dictionary.folder import CHECKPOINT
from itda.dictionary.threshold import Schedule
from itda.disk import bytes_of, make_folder, remove_leftovers, safetensors_chunks, write_file
from itda.errors import InputError, check_whole, one_line
from itda.labels import LABEL_ARRAYS, Labels
from itda.provenance import FINGERPRINT

VERSION = "1"


def save(builder: Builder, folder: Path, identity: dict) -> None:
    """Write the state of `builder` to `folder`. `identity` says what it is built from (`restore` compares it)."""
    if not builder.started:  # nothing judged yet: starting again costs little
        return
    dictionary = builder.dictionary
    sample, sample_labels = builder.sample.tokens()
    tensors = {
        "atoms": dictionary.gram.atoms,
        "norms": torch.tensor(dictionary.norms, dtype=torch.float64, device="cpu"),
        "losses": torch.tensor(dictionary.losses, dtype=torch.float64, device="cpu"),
        "sample": sample,
        "watched": torch.tensor(builder.schedule.losses, dtype=torch.float64, device="cpu"),
        **_label_tensors("labels", Labels.concat(builder.labels)),
        **_label_tensors("sample_labels", sample_labels),
    }
    if builder.mean is not None:
        tensors["mean"] = builder.mean
    state = {
        "version": VERSION,
        "settings": builder.settings,
        "identity": identity,
        "position": builder.position,
        "seen": builder.seen,
        "stream_hash": builder.stream_hash,
        "content_hash": builder.content and builder.content.hash(),
        "schedule": asdict(builder.schedule) | {"losses": []},
        "counts": [dictionary.choices, dictionary.settled, dictionary.replayed],
        "stride": builder.sample.stride,
    }
    make_folder(folder)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"state": json.dumps(state)}
    metadata["sha256"] = _digest(metadata["state"], tensors)
    write_file(folder / CHECKPOINT, safetensors_chunks(tensors, metadata))


def restore(builder: Builder, folder: Path, identity: dict) -> bool:
    """Bring `builder` to the state in `folder`, if there is one; False if there is none.

    Raises `InputError` if that state belongs to other settings, another model or another stream.
    """
    path = folder / CHECKPOINT
    remove_leftovers(path)
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = json.loads(metadata["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if state["version"] != VERSION:
            raise KeyError("version")
        if metadata["sha256"] != _digest(metadata["state"], tensors):
            raise ValueError("its sha256 differs, so it is damaged")
        builder.fingerprint = state["identity"].get(FINGERPRINT)
        if identity.get(FINGERPRINT) is None:  # a model that is streamed says so when it was read
            identity = identity | {FINGERPRINT: builder.fingerprint} if FINGERPRINT in identity else identity
        _compare(state["settings"] | state["identity"], builder.settings | identity, path)
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _unreadable(path, error) from error
    try:
        _check(state, tensors)
        _fill(builder, state, tensors)
    except Exception as error:  # whatever other tensors and values than `save` writes lead to
        raise _unreadable(path, error) from error
    return True


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = one_line(f"{type(error).__name__}: {error}")
    return InputError(f"The checkpoint {path} cannot be read ({reason}): remove it to start again.")


def _check(state: dict, tensors: dict[str, Tensor]) -> None:
    """Raise one of the errors of Python unless types, shapes and counts are such as `save` writes."""
    n, d = tensors["atoms"].shape
    m, f32, f64 = len(tensors["sample"]), torch.float32, torch.float64
    wanted = {"atoms": (f32, n, d), "norms": (f64, n), "losses": (f64, n), "sample": (f32, m, d)}
    wanted |= {"mean": (f32, d)} if "mean" in tensors else {}
    wanted["watched"] = (f64, tensors["watched"].numel())
    for prefix, rows in (("labels", n), ("sample_labels", m)):
        wanted |= {f"{prefix}.{name}": (torch.int64, rows) for name in LABEL_ARRAYS}
        texts = json.loads(tensors[f"{prefix}.texts"].numpy().tobytes())
        wanted[f"{prefix}.text_start"] = (torch.int64, len(texts))
        row = tensors[f"{prefix}.row"]
        if not all(isinstance(text, str) for text in texts) or bool(((row < -1) | (row >= len(texts))).any()):
            raise ValueError(f"the texts of `{prefix}` are not those of its rows")
    for name, form in wanted.items():
        if (tensors[name].dtype, *tensors[name].shape) != form:
            raise ValueError(f"`{name}` has dtype {tensors[name].dtype} and shape {tuple(tensors[name].shape)}")
    schedule = state["schedule"]
    counts = [("position", state["position"]), ("seen", state["seen"]), ("stride", state["stride"] - 1)]
    counts += [(name, schedule[name]) for name in ("total", "milestone")]
    counts += [("counts", count) for count in (*state["counts"], *schedule["last"], schedule["wish"] or 0)]
    for name, count in counts + [("history", seen) for seen, _ in schedule["history"]]:
        check_whole(name, count, 0)
        if count >= 1 << 62:
            raise ValueError(f"`{name}` is {count:.3g}")
    if not schedule["history"] or not all(type(threshold) is float for _, threshold in schedule["history"]):
        raise ValueError("the thresholds are no numbers")
    if not all(isinstance(state[name], str | None) for name in ("stream_hash", "content_hash")):
        raise ValueError("the hashes are no text")


def _digest(state: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def _fill(builder: Builder, state: dict, tensors: dict[str, Tensor]) -> None:
    builder.mean = tensors.get("mean")
    builder.prepare(tensors["atoms"].shape[1], "cpu")
    builder.dictionary.load(tensors["atoms"], tensors["norms"].tolist(), tensors["losses"].tolist())
    builder.dictionary.choices, builder.dictionary.settled, builder.dictionary.replayed = state["counts"]
    builder.schedule = Schedule(**state["schedule"] | {"losses": tensors["watched"].tolist()})
    builder.labels = [_labels("labels", tensors)]
    builder.sample.stride = state["stride"]
    builder.sample.activations, builder.sample.labels = [tensors["sample"]], [_labels("sample_labels", tensors)]
    builder.position, builder.seen, builder.stream_hash = state["position"], state["seen"], state["stream_hash"]
    builder.content_hash = state["content_hash"]


def _compare(was: dict, wanted: dict, path: Path) -> None:
    wanted = json.loads(json.dumps(wanted))
    for name in sorted(was.keys() | wanted.keys(), key=lambda name: (name == FINGERPRINT, name)):  # which says least
        if was.get(name) != wanted.get(name):
            raise InputError(
                f"The unfinished training in {path.parent} was started with {name} = {was.get(name)!r}, and this one "
                f"has {wanted.get(name)!r}: give the former settings to go on, or remove {path} to start anew."
            )


def _label_tensors(prefix: str, labels: Labels) -> dict[str, Tensor]:
    arrays = {name: torch.from_numpy(getattr(labels, name)) for name in (*LABEL_ARRAYS, "text_start")}
    texts = json.dumps(list(labels.texts)).encode("ascii")  # escapes keep lone surrogates
    arrays["texts"] = torch.from_numpy(np.frombuffer(texts, np.uint8).copy())
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


def _labels(prefix: str, tensors: dict[str, Tensor]) -> Labels:
    arrays = {name: tensors[f"{prefix}.{name}"].numpy() for name in (*LABEL_ARRAYS, "text_start")}
    return Labels(**arrays, texts=tuple(json.loads(tensors[f"{prefix}.texts"].numpy().tobytes())))
