"""A model larger than memory, block by block: each is loaded once, all rows go through it, and it is freed.

The forward pass is the model's own code, once for each block: the other blocks are skipped, and the input of the one
that is there is replaced with the states that came out of the one before it. So masks, positions and whatever else a
family computes around its blocks are those of a whole model, and the activations are the same to the last bit.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itda.errors import InputError, shortened
from itda.locks import locked
from itda.models.fingerprint import fingerprint, sample_of
from itda.models.hidden_states import States
from itda.models.hollow import before_blocks, hollow
from itda.models.hooked_model import Group, HookedModel, Stop, rows_of
from itda.models.pretrained import PLACED, Survey
from itda.models.weights import Weights
from itda.progress import Step


class StreamedModel(HookedModel):
    """A `HookedModel` of which one block at a time is in memory (and the next, which loads meanwhile).

    Made by `itda.load_model(..., stream_layers=True)`. `read_all` keeps the hidden states of as many groups of rows as
    fit into `state_gb` (10^9 bytes; half of the free disk if None) in files in `folder`, takes them through all
    blocks, and goes on with the next groups: the weights are read once for each such lot of rows. With a `folder` of
    one's own, a reading that was interrupted goes on after the last block that was finished.

    Hook points must be blocks, or lie in one. The weights come from the checkpoint's safetensors as they are. Raises
    `InputError` for models that pass more than one state from block to block.
    """

    def __init__(
        self,
        survey: Survey,
        hooks: Sequence[int | str],
        tokenizer: Any,
        *,
        device: torch.device,
        state_gb: float | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if state_gb is not None and not state_gb > 0:
            raise InputError(f"`state_gb` is {shortened(state_gb)}: pass a number of gigabytes above 0.")
        if placed := [name for name in PLACED if name in survey.kwargs]:
            name = placed[0]
            raise InputError(f"`{name}` says where weights are kept: drop it, or pass `stream_layers=False`.")
        if survey.skeleton is None:
            raise InputError(
                f"`{survey.model}` cannot be streamed (it cannot be built without weights): read it whole "
                "(`--no-stream-layers`)."
            )
        self._survey, self.tokenizer, self.device = survey, survey.tokenizer(tokenizer), device
        self._layout, self.n_layers, self._missing = survey.layout, survey.layout.n_layers, frozenset()
        self._state_gb, self._folder = state_gb, folder
        self.stop: Callable[[], bool] = bool  # asked after every group; a reading that is stopped goes on later
        self.report: Callable[[Step | None], None] = lambda step: None
        self._is_causal, self._origin = False, survey.origin
        self._inside = self._by_block([self._layout.path(hook) for hook in hooks])
        self._paths: dict[str, Any] = dict.fromkeys(path for paths in self._inside.values() for path in paths)
        self._last = max(self._inside)
        parts = set(survey.skeleton.get_submodule(self._own(0)).state_dict())
        self._weights = Weights(survey.model, self._layout.blocks, parts, survey.fetch)
        self._samples: dict[str, bytes] = {}  # of the parameters read so far, by name
        self._output: tuple[Any, ...] = ()  # what the block that runs put out
        self._tuple: int | None = None  # how many items the output of a block has, if it is a tuple
        self.module = self._base = self._runner()
        self._vocabulary = self._base.get_input_embeddings().weight.shape[0]
        self.dtype = next(p.dtype for p in self._base.parameters() if not p.is_meta and p.is_floating_point())
        self.d = {self._layout.name(path): width for path, width in self._widths().items()}
        self.hook_points = tuple(self.d)

    def at(self, hooks: Iterable[int | str], tokenizer: Any) -> StreamedModel:
        """The same model, to be streamed to other hook points."""
        return StreamedModel(
            self._survey.again(),
            list(hooks),
            tokenizer,
            device=self.device,
            state_gb=self._state_gb,
            folder=self._folder,
        )

    def _by_block(self, paths: list[str]) -> dict[int, list[str]]:
        """The hook points in each block, blocks in order."""
        blocks = [self._layout.layer(path) for path in paths]
        out: dict[int, list[str]] = {}
        for block, path in sorted(zip(blocks, paths, strict=True), key=lambda pair: -1 if pair[0] is None else pair[0]):
            if block is None:
                raise InputError(
                    f"`{self._layout.name(path)}` is in no block of `{self._layout.model}`, and a model that is "
                    "streamed is read in its blocks: name another hook point, or read it whole "
                    "(`--no-stream-layers`)."
                )
            if path not in out.setdefault(block, []):
                out[block].append(path)
        return out

    # -- the model around its blocks ----------------------------------------------------------------------------------

    def _runner(self) -> Any:
        """The base model with what runs before its first block, and blocks without weights, which are skipped."""
        skeleton = self._survey.skeleton
        before = before_blocks(skeleton, self._layout)
        names = {name for name, _ in skeleton.named_parameters() if name.rpartition(".")[0] in before}
        self._around = names
        runner, missing = self._survey.part(lambda path: path in before, self._weights.outside(names))
        self._check_there(missing & names)
        for name in names:
            self._samples[name] = sample_of(name, runner.get_parameter(name))
        runner = runner.to(self.device)
        blocks = skeleton.get_submodule(self._layout.blocks)
        for block in blocks:
            block.forward = self._skip
        runner.set_submodule(self._layout.blocks, blocks)
        return runner

    def _skip(self, *args: Any, **kwargs: Any) -> Any:
        """In place of a block: its input, in the form of an output."""
        x = args[0] if args else kwargs["hidden_states"]
        if self._output:  # it is the next block, and asked for a check
            first, *others = self._output
            if not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (x, first))):  # NaN too is as it was
                raise self._cannot("it changes its states between its blocks")
            if any(given is other for given in (*args, *kwargs.values()) for other in others if other is not None):
                raise self._cannot("its blocks hand on more than one state")
            raise Stop
        return x if self._tuple is None else (x, *[None] * (self._tuple - 1))

    def _load(self, number: int, tensors: dict[str, Tensor]) -> nn.Module:
        """A block with its weights, on the device."""
        path = f"{self._layout.blocks}.{number}"
        part, missing = self._survey.part(lambda name: f"{name}.".startswith(path + "."), tensors)
        block = part.get_submodule(path)
        names = [name for name, _ in block.named_parameters(prefix=path)]
        self._check_there(missing & set(names))
        self._samples |= {name: sample_of(name, part.get_parameter(name)) for name in names}
        return block.to(self.device)

    def _widths(self) -> dict[str, int]:
        """The width at each hook point, in the order in which they are reached."""
        config, out = self._base.config.get_text_config(), {}
        for number, paths in self._inside.items():
            if paths == [self._own(number)]:
                out[paths[0]] = config.hidden_size
                continue
            if number:
                self._try_block(0)  # which says what form the outputs of blocks have
            found = self._try_block(number)
            if unreached := set(paths) - set(found):
                raise self._never_called(min(unreached))
            out |= {path: found[path].shape[-1] for path in found if path in paths}
        self._paths = dict.fromkeys(out)
        return out

    def _try_block(self, number: int) -> dict[str, Tensor]:
        """What `_run` finds in a block whose weights are zeros."""
        block = copy.deepcopy(self._base.get_submodule(self._own(number)))
        del block.forward
        hollow(block, self.dtype)
        group = Group(0, torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
        with self._placed(number, block.to(self.device)):
            return self._run(number, group, None, check=False)

    def _readable(self) -> None:
        """Not tried: its blocks are not there."""

    # -- what it says of itself ---------------------------------------------------------------------------------------

    def _fingerprint(self, path: str) -> str | None:  # type: ignore[override]
        """That of the whole model, once the blocks up to `path` have been read; None before."""
        upto = self._layout.layer(path) or 0
        blocks = {name: self._layout.layer(name) for name in self._samples}
        there = {block for block in blocks.values() if block is not None}
        if not there.issuperset(range(upto + 1)):
            return None
        return fingerprint({n: self._samples[n] for n, block in blocks.items() if block is None or block <= upto})

    @property
    def bytes_read(self) -> int:
        """How many bytes of weights were read."""
        return self._weights.bytes_read

    # -- reading ------------------------------------------------------------------------------------------------------

    def _forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        name = self._layout.name
        read = next(self.read_all([Group(0, ids, mask)]))
        return {path: read[name(path)] for path in self._paths}

    def read_all(self, groups: Iterable[Group]) -> Iterator[dict[str, Tensor]]:
        """As `HookedModel.read_all`; the first group comes after all blocks have been through."""
        own = tempfile.TemporaryDirectory(prefix="itda-") if self._folder is None else nullcontext(self._folder)
        with own as folder, locked(Path(folder), "keeping hidden states in"):  # also where trainings share it
            states = States(folder, self._identity())
            try:
                checked = (Group(group.index, *self._checked(group.ids, group.mask)) for group in groups)
                for number, lot in enumerate(self._lots(checked, states)):
                    yield from self._read_lot(number, lot, states)
                    states.block = -1
            finally:
                states.close()

    def _identity(self) -> list[Any]:
        """What a state is a function of, besides the tokens."""
        here = Path(self._survey.model).is_dir()
        return [
            *(self._survey.model, getattr(self._survey.config, "_commit_hash", None)),
            *(torch.__version__, version("transformers")),  # on which the last bits depend, as on the processor
            *(self._survey.config.to_json_string(), str(self.dtype), self.processor, list(self._paths)),
            sorted((name, str(value)) for name, value in self._survey.kwargs.items()),
            self._weights.stamps(range(self._last + 1), self._around) if here else [],
        ]

    def _lots(self, groups: Iterator[Group], states: States) -> Iterator[list[Group]]:
        """The groups that go through the blocks together: those that there are states of, or as many as fit."""
        ahead = deque[Group]()  # taken from `groups`, and in no lot yet

        def take() -> Group | None:
            return ahead.popleft() if ahead else next(groups, None)

        while (first := take()) is not None:
            ahead.appendleft(first)
            if states.block >= 0:
                lot = list(islice(iter(take, None), sum(index >= first.index for index, _, _ in states.groups)))
                if self._goes_on(states) and states.holds(lot, self._kept(states.block)):
                    self._tuple = states.notes["tuple"]
                    self._samples |= {name: bytes.fromhex(sample) for name, sample in states.notes["samples"].items()}
                    yield lot
                    continue
                ahead.extendleft(reversed(lot))
            lot, room, width = [], self._room(states.folder), self._state_bytes()
            while (group := take()) is not None and (not lot or room >= width * group.ids.numel()):
                lot.append(group)
                room -= width * group.ids.numel()
            if group is not None:
                ahead.appendleft(group)
            states.begin(lot)
            yield lot

    def _state_bytes(self) -> int:
        """What the states of a token take: two hidden ones, and what is kept of the hook points of lower blocks."""
        hidden = self._base.config.get_text_config().hidden_size
        return (hidden + sum(self._kept(self._last - 1).values())) * self.dtype.itemsize

    def _goes_on(self, states: States) -> bool:
        """Whether there is a block after those that are finished, and the weights of these were taken down."""
        blocks = {self._layout.layer(name) for name in states.notes["samples"]}
        return states.block < self._last and blocks.issuperset(range(states.block + 1))

    def _kept(self, block: int) -> dict[str, int]:
        """The states that are needed after a block, with their widths."""
        numbers = [number for number, path in enumerate(self._paths) if (self._layout.layer(path) or 0) <= block]
        widths = list(self.d.values())
        kept = {f"kept-{number}": widths[number] for number in numbers}
        return kept | {f"hidden-{block % 2}": self._base.config.get_text_config().hidden_size}

    def _room(self, folder: Path) -> float:
        return 1e9 * self._state_gb if self._state_gb is not None else 0.5 * shutil.disk_usage(folder).free

    def _read_lot(self, number: int, lot: list[Group], states: States) -> Iterator[dict[str, Tensor]]:
        """Take some groups through the blocks that they have not been through; what the last block makes of each."""
        began, start = time.monotonic(), states.block + 1
        what = f"lot {number + 1}, block" if number else "block"
        kept = {path: f"kept-{i}" for i, path in enumerate(self._paths) if self._layout.layer(path) != self._last}
        with ThreadPoolExecutor(1, "itda-weights") as thread:  # which waits for what is being read when it is left
            loading = thread.submit(self._weights.block, start)
            for block in range(start, self._last + 1):
                tensors = loading.result()
                if block < self._last:
                    loading = thread.submit(self._weights.block, block + 1)
                with self._placed(block, self._load(block, tensors)):
                    del tensors
                    for done, group in enumerate(lot):
                        x = None if not block else states.get(f"hidden-{(block - 1) % 2}", group)
                        found = self._run(block, group, x, check=not done)
                        if block == self._last:
                            more = {path: states.get(name, group) for path, name in kept.items()}
                            yield {self._layout.name(path): (more | found)[path] for path in self._paths}
                        else:
                            states.put(f"hidden-{block % 2}", group, found[self._own(block)])
                            for path in self._inside.get(block, ()):
                                states.put(kept[path], group, found[path])
                            self._say(f"{what} {block + 1} of {self._last + 1}", done + 1, len(lot), began)
                if block < self._last:
                    samples = {name: sample.hex() for name, sample in self._samples.items()}
                    states.notes = {"tuple": self._tuple, "samples": samples}
                    states.finish(block)

    def _say(self, what: str, done: int, total: int, began: float) -> None:
        self.report(Step(what, done, total, time.monotonic() - began))
        if self.stop():
            raise KeyboardInterrupt

    def _own(self, block: int) -> str:
        return f"{self._layout.blocks}.{block}"

    @contextmanager
    def _placed(self, number: int, block: nn.Module) -> Iterator[None]:
        """A block in its place in the model, and nothing in it afterwards."""
        blocks = self._base.get_submodule(self._layout.blocks)
        hollow, blocks[number] = blocks[number], block
        try:
            yield
        finally:
            blocks[number] = hollow

    def _run(self, number: int, group: Group, x: Tensor | None, check: bool) -> dict[str, Tensor]:
        """The outputs of a block and of the hook points in it, by path; `x` is what it is given, the embedding if None.

        With `check`, that the next block would be given what this one put out, and nothing besides.
        """
        own, found = self._own(number), dict[str, Tensor]()
        self._output = ()

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if x is None:
                return None
            there = args[0] if args else kwargs["hidden_states"]
            mine = x.to(self.device).view_as(there)
            return ((mine, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mine})

        def reader(path: str, output: Any) -> None:
            if path in found:  # when called again, the first output counts
                return
            out = rows_of(output, *group.ids.shape)
            if out is None:
                raise self._no_vectors(path)
            found[path] = out if path == own else out.clone()  # later modules may write into it
            if path == own:
                self._output = tuple(output) if isinstance(output, tuple | list) else (output,)
                self._tuple = len(output) if isinstance(output, tuple | list) else None
                if not check or number + 1 == self.n_layers:
                    raise Stop

        block = self._base.get_submodule(own)
        handle = block.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with self._hooked({*self._inside.get(number, ()), own}, reader), suppress(Stop):
                self._base(
                    input_ids=group.ids.to(self.device),
                    attention_mask=group.mask.to(self.device),
                    **self._taken_by(self._base),
                )
                raise self._cannot("its blocks do not follow one another")
        finally:
            handle.remove()
        return found

    def _cannot(self, why: str) -> InputError:
        return InputError(f"`{self._layout.model}` cannot be streamed ({why}): read it whole (`--no-stream-layers`).")
