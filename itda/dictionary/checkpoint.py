"""The state of an unfinished build, in one file that is replaced atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from itda.dictionary.builder import Builder
from itda.dictionary.folder import CHECKPOINT
from itda.dictionary.online import Online
from itda.dictionary.standard import Massive
from itda.dictionary.threshold import Schedule
from itda.disk import bytes_of, make_folder, remove_leftovers, safetensors_chunks, write_file
from itda.errors import InputError, check_whole, counted, one_line
from itda.labels import LABEL_ARRAYS, Batch, Labels
from itda.provenance import FINGERPRINT, PREFIX, VERSIONS, differing, said_of
from itda.shortages import shortage

VERSION = "1"


def save(builder: Builder, folder: Path, identity: dict) -> None:
    """Write the state of `builder` to `folder`. `identity` says what it is built from (`restore` compares it)."""
    if not builder.started and not builder.head:  # nothing read yet
        return
    tensors, state = _judged(builder) if builder.started else _waiting(builder)
    state |= {
        "version": VERSION,
        "settings": builder.settings,
        "identity": identity,
        "position": builder.position,
        "stream_hash": builder.stream_hash,
        "content_hash": builder.content and builder.content.hash(),
    }
    make_folder(folder)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"state": json.dumps(state)}
    metadata["sha256"] = digest(metadata["state"], tensors)
    write_file(folder / CHECKPOINT, safetensors_chunks(tensors, metadata))


def _waiting(builder: Builder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of one that has judged nothing: the tokens that wait, batch by batch."""
    tensors = {f"head.{i}": batch.activations for i, batch in enumerate(builder.head)}
    tensors |= _label_tensors("head_labels", Labels.concat(batch.labels for batch in builder.head))
    return tensors, {"head": len(builder.head), "seen": 0}


