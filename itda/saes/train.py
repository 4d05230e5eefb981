"""SAEs from names to folders: everything that `itda sae` does is `train_sae`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from itda._version import __version__
from itda.arguments import PATH, checks, places_of
from itda.dictionary.itda import ITDA
from itda.disk import bytes_of, checked_path, leftover_of
from itda.errors import InputError, Interrupted, counted, shortened
from itda.locks import locked
from itda.progress import Step, reporter, tell
from itda.provenance import identity, section
from itda.reading.activations import activations
from itda.reading.on_disk import is_stored
from itda.results import Report
from itda.saes import folder
from itda.saes.fit import Fit
from itda.saes.learner import Aim
from itda.saes.sae import KINDS
from itda.settings import pick, takes, verbs

TRAINED = tuple(kind for kind in KINDS if kind != "jumprelu")  # batchtopk becomes one
WITH_K, AFA = ("topk", "batchtopk", "mp"), 1 / 16
DEAD_AFTER = 10_000_000  # tokens; a tenth of the training where that is fewer


@dataclass(frozen=True)
class TrainedSAE(Report):
    """One SAE that `train_sae` saved, and what it cost."""

    path: str  # its folder
    kind: str
    hook_point: str
    n_atoms: int
    k: int | None
    tokens: int  # that it was trained on, again and again where there were fewer
    rounds: float  # how often the activations came by
    loss: float  # of the last batches, as what follows, before each changed the weights
    fvu: float
    l0: float
    dead: float  # share of latents
    seconds: float  # of this call, for all kinds together
    tokens_per_second: float | None  # reading and training, of all kinds together; None if nothing was left to do

    def __str__(self) -> str:
        speed = f", {self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""
        k = f", k = {self.k}" if self.k is not None else ""
        again = f" ({self.rounds:.1f} rounds)" if self.rounds > 1 else ""
        return (
            f"{self.path}: {self.kind}, {counted(self.n_atoms, 'latent')}{k}, at {self.hook_point}, "
            f"of {counted(self.tokens, 'token')}"
            f"{again}; of the last batches: FVU {self.fvu:.4f}, L0 {self.l0:.1f}, {self.dead:.1%} of the latents dead; "
            f"{self.seconds:.1f} s{speed}"
        )


@takes(verbs.TRAIN_SAE)
@checks(out=PATH)
def train_sae(model: Any, data: Any, out: str | os.PathLike, **settings: Unpack[verbs.TrainSAE]) -> list[TrainedSAE]:
    """Train SAEs of `model` on `data` and save them as folders that SAELens loads; goes on from where it was stopped.

    model, data   as for `itda.activations`; activations on disk (`itda collect`) are read without the model
    kind          one or several of "topk", "batchtopk", "relu", "top-afa", "mp", trained on the same batches. With one,
                  `out` is its folder; with several, `out` holds one folder for each, of its name
    k             latents of each token: of topk and mp so many, of batchtopk in the mean; a relu that has no `l1` is
                  steered towards a mean of k
    afa           of top-afa, the weight of (|f| - |x - b_dec|)^2; 1/16 if not given
    tokens        to train on; where `data` has fewer, it comes again, in another order
    from_itda     an ITDA or its folder, whose atoms are the first latents; further ones are random directions

    The learning rate rises over a twentieth of the steps and falls over the last fifth. Inputs are scaled so that the
    median of |x - b_dec| is sqrt(d), and the scale is folded into the weights that are saved. With the same number of
    threads the same call gives the same bytes, interrupted or not.

    Raises `InputError` for settings that do not fit one another, for what cannot be read or written, for SAEs that are
    there already unless `overwrite`, and `Interrupted` when `stop` said so.
    """
    given: dict[str, Any] = dict(settings)
    kinds = _kinds(given)
    aims = [_aim(kind, given) for kind in kinds]
    if given["tokens"] < given["batch"]:
        raise InputError(
            f"`tokens` is {given['tokens']:,}, fewer than the {given['batch']:,} of one batch: give more, or a smaller "
            "`batch` (`--batch`)."
        )
    if not places_of(given["layer"], given["hook"])[1]:
        raise InputError("SAEs are trained at one hook point at a time: give one `layer` or `hook`, and no list.")
    start = _start(given["from_itda"])
    began, shown = time.monotonic(), Path(out)
    target = folder.target_of(checked_path(out))
    folders = {kind: target if len(kinds) == 1 else target / kind for kind in kinds}
    _check_targets(target, folders, given["overwrite"])  # before anything is loaded
    report = reporter(given["progress"])
    with ExitStack() as held:
        read = pick(verbs.Reading, given) | {"tokens": None}
        if is_stored(data):
            del read["seed"]  # its rows have their order
        stream = activations(model, data, **read)
        if not stream.single:
            raise InputError(f"{data} has several hook points: choose one with `layer` (`--layer`) or `hook`.")
        for each in (target, *folders.values())[len(kinds) == 1 :]:
            held.enter_context(locked(each, "training into"))
        _check_targets(target, folders, given["overwrite"])
        provenance = stream.provenance
        first = {} if start is None else _first(start, provenance, given["n_atoms"])
        how = {name: given[name] for name in ("tokens", "batch", "buffer", "seed", "lr")}
        fit = Fit(stream, aims, **how, standardise=given["normalize"] == "layer_norm", start=first)
        _run(fit, target / folder.CHECKPOINT, _identity(provenance, aims, given | {"lr": fit.lr}, start), given, report)
        for kind in kinds:
            sae = fit.sae(kind, folder.metadata(provenance))
            sae.save(folders[kind], **_about(fit, kind, given, provenance))
        (target / folder.CHECKPOINT).unlink(missing_ok=True)  # the last: one that is killed before goes on from it
    place = section(provenance, "model").get("hook_point") or ""
    return [_trained(fit, kind, shown / folders[kind].relative_to(target), place, began) for kind in kinds]


def _kinds(given: Mapping[str, Any]) -> list[str]:
    """The kinds that are asked for, each once; raises `InputError` for settings that none of them has."""
    asked = [given["kind"]] if isinstance(given["kind"], str) else list(given["kind"]) or ["topk"]
    if wrong := [kind for kind in asked if kind not in TRAINED]:
        raise InputError(f"`kind` is {shortened(wrong[0])}: choose some of {', '.join(TRAINED)}.")
    kinds = list(dict.fromkeys(asked))
    with_k = [kind for kind in kinds if kind in WITH_K]
    k, n = given["k"], given["n_atoms"]
    if with_k and k is None:
        raise InputError(f"A {with_k[0]} SAE has so many latents for each token: say how many with `k` (`--k`).")
    if k is not None and not with_k and (kinds != ["relu"] or given["l1"] is not None):
        which = "a weight `l1`" if "relu" in kinds else f"{kinds[0]}, which needs as many latents as come"
        raise InputError(f"`k` has no effect with {which}: leave it out, or train another kind.")
    if kinds == ["relu"] and k is None and given["l1"] is None:
        raise InputError("A relu SAE needs `l1` (`--l1`), the weight of its codes, or `k` (`--k`), the mean L0 wanted.")
    if k is not None and k > n:
        raise InputError(
            f"`k` is {k:,}, and there are {counted(n, 'latent')} (`n_atoms`): give a smaller `k`, or more latents."
        )
    for name, kind in (("afa", "top-afa"), ("l1", "relu")):
        if given[name] is not None and kind not in kinds:
            raise InputError(f"`{name}` is of {kind} alone, which is not asked for: leave it out, or add that kind.")
    return kinds


def _aim(kind: str, given: Mapping[str, Any]) -> Aim:
    dead = given["dead_after"] if given["dead_after"] is not None else min(DEAD_AFTER, given["tokens"] // 10)
    aim = Aim(kind, given["n_atoms"], dead, given["k"] if kind in (*WITH_K, "relu") else None)
    if kind == "top-afa":
        return replace(aim, afa=AFA if given["afa"] is None else given["afa"])
    return replace(aim, l1=given["l1"]) if kind == "relu" else aim


def _start(given: Any) -> ITDA | None:
    """The dictionary to begin with."""
    found = None if given is None else ITDA.of(given)
    if found is not None and not len(found):
        raise InputError(f"{found!r} has no atoms to begin with: give one with some.")
    if found is not None and found.scale is not None:
        raise InputError(f"{found!r} was built with `scale` = 'std', which an SAE has not: give one without.")
    return found


def _first(start: ITDA, said: Mapping[str, Any], n_atoms: int) -> dict[str, Tensor]:
    """The atoms and the bias to begin with; raises `InputError` for a dictionary of another width or place."""
    here, there = section(said, "model"), section(start.cfg, "model")
    if here.get("d") not in (None, start.d):
        raise InputError(f"{start!r} is of width {start.d}, and the activations have {here['d']}: give another one.")
    if None not in (here.get("hook_point"), there.get("hook_point")) and here["hook_point"] != there["hook_point"]:
        raise InputError(
            f"{start!r} was made for {there['hook_point']}, and this is {here['hook_point']}: give one of this place."
        )
    if len(start) > n_atoms:
        tell(f"the first {n_atoms:,} of {counted(len(start), 'atom')} are the latents to begin with")
    return {"atoms": start.atoms} | ({} if start.mean is None else {"bias": start.mean})


def _identity(
    provenance: Mapping[str, Any], aims: Sequence[Aim], given: Mapping[str, Any], start: ITDA | None
) -> dict[str, Any]:
    """What must be equal for a training to go on."""
    own = {name: given[name] for name in ("tokens", "batch", "buffer", "seed", "lr", "normalize")}
    own |= {f"{aim.kind}.{name}": value for aim in aims for name, value in asdict(aim).items()}
    own["from_itda"] = None if start is None else hashlib.sha256(bytes_of(start.atoms.cpu().contiguous())).hexdigest()
    return identity(provenance) | own


def _check_targets(target: Path, folders: Mapping[str, Path], overwrite: bool) -> None:
    """Refuse folders that hold something else, and SAEs that are there and may not be overwritten."""
    for each in folders.values():
        if each.is_dir():
            folder.check_alone(each, folder.TRAINED)
    if len(folders) > 1 and target.is_dir():
        known = {*KINDS, folder.CHECKPOINT}
        if foreign := sorted({leftover_of(name) or name for name in os.listdir(target)} - known):
            raise InputError(f"{target} holds {foreign[0]!r}, which is no SAE's folder: choose a new or empty folder.")
    there = [each for each in folders.values() if folder.is_written(each, folder.TRAINED)]
    if there and not overwrite and not (target / folder.CHECKPOINT).is_file():
        raise InputError(
            f"{there[0]} holds a trained SAE already: choose another folder, or replace it with `overwrite` "
            "(`--overwrite`)."
        )


def _run(fit: Fit, path: Path, how: Mapping[str, Any], given: Mapping[str, Any], report: Any) -> None:
    """Begin or go on, and take all steps; the state is kept in `path` now and then, when stopped, and at the end."""
    if not fit.restore(path, how):
        report(Step("reading the first activations", 0, None, 0.0))
        fit.begin()
    saved = time.monotonic()

    def keep(stopping: bool) -> None:
        nonlocal saved
        if stopping or fit.step == fit.steps or time.monotonic() - saved > given["checkpoint_seconds"]:
            fit.save(path, how)
            saved = time.monotonic()

    try:
        fit.run(report, given["stop"], keep)
    except KeyboardInterrupt:
        raise Interrupted(fit.tokens) from None
    finally:
        report(None)


def _about(fit: Fit, kind: str, given: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What cfg.json says of the making of an SAE."""
    (aim,) = (aim for aim in fit.aims if aim.kind == kind)
    named = {name: given[name] for name in ("batch", "buffer", "seed", "normalize")}
    named |= {name: value for name, value in asdict(aim).items() if name not in ("kind", "k")}
    read = {"hash": fit.batches.hash, "tokens": fit.batches.tokens}
    stream = section(provenance, "stream") | read
    came = {
        **provenance,
        "stream": stream,
        "from_itda": None if given["from_itda"] is None else str(given["from_itda"]),
    }
    return named | {
        "tokens": fit.tokens, "rounds": fit.rounds, "lr": fit.lr, "input_scale": fit.scale, "version": __version__,
        "l1": fit.learners[kind].l1 if kind == "relu" else None, "figures": fit.figures(kind), "provenance": came,
    }  # fmt: skip


def _trained(fit: Fit, kind: str, path: Path, hook: str, began: float) -> TrainedSAE:
    return TrainedSAE(
        path=str(path),
        kind=kind,
        hook_point=hook,
        n_atoms=fit.learners[kind].aim.n_atoms,
        k=fit.learners[kind].aim.k,
        tokens=fit.tokens,
        rounds=fit.rounds,
        **fit.figures(kind),
        seconds=round(time.monotonic() - began, 3),
        tokens_per_second=fit.speed,
    )
