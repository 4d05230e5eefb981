"""A model read at hook points: what stands there, in which order, from which weights, and the reading itself.

The forward pass is stopped at the last hook point that is read (`Stop`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from itda.devices import processor
from itda.errors import InputError, first_line
from itda.models import parameters
from itda.models.fingerprint import fingerprint, sample_of
from itda.models.layout import Layout
from itda.models.outputs import readable, rows_of, with_rows
from itda.text.tokenizers import tokenizer_hash


class Group(NamedTuple):
    """Rows that go through a model together."""

    index: int  # type: ignore[assignment]  # of all groups of the stream
    ids: Int[Tensor, "rows length"]
    mask: Int[Tensor, "rows length"]


KEEP = "logits_to_keep"  # what transformers calls the positions whose logits a forward pass is to compute


class HookedModel:
    """A model with the hook points at which it is read; made by `load_model`.

    `module` is left as it is: hooks and eval mode last as long as a reading. `hook_points` are canonical names, in
    the order in which a forward pass reaches them; `d` has the width of each.
    """

    _origin: Mapping[str, Any] = {}  # what else its provenance says, besides what is said of all

    def __init__(
        self,
        module: nn.Module,
        base: Any,
        tokenizer: Any,
        layout: Layout,
        hooks: Iterable[int | str],
        missing: frozenset[str] = frozenset(),
        origin: Mapping[str, Any] | None = None,  # what else its provenance says
    ):
        self.module, self.tokenizer, self.n_layers = module, tokenizer, layout.n_layers
        self._base, self._layout, self._missing = base, layout, missing
        self._origin = dict(origin or {})
        self._is_causal = False  # once it was looked at
        self._fetched: dict[str, bytes] = {}  # samples of parameters that are not simply there
        self._vocabulary = parameters.embedding(base).weight.shape[0]
        self.device = parameters.input_device(base)
        self.dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
        self._paths: dict[str, Any] = dict.fromkeys(layout.path(hook) for hook in hooks)
        here = {name for name, _ in base.named_modules()}
        for path in self._paths:
            if path not in here:
                raise InputError(
                    f"`{layout.name(path)}` lies above the part of `{layout.model}` that was loaded: "
                    "load the model again with that hook point among `hooks`."
                )
        self._try()

    def _try(self) -> None:
        """Run two rows of three tokens: are the hook points reached, in which order, and with what before them?"""
        ran: list[str] = []  # modules with parameters of their own, as they start
        before: dict[str, frozenset[str]] = {}
        watched = [(name, m) for name, m in self._base.named_modules() if m._parameters or parameters.is_packed(m)]
        handles = [m.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, m in watched]
        for path in self._paths:
            module = self._base.get_submodule(path)
            handles.append(module.register_forward_hook(lambda *_, path=path: before.update({path: frozenset(ran)})))
        ids = torch.zeros(2, 3, dtype=torch.int64)
        try:
            with self._sound():
                found = self._forward(ids, torch.ones_like(ids))
        except _NoVectors as error:  # now that no hook is left that would raise it again
            raise self._no_vectors(error.path, self._other()) from None
        finally:
            for handle in handles:
                handle.remove()
        for path in self._paths:
            if path not in found:
                raise self._never_called(path)
        self._paths = {path: self._reading(before[path]) for path in found}
        self.d = {self._layout.name(path): x.shape[-1] for path, x in found.items()}
        self.hook_points = tuple(self.d)
        self._check_there(self._missing & set().union(*self._paths.values()))

    def _check_there(self, missing: Iterable[str]) -> None:
        """Raise `InputError` if any of the weights that are read are `missing` in the checkpoint."""
        if lost := sorted(missing):
            raise InputError(
                f"`{self._layout.model}` lacks {len(lost)} of the weights that are read (`{lost[0]}` for one): "
                "its config and its weights do not belong together, so download or save it again."
            )

    def _reading(self, ran: frozenset[str]) -> list[str]:
        """The parameters that decide an activation: of the modules that `ran` before it, and of all their blocks."""
        blocks = {self._layout.layer(name) for name in ran} - {None}
        names = parameters.stored(self._base)
        idle = parameters.idle(self._base)
        return [n for n in names if n not in idle and (n.rpartition(".")[0] in ran or self._layout.layer(n) in blocks)]

    def at(self, hooks: Iterable[int | str], tokenizer: Any) -> HookedModel:
        """The same model, to be read at other hook points."""
        return HookedModel(self.module, self._base, tokenizer, self._layout, hooks, self._missing, self._origin)

    def canonical(self, hook: int | str) -> str:
        """The name that `hook` (a layer, a path, a TransformerLens name) has here; `InputError` if none has it."""
        return self._layout.name(self._layout.path(hook))

    @property
    def processor(self) -> str | None:
        """The kind of processor that activations are read on, where that is known (`devices.processor`)."""
        return processor(self.device)

    def provenance(self, hook: int | str) -> dict:
        """What an activation at `hook` comes from, as JSON can hold it."""
        path = self._layout.path(hook)
        if path not in self._paths:
            raise InputError(f"`{hook}` is not read here: pass one of {', '.join(self.hook_points)}.")
        name = self._layout.name(path)
        method = parameters.quantised(self._base)
        return {
            "id": self._layout.model,
            "revision": getattr(self._base.config, "_commit_hash", None),
            "fingerprint": self._fingerprint(path),
            "hook_point": name,
            "layer": self._layout.layer(path),
            "d": self.d[name],
            "dtype": str(self.dtype).removeprefix("torch."),
            "model_type": self._layout.model_type,
            "tokenizer_hash": self._tokenizer_hash,
            **({"quantization": method} if method else {}),  # the activations are not those of the checkpoint's weights
            **self._origin,
        }

    @cached_property
    def _tokenizer_hash(self) -> str:
        return tokenizer_hash(self.tokenizer)

    def _fingerprint(self, path: str) -> str:
        """sha256 over the parameters that the activations at `path` depend on: name, shape, and a sample in bfloat16.

        Whole blocks count, and nothing after them; so it is one for a model cut or whole, with its head or without,
        in float32 or in the half precision of its checkpoint. (A float32 checkpoint read in float16 is rounded.)
        """
        names = self._paths[path]
        samples = {name: self._sample(name) for name in names} | parameters.unpacked_with(self._base, names)
        return fingerprint(samples | parameters.scales(self._base, names))

    def _sample(self, name: str) -> bytes:
        """`sample_of` a parameter, kept where its values have to be fetched from disk, or unpacked."""
        sample = self._fetched.get(name)
        if sample is None:
            with parameters.present(self._base, name) as values:
                sample = sample_of(name, values)
            if not parameters.is_there(self._base, name):
                self._fetched[name] = sample
        return sample

    @property
    def max_length(self) -> int | None:
        """The longest row that the model has positions for; None where there is no limit."""
        limits = [getattr(self._base.config.get_text_config(), "max_position_embeddings", None)]
        for name, module in self._base.named_modules():  # RoBERTa's tables begin with places that no token takes
            if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
                limits.append(module.num_embeddings - module.padding_idx - 1)
        return min((limit for limit in limits if limit is not None and limit > 0), default=None)

    def read(
        self, ids: Int[Tensor, "rows length"] | Int[ndarray, "rows length"], mask: Any
    ) -> dict[str, Float[Tensor, "rows length d"]]:
        """The activations at every hook point, by canonical name. `mask` (rows, length) is 0 at padding.

        The forward pass stops at the last hook point; nothing is kept for gradients.
        """
        ids, mask = self._checked(ids, mask)
        return {self._layout.name(path): x for path, x in self._forward(ids, mask).items()}

    def read_all(self, groups: Iterable[Group]) -> Iterator[dict[str, Tensor]]:
        """What `read` gives of group after group, in their order."""
        return (self.read(group.ids, group.mask) for group in groups)

    def logits(
        self,
        ids: Int[Tensor, "rows length"] | Int[ndarray, "rows length"],
        mask: Any,
        replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        places: Int[Tensor, " places"] | None = None,
    ) -> Float[Tensor, "rows _ vocabulary"]:
        """The logits of the language model, (rows, length, vocabulary), run as it is or with other activations in it.

        `replace` has by hook point a function of the activations there (rows, length, d) whose result, of the same
        shape, the model goes on with. With `places`, the logits are of these positions of every row, and no others are
        computed where the model can be told so. Raises `InputError` for a model without a language modelling head, and
        for one that sees the tokens it is to predict.
        """
        ids, mask = self._checked(ids, mask)
        self._check_causal()
        found = {self._layout.path(hook): function for hook, function in (replace or {}).items()}
        if places is None:
            return self._logits(ids, mask, found)
        if type(self)._logits is HookedModel._logits and KEEP in inspect.signature(self.module.forward).parameters:
            return self._language_model(ids, mask, found, **{KEEP: places.to(self.device)})
        found_all = self._logits(ids, mask, found)
        return found_all[:, places.to(found_all.device)]

    @property
    def vocabulary(self) -> int:
        """How many tokens there are embeddings of, and logits at each place."""
        return self._vocabulary

    @property
    def predicts(self) -> bool:
        """Whether this is a language model with its head, so that it has `logits`."""
        return self.no_logits is None

    @property
    def no_logits(self) -> str | None:
        """Why it is no language model with its head, in a few words; None where it is."""
        try:
            self._check_causal()
        except InputError as error:
            return str(error).rpartition(": ")[0]
        return None

    def _check_causal(self) -> None:
        """Once: that there is a head, and that no token knows what comes after it."""
        if self._is_causal:
            return
        head = getattr(self.module, "get_output_embeddings", lambda: None)()
        if head is None:
            raise InputError(
                f"`{self._layout.model}` is read without a language modelling head, so it predicts nothing: pass a "
                "causal language model (`AutoModelForCausalLM`)."
            )
        ids = torch.zeros(2, min(8, self.max_length or 8), dtype=torch.int64)  # rows that share their first token
        ids[1, 1:] = self._vocabulary - 1
        first, second = self._logits(ids, torch.ones_like(ids), {})
        moved = (first.float() - second.float()).abs().amax(-1)
        if moved[0] > max(1e-3, 2 * torch.finfo(first.dtype).eps) * moved[1:].max():
            raise InputError(
                f"`{self._layout.model}` sees the tokens that it is to predict (it is an encoder): its cross-entropy "
                "says nothing; pass a causal language model."
            )
        self._is_causal = True

    def _logits(self, ids: Tensor, mask: Tensor, replace: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        return self._language_model(ids, mask, replace)

    def _language_model(self, ids: Tensor, mask: Tensor, replace: Mapping[str, Any], **more: Any) -> Tensor:
        mine, reached = threading.get_ident(), set()

        def replacer(path: str, output: Any) -> Any:
            if path in reached or threading.get_ident() != mine:  # when called again, the first output counts
                return None
            reached.add(path)
            x = rows_of(output, *ids.shape)
            assert x is not None, "a hook point was tried when the model was loaded"
            return with_rows(output, replace[path](x))

        with self._hooked(replace, replacer):
            more |= self._taken_by(self.module)
            out = self.module(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **more)
        assert reached == set(replace), "a hook point was not reached"
        return out.logits

    def _checked(self, ids: Any, mask: Any) -> tuple[Tensor, Tensor]:
        """Ids and mask as int64 tensors (rows, length), or an `InputError`."""
        ids, mask = torch.as_tensor(ids).long(), torch.as_tensor(mask)
        if ids.ndim != 2 or mask.shape != ids.shape or not ids.numel():
            raise InputError(
                f"`ids` has shape {tuple(ids.shape)} and `mask` {tuple(mask.shape)}: "
                "pass two of one shape (rows, length), 1 or more of each."
            )
        wrong = ids[(ids < 0) | (ids >= self._vocabulary)]
        if len(wrong):
            raise InputError(
                f"Token id {int(wrong[0])} came, and `{self._layout.model}` has {self._vocabulary} token embeddings: "
                "pass the tokenizer that belongs to the model."
            )
        return ids, mask.long()

    def _forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`read` by path, of the hook points that are reached."""
        found: dict[str, Tensor] = {}
        mine = threading.get_ident()  # another thread may use the model meanwhile

        def reader(path: str, output: Any) -> None:
            if path in found or threading.get_ident() != mine:  # when called again, the first output counts
                return
            x = rows_of(output, *ids.shape)
            if x is None:
                raise self._no_vectors(path)
            last = len(found) + 1 == len(self._paths)
            found[path] = x if last else x.clone()  # later modules may write into it
            if last:
                raise Stop

        with self._hooked(self._paths, reader), suppress(Stop):
            self._base(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **self._taken_by(self._base))
        return found

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """What a model's own code raises on a row of text becomes a sentence."""
        try:
            yield
        except (InputError, torch.OutOfMemoryError):
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise InputError(
                f"A forward pass of `{self._layout.model}` on text alone ends with an error ({type(e).__name__}: "
                f"{first_line(e)}): pass a model that reads text, such as the language model in it."
            ) from e

    def _never_called(self, path: str) -> InputError:
        return InputError(
            f"A forward pass of `{self._layout.model}` never calls `{self._layout.name(path)}`: {self._other()}"
        )

    def _no_vectors(
        self, path: str, advice: str = "choose another hook point (`itda hooks` lists them)."
    ) -> InputError:
        name = self._layout.name(path)
        return _NoVectors(f"The output of `{name}` is not one vector per token: {advice}", path)

    def _other(self) -> str:
        """Advice for who named a module that cannot be read; one that it names was tried."""
        if (found := self._readable()) is None:
            return "choose another hook point (`itda hooks` lists them)."
        blocks = [path for path in found if self._layout.blocks and path.rpartition(".")[0] == self._layout.blocks]
        inside = sorted((p for p in found if self._layout.layer(p) is not None), key=lambda path: path.count("."))
        if named := (blocks or inside or found):
            return f"choose another hook point, such as `{self._layout.name(named[0])}`."
        return f"no module of `{self._layout.model}` puts out such vectors, so choose another model."

    def _readable(self) -> list[str] | None:
        """The paths that can be read, tried; None for a model that cannot be run by itself."""
        with self._hooked((), lambda path, output: None):  # eval mode
            return readable(self._base, self.device)

    @contextmanager
    def _hooked(self, paths: Iterable[str], function: Callable[[str, Any], Any]) -> Iterator[None]:
        """Call `function` with path and output of each of the modules `paths`; eval mode, nothing for gradients."""
        training = [module for module in self.module.modules() if module.training]
        handles = []
        try:
            for module in training:
                module.training = False
            for path in paths:
                hook = self._base.get_submodule(path)
                handles.append(hook.register_forward_hook(lambda m, args, output, path=path: function(path, output)))
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for module in training:
                module.training = True

    @staticmethod
    def _taken_by(module: Any) -> dict[str, bool]:
        """What a forward pass need not compute, as far as `module` can be told so."""
        taken = inspect.signature(module.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        options = ("use_cache", "output_attentions", "output_hidden_states")
        return {name: False for name in options if takes_any or name in taken}


class _NoVectors(InputError):
    """The output of the module at `path` is not one vector per token."""

    def __init__(self, said: str, path: str) -> None:
        super().__init__(said)
        self.path = path

    def __reduce__(self) -> tuple:
        return _NoVectors, (str(self), self.path)  # as one of another process


class Stop(BaseException):
    """Ends a forward pass; no `except Exception` in a model's code may catch it."""
