"""HF model -> (activations, labels), forward stopped at the hook point."""

from __future__ import annotations

import copy
import difflib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray
from torch import nn

from itda.caches import Cache, from_disk, is_stored
from itda.documents import open_documents
from itda.errors import InputError, check_whole, whole
from itda.hub import load_tokenizer
from itda.labels import Batch, Labels
from itda.layout import Layout
from itda.loading import causal, checked_device, pretrained, random_model, survey
from itda.parallel import shared
from itda.prompts import Row, StreamHash, TokenStream
from itda.prompts import valid as valid_tokens
from itda.pursuit.gram import free_bytes
from itda.reading import Group, HookedModel
from itda.store import Store
from itda.streaming import StreamedModel
from itda.traced import TracedModel, remote_model, unwrapped


def load(
    model: Any,
    tokenizer: Any = None,
    *,
    hooks: int | str | Sequence[int | str],
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    backend: str = "hooks",
    remote: bool | str = False,
    stream_layers: bool | None = None,
    state_gb: float | None = None,
    state_dir: str | Path | None = None,
    tensor_parallel: int | None = None,
    **kwargs,
) -> HookedModel:
    """A model to read `hooks` from: layers (the residual stream after that block), module paths, TransformerLens names.

    `model` is a hub id or a local folder, of which the blocks up to the last one needed are loaded (`kwargs` go to
    `from_pretrained`), or a loaded one, Hugging Face module or `HookedModel`, which is used as and where it is.
    `dtype` "auto" is float32, and on CUDA that of the checkpoint. Activations are those of the weights as they are:
    TransformerLens' folded and centred weights give others under the same names.

    `backend` "nnsight" reads the same in nnsight's traces, also of a model of nnsight's; with `remote`, on NDIF (see
    `itda.traced.RemoteModel`).

    With `stream_layers` one block at a time is in memory (`itda.streaming.StreamedModel`, which takes `state_gb` and
    `state_dir`); None is for where the weights take more than 0.9 of the memory that is free.

    With `tensor_parallel` so many processes on this machine, each with a GPU, share every block
    (`itda.parallel.SharedModel`); 1 is as without.
    """
    hooks = [hooks] if isinstance(hooks, int | str) else list(hooks)
    if not hooks:
        raise InputError("No hook point is given: pass at least one layer or module path.")
    settings: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": device}
    if tensor_parallel is not None and tensor_parallel != 1:
        check_whole("tensor_parallel", tensor_parallel, 1)
        settings |= {"trust_remote_code": trust_remote_code, "backend": backend, "remote": remote, **kwargs}
        return shared(model, tokenizer, hooks, tensor_parallel, stream_layers=stream_layers, **settings)
    if backend != "hooks" or remote:
        settings |= {"trust_remote_code": trust_remote_code, "stream_layers": stream_layers, **kwargs}
        return _traced(model, tokenizer, hooks, backend, remote, **settings)
    if device is not None and kwargs.get("device_map") is not None:
        raise InputError("Give either `device` or `device_map`, not both.")
    if not isinstance(model, nn.Module | HookedModel):
        place = checked_device(device)
        found = survey(model, place, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
        if stream_layers or (stream_layers is None and found.bytes(hooks) > 0.9 * free_bytes(place)):
            state: dict[str, Any] = {"state_gb": state_gb, "folder": state_dir}
            return StreamedModel(found, hooks, tokenizer, device=place, **state)
        base, tokenizer, layout, missing = pretrained(found, hooks, tokenizer, place)
        return HookedModel(base, base, tokenizer, layout, hooks, missing)
    settings |= {"stream_layers": stream_layers or None}
    if idle := [name for name, value in {**settings, **kwargs}.items() if value not in (None, "auto")]:
        raise InputError(f"`model` is loaded already and used as it is: drop `{idle[0]}`, or pass the model's name.")
    if isinstance(model, HookedModel):
        tokenizer = model.tokenizer if tokenizer is None else load_tokenizer(tokenizer)
        return model.at(hooks, tokenizer)
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"`model` is a {type(model).__name__}: pass a Hugging Face `PreTrainedModel`, the id of one, or its folder."
        )
    if tokenizer is None:
        raise InputError("`model` is a loaded module, which does not know its tokenizer: pass `tokenizer=` too.")
    layout = Layout.of(model.base_model, model.config._name_or_path or type(model).__name__)
    return HookedModel(model, model.base_model, load_tokenizer(tokenizer), layout, hooks)


