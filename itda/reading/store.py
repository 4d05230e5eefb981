"""Activations on disk (docs/format.md): a folder of shards and a manifest, read as the stream that it was."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from itda.arguments import PATH, checks, places_of
from itda.devices import checked_device
from itda.disk import (
    DTYPES,
    as_input_error,
    checked_path,
    json_object,
    leftover_of,
    read_sealed,
    sealed_json,
    small_file,
    unspeakable,
)
from itda.errors import InputError, NoSuchHook, counted, shortened
from itda.labels import Batch, Labels
from itda.reading import shards
from itda.reading.shards import Places, Shard, damaged
from itda.settings import takes, verbs
from itda.text.prompts import StreamHash

FORMAT, VERSION = "itda-activations", 1
MANIFEST = "activations.json"
JOURNAL = "unfinished.json"  # what the manifest will be, while shards are still added
OUR_FILES = re.compile(r"shard-\d{5,}\.(safetensors|parquet)")
HOOK_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)  # a module path, which may become the name of a folder
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.hook_resid_post|(?:.*\.)?(\d{1,9})", re.ASCII)


@dataclass(frozen=True)
class Contents:
    """A manifest: where the activations come from, and what is in which shard."""

    provenance: dict[str, dict]  # by hook point, as a stream has it, less the stream's hash
    n_layers: int | None
    places: Places
    shards: list[Shard] = field(default_factory=list)
    ended: bool = False  # whether the data has no more tokens
    hash: str = field(
        default_factory=lambda: StreamHash().hexdigest()
    )  # of the stream, as of the last token or the end

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(shard.tokens for shard in self.shards)

    def to_bytes(self) -> bytes:
        """The manifest as it is written."""
        dtypes = {hook: {"dtype": DTYPES[dtype], "d": d} for hook, (dtype, d) in self.places.items()}
        head: dict[str, Any] = {"format": FORMAT, "version": VERSION, "sha256": ""}
        head |= {"tokens": self.tokens, "ended": self.ended, "hash": self.hash, "hook_points": dtypes}
        head |= {"n_layers": self.n_layers, "provenance": self.provenance}
        return sealed_json(head | {"shards": [asdict(shard) for shard in self.shards]}, None)


def read_contents(path: Path) -> Contents:
    """The manifest or journal `path`, with everything checked that needs no other file."""
    with as_input_error(f"{path} could not be read", "give the folder of activations on disk"):
        if path.is_symlink():
            raise damaged(path, "is a link, and a file was wanted")
        data = small_file(path)
    foreign = InputError(f'{path} is not of activations on disk ("format": "{FORMAT}"): give the folder of a store.')
    document = read_sealed(data, (FORMAT, VERSION), partial(damaged, path), foreign, path)
    if (where := unspeakable(document)) is not None:
        raise damaged(path, f"has a number in {shortened(where)} that JSON has no word for (null was wanted)")
    try:
        return _parsed(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, f"does not say what a manifest says ({type(error).__name__}: {error})") from error


def _parsed(document: dict) -> Contents:
    """What a manifest says, or one of the errors of Python that a wrong one leads to."""
    dtypes = {name: dtype for dtype, name in DTYPES.items() if bool(dtype.is_floating_point)}
    places = {}
    for hook, place in document["hook_points"].items():
        if not HOOK_NAME.fullmatch(hook):
            raise ValueError(f"{hook!a} is no hook point")
        places[hook] = dtypes[place["dtype"]], _count(place["d"], 1)
    provenance = {hook: dict(document["provenance"][hook]) for hook in places}
    for said in provenance.values():
        if not isinstance(said["model"], dict) or not isinstance(said["stream"], dict):
            raise ValueError("a provenance has a model and a stream")
    n_layers = None if document["n_layers"] is None else _count(document["n_layers"], 1)
    found = [_shard(part, places) for part in document["shards"]]
    contents = Contents(provenance, n_layers, places, found, bool(document["ended"]), _digest(document["hash"]))
    if contents.tokens != document["tokens"] or not places:
        raise ValueError(f"the shards have {counted(contents.tokens, 'token')} at {counted(len(places), 'hook point')}")
    return contents


def _shard(part: Any, places: Places) -> Shard:
    sums = {hook: part["xxh64"][hook] for hook in places}
    labels = {"size": _count(part["labels"]["size"], 1), "sha256": _digest(part["labels"]["sha256"])}
    batches: list[list] = [[_count(tokens, 1), _digest(read)] for tokens, read in part["batches"]]
    if sum(tokens for tokens, _ in batches) != _count(part["tokens"], 1):
        raise ValueError("the tokens of a shard are those of its batches")
    if wrong := [value for value in sums.values() if not isinstance(value, str)]:
        raise ValueError(f"{wrong[0]!r} is no xxh64")
    return Shard(part["tokens"], sums, labels, batches)


def _count(value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is no count")
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} is no sha256")
    return value


def is_store(path: Any) -> bool:
    """Whether `path` is the folder of activations on disk, or of a collecting that has not finished."""
    if not isinstance(path, str | os.PathLike):
        return False
    return any(os.path.lexists(os.path.join(path, name)) for name in (MANIFEST, JOURNAL))


# -- which hook points ------------------------------------------------------------------------------------------------


def chosen(names: Sequence[str], layer: Any, hook: Any, n_layers: int | None, path: Any) -> tuple[list[str], bool]:
    """Those of the hook points `names` that are asked for (all if none is), and whether that is one by itself."""
    given, single = places_of(layer, hook)
    if layer is None and hook is None:
        return list(names), len(names) == 1
    asked = [_named(one, names, n_layers) for one in given]
    found = {name for name in asked if name is not None}
    if not found or None in asked:
        missing = f"{given!r}" if given else "no hook point"
        kind = "layers" if layer is not None else "hook points"
        said = f"{path} holds {', '.join(names)}, and {kind} {missing} was asked for: choose of those."
        raise NoSuchHook(said, given[asked.index(None)]) if given else InputError(said)
    return sorted(found, key=list(names).index), single  # as a forward pass reaches them


def _named(one: Any, names: Sequence[str], n_layers: int | None) -> str | None:
    """The hook point of the residual stream after a layer, or of that name, TransformerLens' among them."""
    if isinstance(one, str):
        lens = re.fullmatch(r"blocks\.(\d{1,9})\.hook_resid_(pre|post)", one, re.ASCII)
        ends = [name for name in names if name == one or name.endswith(f".{one}")]
        if ends or not lens:
            return ends[0] if len(ends) == 1 else None
        one = int(lens[1]) - (lens[2] == "pre")
    elif isinstance(one, bool) or not hasattr(one, "__index__"):
        return None
    elif int(one) < 0:
        one = int(one) + n_layers if n_layers else -1
    blocks = {name: match for name in names if (match := _BLOCK.fullmatch(name))}
    same = [name for name, match in blocks.items() if int(match[1] or match[2]) == one]
    return min(same, key=len, default=None)  # `layers.8`, and not `layers.3.experts.8`


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Tokens of one batch that one shard holds."""

    shard: int
    start: int
    stop: int


class Store:
    """Activations on disk, as `itda collect` wrote them: the stream that they were, with the same batches.

    Iterable, again and again, of `Batch`, or of {hook point: `Batch`}. `layer` and `hook` choose, as for
    `itda.activations`, of the hook points that were collected: one by itself gives batches, as does a store of one. At
    most `tokens` tokens are read. Batches are put on `device`, CUDA where there is one. What is read is checked; one
    shard is held while the next is read. Raises `InputError` for what is not there or damaged.
    """

    @takes(verbs.STORED)
    @checks(path=PATH)
    def __init__(
        self, path: str | os.PathLike, *, device: str | torch.device | None = None, **settings: Unpack[verbs.Stored]
    ):
        self.path = Path(checked_path(path))
        if not os.path.lexists(self.path / MANIFEST):
            if is_store(path):
                raise InputError(f"The collecting into {path} has not finished: the same `itda collect` goes on.")
            raise InputError(f"{path} has no {MANIFEST}: give a folder that `itda collect` has written.")
        self.contents = read_contents(self.path / MANIFEST)
        layer, hook, self._budget = settings["layer"], settings["hook"], settings["tokens"]
        names, self.single = chosen(list(self.contents.places), layer, hook, self.contents.n_layers, path)
        self.hook_points = tuple(names)
        self.skipped = 0  # tokens that an iteration leaves out at the beginning
        self.hash = StreamHash().hexdigest()  # over the rows whose tokens the latest iteration has read so far
        self._device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {counted(self.contents.tokens, 'token')} at {', '.join(self.hook_points)})"

    @property
    def n_layers(self) -> int | None:
        """How many the model has."""
        return self.contents.n_layers

    @property
    def tokens(self) -> int:
        """How many tokens an iteration yields."""
        return max(0, self._end - self.skipped)

    @property
    def expected(self) -> int:
        """How many tokens there are to read, skipped ones too."""
        return self._end

    @property
    def _end(self) -> int:
        total = self.contents.tokens
        return total if self._budget is None else min(total, self._budget)

    def count_tokens(self, limit: int | None = None) -> int:
        """How many tokens an iteration yields, or `limit` if that is fewer."""
        return self.tokens if limit is None else min(limit, self.tokens)

    @property
    def skipped_hash(self) -> str:
        """The stream's hash as of the tokens skipped."""
        reached, read = 0, StreamHash().hexdigest()
        for tokens, read_then in (batch for shard in self.contents.shards for batch in shard.batches):
            if reached >= self.skipped:
                break
            reached, read = reached + tokens, read_then
        return read

    def skip(self, tokens: int) -> Store:
        """The same without the first `tokens` tokens, which are not read."""
        if tokens < 0:
            raise InputError(f"`tokens` is {tokens}, and no fewer than 0 can be skipped: pass how many were read.")
        rest = copy.copy(self)
        rest.skipped, rest.hash = self.skipped + tokens, StreamHash().hexdigest()
        return rest

    @property
    def provenance(self) -> dict:
        """Where the activations come from, as the model's stream said it; per hook point unless `single`."""
        said = {hook: dict(self.contents.provenance[hook]) for hook in self.hook_points}
        for own in said.values():
            own["stream"] = {**own["stream"], "hash": self.hash}
        return said[self.hook_points[0]] if self.single else said

    def documents(self, tokens: int) -> int:
        """How many documents the first `tokens` are of; their labels are read for that."""
        every, found, count = copy.copy(self), set[int](), 0
        every.skipped = 0
        for labels, _ in every.labels():
            found.update(labels.document[: tokens - count].tolist())
            if (count := count + len(labels)) >= tokens:
                break
        return len(found)

    def labels(self) -> Iterator[tuple[Labels, str]]:
        """The labels of every batch, and the stream's hash as of it; no activations are read."""
        bare = copy.copy(self)
        bare.hook_points = ()
        for batch in bare._joined():
            yield batch[0], bare.hash
        self.hash = bare.hash

    def __iter__(self) -> Iterator[Batch] | Iterator[dict[str, Batch]]:
        for labels, found in self._joined():
            batch = {hook: Batch(x, labels) for hook, x in found.items()}
            yield batch[self.hook_points[0]] if self.single else batch

    def _joined(self) -> Iterator[tuple[Labels, dict[str, Tensor]]]:
        """Labels and activations of every batch."""
        self.hash = StreamHash().hexdigest()
        if self.skipped > self._end:
            raise InputError(
                f"{counted(self.skipped, 'token')} cannot be skipped, because {self.path} has {self._end}: "
                "pass the activations "
                "that were read before."
            )
        batches = list(self._batches())
        held, numbers = -1, sorted({piece.shard for pieces, _ in batches for piece in pieces})
        shard: Any = None
        loaded = self._loaded(numbers)
        try:
            for pieces, read in batches:
                parts = []
                for piece in pieces:
                    if piece.shard != held:
                        shard, held = next(loaded), piece.shard
                    rows = slice(piece.start, piece.stop)
                    parts.append(({hook: x[rows].to(self._device) for hook, x in shard[0].items()}, shard[1][rows]))
                self.hash = read
                yield shards.join(parts)
        finally:
            loaded.close()
        if not batches:
            self.hash = self.skipped_hash
        if self.contents.ended and (self._budget is None or self._budget > self.contents.tokens):
            self.hash = self.contents.hash  # rows without valid tokens may have come after the last ones

    def _batches(self) -> Iterator[tuple[list[_Piece], str]]:
        """The batches of an iteration, each with the stream's hash as of it.

        A batch cut short by the number of tokens asked for goes on in the next shard, when more were collected since.
        """
        done, every = 0, []
        for number, shard in enumerate(self.contents.shards):
            at = 0
            for tokens, read in shard.batches:
                start, stop = max(0, self.skipped - done), min(tokens, self._end - done)
                if start < stop:
                    every.append((_Piece(number, at + start, at + stop), read))
                at, done = at + tokens, done + tokens
        for read, group in groupby(every, lambda one: one[1]):
            yield [piece for piece, _ in group], read

    def _loaded(self, numbers: Sequence[int]) -> Generator[tuple[dict[str, Tensor], Labels], None, None]:
        """The shards `numbers`, one being read while the one before it is used."""
        with ThreadPoolExecutor(1, "itda-store") as thread:

            def start(number: int) -> Any:
                shard = self.contents.shards[number]
                return thread.submit(shards.read, self.path, number, shard, self.contents.places, self.hook_points)

            reading = [start(number) for number in numbers[:1]]
            for following in [*numbers[1:], None][: len(numbers)]:
                found = reading.pop().result()
                reading = [] if following is None else [start(following)]
                yield found


def is_leftover(path: Path) -> bool:
    """Whether this is what a killed writer of a store left, by its name and kind."""
    of = leftover_of(path.name)
    ours = of is not None and (of in (MANIFEST, JOURNAL) or OUR_FILES.fullmatch(of) is not None)
    return ours and path.is_file() and not path.is_symlink()


def foreign(folder: Path) -> str | None:
    """The first name in `folder` that is not part of a store; None if there is none, or no folder."""
    if not folder.is_dir():
        return None
    names = sorted(name for name in os.listdir(folder) if not is_leftover(folder / name))
    if not names or is_store(folder):
        rest = [name for name in names if name not in (MANIFEST, JOURNAL) and not OUR_FILES.fullmatch(name)]
        rest += [name for name in (MANIFEST, JOURNAL) if json_object(folder / name).get("format", FORMAT) != FORMAT]
        return rest[0] if rest else None
    return names[0]
