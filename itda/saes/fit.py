"""The loop of a training: batches of activations in, SAEs out; the same bytes whether it was interrupted or not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda.dictionary import unfinished
from itda.errors import InputError, counted
from itda.progress import Learning
from itda.pursuit import normalize
from itda.saes.batches import Batches
from itda.saes.learner import Aim, Figures, Learner
from itda.saes.sae import SAE, standardised

FIRST = 8192  # activations that the bias and the scale are taken from
WARM_UP, MOST_WARM_UP, DECAY = 1 / 20, 1000, 1 / 5  # of the steps; in steps; of the steps
L1_WARM_UP = 1 / 10
LAST = 20  # parts of all steps, of which the last is what a batchtopk's threshold is the mean of, at most 100 steps
LR = 4e-3  # of Adam, for 2,048 latents and fewer; beyond, it falls with their root
EPSILON = 6.25e-10  # of Adam
RECENT = 0.05  # the weight of a batch in the figures that progress shows


class Fit:
    """SAEs that are trained on the same batches, one step after another; `sae` makes one of what was learned."""

    def __init__(
        self, source: Any, aims: Sequence[Aim], *, tokens: int, batch: int, buffer: int, seed: int,
        lr: float | None = None, standardise: bool = False, start: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.aims, self.seed, self.standardise, self.start = aims, seed, standardise, start or {}
        self.steps, self.batch, self.step = tokens // batch, batch, 0
        self.batches = Batches(source, batch, min(buffer, max(1, self.steps) * batch), seed)
        self.lr = lr if lr is not None else LR * min(1.0, math.sqrt(2048 / max(aim.n_atoms for aim in aims)))
        self.learners: dict[str, Learner] = {}
        self.scale = 1.0
        self.recent: dict[str, tuple[float, float, float, float]] = {}
        self.speed: float | None = None  # tokens per second, once steps were taken

    @property
    def tokens(self) -> int:
        """How many were used."""
        return self.step * self.batch

    @property
    def rounds(self) -> float:
        """How often the activations have come by; 1 where it is not known how many there are."""
        there = self.batches.tokens
        return 1.0 if there is None else round(self.tokens / (there // self.batch * self.batch), 3)

    def figures(self, kind: str) -> dict[str, float]:
        """Means over the last batches, by name."""
        return dict(zip(("loss", "fvu", "l0", "dead"), self.recent[kind], strict=True))

    def begin(self) -> None:
        """Take the bias, the scale and the first weights from the first activations."""
        x = self.batches.first(FIRST)
        self._check(x)
        x = standardised(x) if self.standardise else x
        bias = median(x) if "bias" not in self.start else self.start["bias"].to(x)
        if not self.standardise:
            self.scale = math.sqrt(x.shape[1]) / max(float((x - bias).norm(dim=1).median()), 1e-30)
        for aim in self.aims:
            atoms = first_atoms(aim.n_atoms, x.shape[1], self.seed, self.start.get("atoms")).to(x.device)
            self.learners[aim.kind] = learner = self._learner(aim, atoms, bias * self.scale)
            learner.scale_encoder(x * self.scale)
        self._optimiser()

    def _learner(self, aim: Aim, atoms: Tensor, bias: Tensor) -> Learner:
        return Learner(aim, atoms, bias, forget=min(1.0, max(0.01, LAST / max(1, self.steps))))

    def _optimiser(self) -> None:
        tensors = [tensor for learner in self.learners.values() for tensor in learner.parameters.values()]
        self.adam = torch.optim.Adam(tensors, lr=self.lr, eps=EPSILON, fused=True)

    def run(self, report: Callable[[Any], None], stop: Callable[[], bool], keep: Callable[[bool], None]) -> None:
        """Take the steps that are left; `keep(stopping)` is called after each. Raises KeyboardInterrupt if stopped."""
        began, start = time.monotonic(), self.tokens
        for x in self.batches if self.step < self.steps else ():
            self._take(x)
            now = Learning(self.tokens, self.steps * self.batch, time.monotonic() - began, start, self.recent)
            self.speed = round(now.tokens_per_second, 1)
            report(now)
            stopping = self.step < self.steps and stop()
            keep(stopping)
            if stopping:
                raise KeyboardInterrupt
            if self.step == self.steps:
                break

    def _take(self, x: Tensor) -> None:
        self._check(x)
        x = standardised(x) if self.standardise else x * self.scale
        share = min(1.0, (self.step + 1) / max(1, self.steps * L1_WARM_UP))
        variance = float((x - x.mean(0)).square().mean())
        for kind, learner in self.learners.items():
            found = learner.backward(x, share)
            if not math.isfinite(found.loss):
                raise InputError(
                    f"The loss of {kind} is {found.loss} at step {self.step + 1:,}, "
                    f"after {counted(self.tokens, 'token')}: "
                    "give a smaller `lr` (`--lr`), and another folder to start anew."
                )
            self._remember(kind, found, variance, learner)
            learner.project()
        self.adam.param_groups[0]["lr"] = self.lr * rate(self.step, self.steps)
        self.adam.step()
        for learner in self.learners.values():
            learner.fold()
        self.step += 1

    def _check(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise InputError(
                f"Activations that are not finite came at step {self.step + 1:,}, "
                f"after {counted(self.tokens, 'token')}: "
                "run the model in another `dtype` (`--dtype float32`), or give other activations."
            )

    def _remember(self, kind: str, found: Figures, variance: float, learner: Learner) -> None:
        fvu = found.error / variance if variance > 0 else math.nan
        now = (found.loss, fvu, found.l0, float(learner.dead.double().mean()))
        before = self.recent.get(kind, now)
        self.recent[kind] = tuple(b + RECENT * (n - b) for b, n in zip(before, now, strict=True))  # type: ignore[assignment]

    # -- what was learned, and what is left to do ---------------------------------------------------------------------

    def sae(self, kind: str, metadata: Mapping[str, Any]) -> SAE:
        """The SAE of a kind for activations as they are."""
        learner, aim = self.learners[kind], next(aim for aim in self.aims if aim.kind == kind)
        weights: dict[str, Any] = {name: tensor.cpu().clone() for name, tensor in learner.parameters.items()}
        for name in ("b_dec", "b_enc"):
            weights[name] = weights.get(name, torch.zeros(aim.n_atoms)) / self.scale
        weights["W_enc"] = weights.get("W_enc", weights["W_dec"]).T
        threshold = None
        if kind == "batchtopk":
            threshold = torch.full((aim.n_atoms,), (learner.threshold or 0.0) / self.scale)
        weights["normalize"] = "layer_norm" if self.standardise else "none"
        return SAE(kind, **weights, k=aim.k, threshold=threshold, metadata=metadata)

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Write its state to the file `path`."""
        tensors, state = {}, {"step": self.step, "scale": self.scale, "batches": self.batches.state()}
        for kind, learner in self.learners.items():
            state[kind] = learner.state() | {"recent": self.recent.get(kind)}
            tensors[f"{kind}.idle"] = learner.idle
            for name, tensor in learner.parameters.items():
                kept = self.adam.state[tensor]
                tensors |= {f"{kind}.{name}": tensor, **{f"{kind}.{name}.{m}": kept[m] for m in MOMENTS if m in kept}}
        unfinished.save(path, tensors, state, identity)

    def restore(self, path: Path, identity: Mapping[str, Any]) -> bool:
        """Go on from the state in the file `path`, if there is one; False if there is none."""
        found = unfinished.load(path, identity)
        if found is None:
            return False
        tensors, state = found
        try:
            self._fill(tensors, state)
        except InputError:  # what is read now is not what was read then
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise unfinished.unreadable(path, error) from error
        return True

    def _fill(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.step, self.scale = int(state["step"]), float(state["scale"])
        self.batches.restore(state["batches"])
        device = self.batches.first(1).device if self.step < self.steps else "cpu"
        for aim in self.aims:
            learner = self._learner(aim, *(tensors[f"{aim.kind}.{name}"].to(device) for name in ("W_dec", "b_dec")))
            for name, tensor in learner.parameters.items():
                tensor.copy_(tensors[f"{aim.kind}.{name}"])
            learner.idle.copy_(tensors[f"{aim.kind}.idle"])
            said = state[aim.kind]
            for name in learner.state():
                setattr(learner, name, said[name])
            if said["recent"]:
                self.recent[aim.kind] = tuple(said["recent"])
            self.learners[aim.kind] = learner
        self._optimiser()
        if self.step:
            for kind, learner in self.learners.items():
                for name, tensor in learner.parameters.items():
                    kept = {m: tensors[f"{kind}.{name}.{m}"] for m in MOMENTS}
                    self.adam.state[tensor] = {
                        m: t.to(tensor.device if m != "step" else "cpu") for m, t in kept.items()
                    }


MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of each tensor


def rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: it rises at first and falls to zero over the last fifth."""
    warm = min(MOST_WARM_UP, max(1, round(steps * WARM_UP)))
    return min(1.0, (step + 1) / warm, (steps - step) / max(1.0, steps * DECAY))


def median(x: Float[Tensor, "tokens d"], rounds: int = 20) -> Float[Tensor, " d"]:
    """The geometric median, by Weiszfeld's rounds: massive tokens hardly move it."""
    found = x.mean(0)
    for _ in range(rounds):
        weights = 1 / (x - found).norm(dim=1).clamp(min=1e-12)
        found = (weights[:, None] * x).sum(0) / weights.sum()
    return found


def first_atoms(n: int, d: int, seed: int, given: Tensor | None = None) -> Float[Tensor, "n d"]:
    """Random directions of length one, in the place of the first of them those that are given."""
    atoms = normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))
    if given is not None:
        atoms[: len(given)] = given[:n].to(atoms)
    return atoms