def _traced(model: Any, tokenizer: Any, hooks: list[int | str], backend: str, remote: bool | str, **kwargs: Any) -> Any:
    """`load` with a backend that is not our own."""
    if backend != "nnsight":
        raise InputError(
            f"`backend` is {backend!r}: pass 'hooks' or 'nnsight'."
            if backend != "hooks"
            else "`remote` is nnsight's: pass `backend='nnsight'` (`--backend nnsight`) too."
        )
    if remote:
        return remote_model(model, tokenizer, hooks, remote, **kwargs)
    model, tokenizer = unwrapped(model, tokenizer)
    return TracedModel.of(load(model, tokenizer, hooks=hooks, **kwargs))


def language_model(
    model: str | Path | nn.Module | HookedModel,
    tokenizer: Any = None,
    *,
    hooks: int | str | Sequence[int | str],
    **kwargs,
) -> HookedModel:
    """As `load`, but whole: all blocks and the language modelling head, so that it has `logits`.

    Of a model without a head (an encoder), or one that does not fit into memory whole, it is what `load` gives.
    """
    if not isinstance(model, nn.Module | HookedModel):
        place = checked_device(kwargs.get("device"))
        found = survey(model, place, **{name: value for name, value in kwargs.items() if name != "device"})
        with_head = causal(found, tokenizer, place) if found.bytes([-1]) <= 0.9 * free_bytes(place) else None
        if with_head is not None:
            return load(*with_head, hooks=hooks)
    return load(model, tokenizer, hooks=hooks, **kwargs)