def _judged(builder: Builder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of one that has judged tokens."""
    dictionary = builder.dictionary
    sample, sample_labels = builder.sample.tokens()
    tensors = {
        **_atoms(dictionary),
        "norms": torch.tensor(dictionary.norms, dtype=torch.float64, device="cpu"),
        "losses": torch.tensor(dictionary.losses, dtype=torch.float64, device="cpu"),
        "sample": sample,
        "watched": torch.tensor(builder.schedule.losses, dtype=torch.float64, device="cpu"),
        **_label_tensors("labels", Labels.concat(builder.labels)),
        **_label_tensors("sample_labels", sample_labels),
    }
    tensors |= {name: t for name in ("mean", "scale") if (t := getattr(builder, name)) is not None}
    state = {
        "seen": builder.seen,
        "schedule": asdict(builder.schedule) | {"losses": []},
        "counts": [dictionary.choices, dictionary.settled, dictionary.replayed],
        "stride": builder.sample.stride,
    }
    if builder.massive is not None:
        state["massive"] = builder.massive.to_json()
    if isinstance(dictionary, Online):
        state["chunks"] = dictionary.moves.chunks
    return tensors, state


def _atoms(dictionary: Any) -> dict[str, Tensor]:
    """The atoms; of those that move, also what they began as, what moves them, and the tokens that wait."""
    if not isinstance(dictionary, Online):
        return {"atoms": dictionary.gram.atoms}
    waiting = torch.cat([dictionary.start[:0], *dictionary.pending])
    moving = {"start": dictionary.start, "energy": dictionary.moves.energy, "waiting": waiting}
    return {"atoms": dictionary.current, **moving}


def restore(builder: Builder, folder: Path, identity: dict) -> bool:
    """Bring `builder` to the state in `folder`, if there is one; False if there is none.

    Raises `InputError` if that state belongs to other settings, another model or another stream.
    """
    path = folder / CHECKPOINT
    remove_leftovers(path)
    if not path.is_file():
        return False
    try:
        state, tensors = signed(path, VERSION)
        builder.fingerprint = state["identity"].get(FINGERPRINT)
        if identity.get(FINGERPRINT) is None:  # a model that is streamed says so when it was read
            identity = identity | {FINGERPRINT: builder.fingerprint} if FINGERPRINT in identity else identity
        _compare(state["settings"] | state["identity"], builder.settings | identity, path)
    except InputError:
        raise
    except (
        SafetensorError,
        MemoryError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise unreadable(path, error) from error
    try:
        if "head" in state:
            _fill_head(builder, state, tensors)
        else:
            _check(state, tensors)
            _fill(builder, state, tensors)
    except Exception as error:  # whatever other tensors and values than `save` writes lead to
        raise unreadable(path, error) from error
    builder.position, builder.seen, builder.stream_hash = state["position"], state["seen"], state["stream_hash"]
    builder.content_hash = state["content_hash"]
    return True


def signed(path: Path, version: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and tensors of a file; raises whatever a damaged one, or one of another version, leads to."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = json.loads(metadata["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if state["version"] != version:
        raise KeyError("version")
    if metadata["sha256"] != digest(metadata["state"], tensors):
        raise ValueError("its sha256 differs, so it is damaged")
    return state, tensors


def unreadable(path: Path, error: Exception) -> InputError:
    """What to say of a checkpoint that cannot be read."""
    if (said := shortage(error, f"The checkpoint {path} could not be read")) is not None:
        return said
    reason = one_line(f"{type(error).__name__}: {error}")
    return InputError(f"The checkpoint {path} cannot be read ({reason}): remove it to start again.")


def _check(state: dict, tensors: dict[str, Tensor]) -> None:
    """Raise one of the errors of Python unless types, shapes and counts are such as `save` writes."""
    n, d = tensors["atoms"].shape
    m, f32, f64 = len(tensors["sample"]), torch.float32, torch.float64
    wanted = {"atoms": (f32, n, d), "norms": (f64, n), "losses": (f64, n), "sample": (f32, m, d)}
    wanted |= {name: (f32, d) for name in ("mean", "scale") if name in tensors}
    wanted["watched"] = (f64, tensors["watched"].numel())
    if "chunks" in state:
        check_whole("chunks", state["chunks"], 0)
        wanted |= {"start": (f32, n, d), "energy": (f64, n), "waiting": (f32, len(tensors["waiting"]), d)}
    for prefix, rows in (("labels", n), ("sample_labels", m)):
        _check_labels(prefix, tensors, rows)
    _check_forms(wanted, tensors)
    schedule = state["schedule"]
    counts = [("position", state["position"]), ("seen", state["seen"]), ("stride", state["stride"] - 1)]
    counts += [(name, schedule[name]) for name in ("total", "milestone")]
    counts += [("counts", count) for count in (*state["counts"], *schedule["last"], schedule["wish"] or 0)]
    for name, count in counts + [("history", seen) for seen, _ in schedule["history"]]:
        check_whole(name, count, 0)
        if count >= 1 << 62:
            raise ValueError(f"`{name}` is {count:.3g}")
    if (massive := state.get("massive")) is not None:
        counts = [count for name in ("left_out_of_mean", "left_out") if (count := massive[name]) is not None]
        if type(massive["norm"]) is not float or not all(type(n) is int and 0 <= n < 1 << 62 for n in counts):
            raise ValueError("what is said of massive tokens is no number")
    if not schedule["history"] or not all(type(threshold) is float for _, threshold in schedule["history"]):
        raise ValueError("the thresholds are no numbers")
    if not all(isinstance(state[name], str | None) for name in ("stream_hash", "content_hash")):
        raise ValueError("the hashes are no text")


def _check_labels(prefix: str, tensors: dict[str, Tensor], rows: int) -> None:
    texts = json.loads(tensors[f"{prefix}.texts"].numpy().tobytes())
    row = tensors[f"{prefix}.row"]
    if not all(isinstance(text, str) for text in texts) or bool(((row < -1) | (row >= len(texts))).any()):
        raise ValueError(f"the texts of `{prefix}` are not those of its rows")
    wanted = {f"{prefix}.{name}": (torch.int64, rows) for name in LABEL_ARRAYS}
    _check_forms(wanted | {f"{prefix}.text_start": (torch.int64, len(texts))}, tensors)


def _check_forms(wanted: dict[str, tuple], tensors: dict[str, Tensor]) -> None:
    for name, form in wanted.items():
        if (tensors[name].dtype, *tensors[name].shape) != form:
            raise ValueError(f"`{name}` has dtype {tensors[name].dtype} and shape {tuple(tensors[name].shape)}")


def digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state in JSON and of its tensors."""
    found = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(bytes_of(tensors[name]))
    return found.hexdigest()


def _fill(builder: Builder, state: dict, tensors: dict[str, Tensor]) -> None:
    builder.mean, builder.scale = tensors.get("mean"), tensors.get("scale")
    builder.massive = None if state.get("massive") is None else Massive(**state["massive"])
    builder.prepare(tensors["atoms"].shape[1], "cpu")
    dictionary = builder.dictionary
    if isinstance(dictionary, Online):
        dictionary.load(tensors["start"], tensors["norms"].tolist())
        dictionary.current, dictionary.pending = tensors["atoms"], [tensors["waiting"]]
        dictionary.moves.energy, dictionary.moves.chunks = tensors["energy"], state["chunks"]
    else:
        dictionary.load(tensors["atoms"], tensors["norms"].tolist(), tensors["losses"].tolist())
        dictionary.choices, dictionary.settled, dictionary.replayed = state["counts"]
    builder.schedule = Schedule(**state["schedule"] | {"losses": tensors["watched"].tolist()})
    builder.labels = [_labels("labels", tensors)]
    builder.sample.stride = state["stride"]
    builder.sample.activations, builder.sample.labels = [tensors["sample"]], [_labels("sample_labels", tensors)]


def _fill_head(builder: Builder, state: dict, tensors: dict[str, Tensor]) -> None:
    """Give `builder` the tokens that waited, after the checks of `_check`."""
    check_whole("head", state["head"], 1)
    parts = [tensors.pop(f"head.{i}") for i in range(state["head"])]
    sizes, d = [len(part) for part in parts], parts[0].shape[1]
    if any(part.ndim != 2 or part.shape[1] != d or not part.dtype.is_floating_point for part in parts):
        raise ValueError("the tokens at its head are no activations of one size")
    _check_labels("head_labels", tensors, sum(sizes))
    if type(state["position"]) is not int or state["position"] != sum(sizes) or state["seen"] != 0:
        raise ValueError(f"`position` is {state['position']!r} after {counted(sum(sizes), 'token')}")
    if not all(isinstance(state[name], str | None) for name in ("stream_hash", "content_hash")):
        raise ValueError("the hashes are no text")
    labels, at = _labels("head_labels", tensors), 0
    for part, size in zip(parts, sizes, strict=True):
        builder.head.append(Batch(part, labels[at : at + size]))
        at += size


def _compare(was: dict, wanted: dict, path: Path) -> None:
    wanted = json.loads(json.dumps(wanted))
    if (name := differing(was, wanted)) is not None:
        if name.startswith(VERSIONS) or name == PREFIX:
            said = said_of(name, was.get(name), wanted.get(name))
        else:
            said = (
                f"{name} = {was.get(name)!r}, and this one has {wanted.get(name)!r}: give the former settings to go on"
            )
        raise InputError(
            f"The unfinished training in {path.parent} was started with {said}, or remove {path} to start anew."
        )


def _label_tensors(prefix: str, labels: Labels) -> dict[str, Tensor]:
    arrays = {name: torch.from_numpy(getattr(labels, name)) for name in (*LABEL_ARRAYS, "text_start")}
    texts = json.dumps(list(labels.texts)).encode("ascii")  # escapes keep lone surrogates
    arrays["texts"] = torch.from_numpy(np.frombuffer(texts, np.uint8).copy())
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


def _labels(prefix: str, tensors: dict[str, Tensor]) -> Labels:
    arrays = {name: tensors[f"{prefix}.{name}"].numpy() for name in (*LABEL_ARRAYS, "text_start")}
    return Labels(**arrays, texts=tuple(json.loads(tensors[f"{prefix}.texts"].numpy().tobytes())))