def untrained(
    model: str | Path | HookedModel,
    tokenizer: Any,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> HookedModel:
    """A model of the same config with random weights as its family draws them, float32, with all of its blocks.

    What such models share is architecture, tokens and chance: the control of every comparison.
    """
    if isinstance(model, HookedModel):
        base = random_model(model.module.config, seed, model.device, trust_remote_code)
    else:
        base = random_model(model, seed, device, trust_remote_code)
    return load(base, tokenizer, hooks=-1)


def activations(
    model: Any,
    data: Any,
    *,
    layer: int | Sequence[int] | None = None,
    hook: str | Sequence[str] | None = None,
    context_length: int = 128,
    batch_rows: int = 32,
    tokens: int | None = None,
    truncate: bool = False,
    pack: bool = False,
    seed: int | None = None,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    data_revision: str | None = None,
    special_tokens: bool = False,
    padding: bool = False,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    backend: str = "hooks",
    remote: bool | str = False,
    stream_layers: bool | None = None,
    state_gb: float | None = None,
    state_dir: str | Path | None = None,
    tensor_parallel: int | None = None,
    **model_kwargs,
) -> Activations | Store | Cache:
    """The activations of `model` on `data` with their labels: an iterable of `Batch`, one per `batch_rows` rows.

    Give `layer` (the residual stream after that block; -1 is the last) or `hook` (a module path or a TransformerLens
    name). With a list of them every item is a dict of batches by hook point, from one forward pass. `model` is a hub
    id, a folder, a loaded module with its `tokenizer`, or what `load` returned; `data` a hub id, a path, texts, or a
    `TokenStream` (which has the settings of the stream already). `column`, `split`, `config` and `data_revision` select
    from a data set, `revision` and `model_kwargs` belong to the model. Iteration ends after `tokens` valid tokens.

    `data` may also be a folder of activations, which `itda collect` or SAELens has written: they are read from there,
    at all hook points if none is given, and no model is loaded, so `model` may be None.

    Valid is no padding, no special token and not position 0, unless `special_tokens`; with `padding`, rows are filled
    to `context_length` and the filling is read like text, as the paper's code does.

    `backend`, `remote`, `stream_layers`, `state_gb`, `state_dir` and `tensor_parallel` are those of `load`. With
    `device_map="auto"` (and `max_memory`, `offload_folder`) accelerate spreads the model over GPUs, memory and disk;
    `quantization_config` quantises it, which its provenance says. (Nothing of this was run on several GPUs.)
    """
    if is_stored(data):
        return from_disk(locals(), {name: p.default for name, p in signature(activations).parameters.items()})
    if model is None:
        raise InputError("`model` is None: name a model, or give the folder of activations on disk as `data`.")
    own = signature(activations).parameters
    for name in model_kwargs:
        if near := difflib.get_close_matches(name, own, 1, 0.8):
            raise InputError(f"There is no setting `{name}`: perhaps `{near[0]}` was meant.")
    if (layer is None) == (hook is None):
        raise InputError("Pass one of `layer` (`--layer`), a number, and `hook` (`--hook`), the path of a module.")
    given: Any = hook if layer is None else layer
    if isinstance(layer, str):
        raise InputError(
            f"`layer` is the text {layer!r}; a number was wanted, as -1 or 8. A module's path goes to `hook`."
        )
    single = isinstance(given, str) or not isinstance(given, Iterable)
    hooks = [given] if single else list(given)
    batch_rows = whole("batch_rows", batch_rows, 1)
    tokens = None if tokens is None else whole("tokens", tokens, 1)
    settings: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": device}
    settings |= {"trust_remote_code": trust_remote_code, "backend": backend, "remote": remote}
    settings |= {"stream_layers": stream_layers, "state_gb": state_gb, "state_dir": state_dir}
    settings |= {"tensor_parallel": tensor_parallel}
    if isinstance(data, str | os.PathLike) and not os.path.exists(data):
        open_documents(data, column, split, data_revision, config)  # or refused, before a model is loaded
    hooked = load(model, tokenizer, hooks=hooks, **settings, **model_kwargs)
    if not isinstance(data, TokenStream):
        stream: dict[str, Any] = {"truncate": truncate, "pack": pack, "seed": seed, "column": column, "split": split}
        stream |= {"context_length": context_length, "config": config, "revision": data_revision}
        data = TokenStream(data, hooked.tokenizer, **stream)
    return Activations(
        hooked, data, batch_rows, tokens=tokens, special_tokens=special_tokens, padding=padding, single=single
    )


class Activations:
    """Made by `activations`. Iterable, again and again, of `Batch` (`single`), or of {hook point: `Batch`}."""

    def __init__(
        self,
        model: HookedModel,
        stream: TokenStream,
        batch_rows: int = 32,
        *,
        tokens: int | None = None,
        special_tokens: bool = False,
        padding: bool = False,
        single: bool = False,
    ):
        if model.max_length is not None and stream.context_length > model.max_length:
            raise InputError(
                f"`context_length` is {stream.context_length}, and `{model._layout.model}` has {model.max_length} "
                f"positions: pass {model.max_length} or fewer."
            )
        self.model, self.hook_points = model, model.hook_points
        self._stream, self._batch_rows, self._budget = stream, batch_rows, tokens
        self.skipped = 0  # valid tokens that an iteration leaves out at the beginning
        self._special_tokens, self._padding, self.single = special_tokens, padding, single
        self.hash: str = StreamHash().hexdigest()  # over the rows that the latest iteration has read so far
        self.skipped_hash: str | None = self.hash

    def __repr__(self) -> str:
        tokens = "all" if self.tokens is None else f"{self.tokens:,}"
        data = self._stream.provenance["data"] or "texts in memory"
        return f"Activations({self.model._layout.model!r} at {', '.join(self.hook_points)}, {tokens} tokens of {data})"

    @property
    def tokens(self) -> int | None:
        """How many valid tokens an iteration yields at most; None if that is as many as the data has."""
        return None if self._budget is None else max(0, self._budget - self.skipped)

    def count_tokens(self, limit: int | None = None) -> int:
        """How many valid tokens an iteration yields, or `limit` if that is fewer; runs no model."""
        limits = [n for n in (self.tokens, limit) if n is not None]
        count, rows = -self.skipped, iter(self._stream)
        while (not limits or count < min(limits)) and (row := next(rows, None)) is not None:
            count += int(valid_tokens(row, self._special_tokens).sum())
            count += self._padding * (self._stream.context_length - len(row.ids))
        return max(0, min([count, *limits]))

    def skip(self, tokens: int) -> Activations:
        """The same without the first `tokens` valid tokens; the model runs on no group of rows that lies in these.

        Their rows are still tokenised and hashed, so that the stream keeps its hash.
        """
        if tokens < 0:
            raise InputError(f"`tokens` is {tokens}, and no fewer than 0 can be skipped: pass how many were read.")
        rest = copy.copy(self)
        rest.skipped, rest.hash = self.skipped + tokens, StreamHash().hexdigest()
        rest.skipped_hash = None  # that of the rows skipped, once iteration has passed them
        return rest

    @property
    def provenance(self) -> dict:
        """Where the activations come from, as JSON can hold it; per hook point if a list of them was given.

        The stream's hash is that of the rows read so far by the latest iteration.
        """
        rest = {
            "stream": {**self._stream.provenance, "hash": self.hash},
            "batch_rows": self._batch_rows,
            "special_tokens": self._special_tokens,
            "padding": self._padding,
            "versions": _versions(),
        }
        every = {hook: {"model": self.model.provenance(hook), **rest} for hook in self.hook_points}
        return every[self.hook_points[0]] if self.single else every

    def __iter__(self) -> Iterator[Batch] | Iterator[dict[str, Batch]]:
        asked: deque[_Asked] = deque()  # a model may want more groups before it gives the first
        for read in self.model.read_all(self._groups(asked)):
            group = asked.popleft()
            self.hash = group.hash
            where = group.where
            batches = {hook: Batch(x.flatten(0, 1)[where.to(x.device)], group.labels) for hook, x in read.items()}
            yield batches[self.hook_points[0]] if self.single else batches
        for group in asked:
            self.hash = group.hash

    def _groups(self, asked: deque[_Asked]) -> Iterator[Group]:
        """The groups of rows that have tokens to yield; what becomes of their activations goes into `asked`."""
        stream_hash = StreamHash()
        rows, done = iter(self._stream), 0
        for index in itertools.count():
            if done == self._budget or not (group := list(itertools.islice(rows, self._batch_rows))):
                break
            for row in group:
                stream_hash.update(row)
            ids, mask, valid, labels = self._table(group)
            end = len(labels) if self._budget is None else min(len(labels), self._budget - done)
            start = min(max(0, self.skipped - done), end)
            done += end
            if self.skipped_hash is None and done >= self.skipped:
                self.skipped_hash = stream_hash.hexdigest()  # with the rows of the whole group, as a checkpoint has it
            if start < end:
                # The whole group runs whatever is taken of it. Row-major: row by row, as the labels.
                where = torch.from_numpy(valid.reshape(-1).nonzero()[0][start:end])
                labels = labels if end - start == len(labels) else labels[start:end]
                asked.append(_Asked(where, labels, stream_hash.hexdigest()))
                yield Group(index, torch.from_numpy(ids), torch.from_numpy(mask))
        if done < self.skipped:
            raise InputError(
                f"{self.skipped} tokens cannot be skipped, because `data` has {done}: pass what was read before."
            )
        asked.append(_Asked(torch.zeros(0), Labels.counted(0, 0), stream_hash.hexdigest()))  # rows without such tokens

    def _table(self, group: Sequence[Row]) -> tuple[ndarray, ndarray, Bool[ndarray, "rows length"], Labels]:
        """A group of rows side by side: ids, attention mask, which tokens are valid, and the labels of those.

        Rows are filled on the right, to the longest of the group; its make-up depends on the stream alone, because
        the last bits of an activation depend on the shape of what the model is given.
        """
        width = self._stream.context_length if self._padding else max(len(row.ids) for row in group)
        ids = np.full((len(group), width), self._filler(), np.int64)
        starts, ends = np.full_like(ids, -1), np.full_like(ids, -1)
        mask, valid = np.zeros_like(ids), np.full(ids.shape, self._padding)
        for i, r in enumerate(group):
            n = len(r.ids)
            valid[i, :n] = valid_tokens(r, self._special_tokens)
            ids[i, :n], starts[i, :n], ends[i, :n], mask[i, :n] = r.ids, r.starts, r.ends, 1
        if self._padding:
            mask[:] = 1  # the published code gives no mask
        row, position = valid.nonzero()
        labels = Labels(
            prompt=np.array([r.prompt for r in group], np.int64)[row],
            position=position,
            token_id=ids[row, position],
            document=np.array([r.document for r in group], np.int64)[row],
            start=starts[row, position],
            end=ends[row, position],
            row=row,
            texts=tuple(r.text for r in group),
            text_start=np.array([r.text_start for r in group], np.int64),
        )
        return ids, mask, valid, labels

    def _filler(self) -> int:
        """The id of padding: that of the tokenizer, or its EOS; 0 if the model knows neither."""
        tokenizer = self.model.tokenizer
        ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
        return next((i for i in ids if i is not None and 0 <= i < self.model._vocabulary), 0)


class _Asked(NamedTuple):
    where: torch.Tensor  # of the group's tokens, row by row, those to yield
    labels: Labels
    hash: str  # of the rows up to the end of the group


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
