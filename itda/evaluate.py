"""How good is a dictionary: reconstruction, cross-entropy and use on held-out text, beside what chance would give."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from itda import drawing, heldout, hooks, stored
from itda import probing as probes
from itda._version import __version__
from itda.aligned import named
from itda.build import build
from itda.disk import bytes_of, write_file
from itda.errors import InputError, check_whole
from itda.folder import EVAL
from itda.layers import groups_of
from itda.metrics import ce_score, coherence, cosine
from itda.model import ITDA
from itda.progress import Step, reporter
from itda.prompts import hash_rows
from itda.pursuit import normalize
from itda.report import Report, finite, hooked_for
from itda.report import load as load_dictionary
from itda.splice import Spliced, spliced
from itda.systems import System

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

TAILS = {"50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999}
DRAWS = 1000  # of the bootstrap over documents
CHUNK = 4096
TOKENS, CE_TOKENS = 50_000, 10_000
RESERVED = ("itda", "random tokens", "gaussian", "untrained model", "clean", "zero", "mean", "activations")
CONTROLS = ("random tokens", "gaussian", "untrained model")
ASKED = ("tokens", "ce_tokens", "probe", "probe_column", "probe_label", "in_sample", "force", "seed")
NO_MODEL = "activations on disk have no model to run"
NONE_ASKED = "it was asked for on 0 tokens (`ce_tokens`)"


@dataclass(frozen=True, repr=False)
class Evaluation(Report):
    """What was measured of a dictionary and of its controls, in one table; made by `evaluate`.

    `systems` are dicts by system, the dictionary first, each with: n_atoms; k; fvu, relative_error, cosine, l0, each
    with its 95 % interval over documents; tails, quantiles of the relative error; above, the share of tokens beyond the
    dictionary's threshold; alive, the share of atoms used; use, the tokens that use each atom; negative, the share of
    negative coefficients; coherence; with_position_0, fvu and mean relative error of special tokens and position 0
    too; positions, fvu by place in the row; ce (see `cross_entropy`), None where there is no language model.
    `held_out` says which text was measured on, and where the random tokens are from; `no_ce` why there are no figures
    of cross-entropy, where there are none; `settings` all that was chosen, and of what model, dictionary, text and
    versions this is; `probing` is that of `itda.probing.probe`.
    """

    dictionary: str
    model: str
    hook_point: str
    tokens: int
    held_out: dict[str, Any]
    systems: dict[str, dict[str, Any]]
    clean: dict[str, float] | None  # cross-entropies: clean, zero, mean; and the tokens predicted
    no_ce: str | None = None
    probing: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return finite({each.name: getattr(self, each.name) for each in fields(self)})

    def save(self, folder: str | os.PathLike) -> None:
        """Write eval.json into the folder of the dictionary, replacing an older one."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        write_file(Path(folder) / EVAL, [text.encode()])

    def __getattr__(self, name: str) -> Any:
        """What was measured of the dictionary itself: `result.fvu` is that of the first of `systems`."""
        first: dict[str, Any] = next(iter(self.__dict__.get("systems", {}).values()), {})
        if name in first:
            return first[name]
        raise AttributeError(f"an Evaluation has no {name!r}: it has {', '.join(first)}")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return drawing.evaluation(self, options)


def evaluate(
    dictionary: ITDA | str | os.PathLike,
    data: Any,
    *,
    model: Any = None,
    tokenizer: Any = None,
    tokens: int = TOKENS,
    ce_tokens: int | None = CE_TOKENS,
    k: int | None = None,
    method: str | None = None,
    controls: bool | Sequence[str] = True,
    systems: Iterable[System] = (),
    probe: Any = None,
    probe_column: str = "text",
    probe_label: str = "label",
    in_sample: bool = False,
    special_tokens: bool | None = None,
    force: bool = False,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Callable[[Step | None], None] = False,
    **stream: Any,
) -> Evaluation:
    """Measure `dictionary` on text that it was not built on, beside its controls.

    dictionary   an ITDA, its folder or its repository on the hub
    data         text, as for `itda.activations`, cut into rows as the dictionary's own (but a text of one document is
                 read whole, also where the dictionary has first rows of documents alone); if that is what the
                 dictionary was built on, measuring begins at the first document that it has not read; or a folder of
                 activations (`itda collect`), measured without a model: no cross-entropy, no untrained model
    model        where activations are from, if not what the dictionary names: a name, or what `itda.hooks.load` gave
    tokens       valid tokens to measure on at most
    ce_tokens    of them, those on which reconstructions are spliced into the running model; 0 for none, None for all
    k, method    of the pursuit, if not the dictionary's
    controls     all of them, none, or some of: "random tokens", as many activations drawn from the same stream (or, if
                 `data` is other text, from other documents of it); "gaussian" directions; "untrained model", a
                 dictionary of as many atoms built on and measured on a model with random weights
    systems      further ones, for the same table
    probe        labelled texts (a .jsonl or .parquet file, or records): how well a linear probe on a few latents, or
                 all, tells `probe_label` from the `probe_column` (`itda.probing.probe`)
    in_sample    measure on text that the dictionary was built on all the same
    special_tokens   score and replace special tokens and position 0 too; as in building by default
    stream       further settings of the text (`context_length`, `column`, ...), if not as in building

    Raises `InputError` for text of which no document is left, and for another model unless `force`.
    """
    asked = {name: value for name, value in locals().items() if name in ASKED}
    wanted = _checked_controls(controls)
    for key, value, least in (("tokens", tokens, 1), ("ce_tokens", ce_tokens, 0), ("seed", seed, 0)):
        if value is not None:
            check_whole(key, value, least)
    if unknown := [key for key in stream if key not in (*heldout.CUT, "revision")]:
        raise InputError(f"`evaluate` has no setting `{unknown[0]}`: of the text there are {', '.join(heldout.CUT)}.")
    systems = list(systems)
    labelled = None if probe is None else probes.labelled(probe, probe_column, probe_label)
    began = time.monotonic()
    report = reporter(progress) or (lambda step: None)
    name = str(dictionary) if not isinstance(dictionary, ITDA) else repr(dictionary)
    dictionary = load_dictionary(dictionary)
    if not len(dictionary):
        raise InputError(f"{name} has no atoms, so there is nothing to measure.")
    if stored.is_stored(data):
        settings = {key: value for key, value in (("k", k), ("method", method)) if value is not None}
        return _on_disk(name, dictionary, data, asked, wanted, settings, systems, report)
    loading: dict[str, Any] = dict(force=force, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    hooked, hook = hooked_for(dictionary, model, tokenizer, head=ce_tokens != 0, **loading)
    _check_places(systems, hooked, hook, dictionary.d, force)
    if special_tokens is None:
        special_tokens = bool(dictionary.cfg.get("special_tokens"))
    pool = heldout.pool_size(len(dictionary)) if set(wanted) & {"random tokens", "untrained model"} else 0
    split = heldout.split(dictionary, data, hooked.tokenizer, tokens, pool, special_tokens, in_sample, seed, stream)
    reader = heldout.Reader(split, hook, special_tokens, report)
    held = reader.read(hooked, "reading")
    settings = {key: value for key, value in (("k", k), ("method", method)) if value is not None}
    every = _every(dictionary, held, wanted, settings, systems, seed)
    found = {s.name: measure(s, held.x, held.labels, held.scored, _threshold(dictionary), seed) for s in every}
    clean, no_ce = None, NONE_ASKED if ce_tokens == 0 else hooked.no_logits
    if no_ce is None:
        rows = split.first(ce_tokens)
        clean = _cross_entropies(hooked, hook, rows, every, held, found, special_tokens, seed, report)
    probing = None
    if labelled is not None:
        texts: dict[str, Any] = dict(special_tokens=special_tokens, seed=seed)
        texts["context_length"] = split.stream.context_length
        probing = probes.probe(hooks.load(hooked, hooks=hook), hook, every, labelled, **texts)
    mine = list(found)
    if "untrained model" in wanted:
        found |= _untrained(dictionary, hooked, reader, settings, seed)
    order = ["itda", *(c for c in CONTROLS if c in found), *(n for n in mine if n not in ("itda", *CONTROLS))]
    asked |= _like(dictionary, settings) | dict(controls=wanted, special_tokens=special_tokens)
    report(None)
    return Evaluation(
        dictionary=name,
        model=hooked.provenance(hook)["id"],
        hook_point=hook,
        tokens=int(held.scored.sum()),
        held_out=split.about,
        systems={name: found[name] for name in order},
        clean=clean,
        no_ce=no_ce,
        probing=probing,
        settings=_settings(dictionary, hooked, hook, split, asked),
        seconds={"all": round(time.monotonic() - began, 3)},
    )


def _on_disk(
    name: str,
    dictionary: ITDA,
    data: Any,
    asked: dict[str, Any],
    wanted: list[str],
    settings: dict[str, Any],
    systems: list[System],
    report: Callable[[Step | None], None],
) -> Evaluation:
    """`evaluate` on activations that were collected: without what takes a model."""
    if asked["probe"] is not None:
        raise InputError("A probe reads texts with a model, and activations on disk have none: give text as `data`.")
    began, seed = time.monotonic(), asked["seed"]
    stream = stored.source(dictionary, data, asked["force"])
    (hook,) = stream.hook_points
    for system in systems:
        if system.atoms.shape[1] != dictionary.d:
            raise InputError(f"{system.name} is for activations of width {system.atoms.shape[1]}, not {dictionary.d}.")
    pool = heldout.pool_size(len(dictionary)) if "random tokens" in wanted else 0
    held, about = stored.held(dictionary, stream, asked["tokens"], pool, asked["in_sample"], seed, report)
    if "untrained model" in wanted:
        wanted = [control for control in wanted if control != "untrained model"]
        about["left_out"] = f"the untrained model, since {NO_MODEL}"
    every = _every(dictionary, held, wanted, settings, systems, seed)
    found = {s.name: measure(s, held.x, held.labels, held.scored, _threshold(dictionary), seed) for s in every}
    order = ["itda", *(c for c in CONTROLS if c in found), *(n for n in found if n not in ("itda", *CONTROLS))]
    report(None)
    said = stream.provenance
    asked |= _like(dictionary, settings) | dict(controls=wanted, special_tokens=said.get("special_tokens"))
    return Evaluation(
        dictionary=name,
        model=str(said["model"].get("id")),
        hook_point=hook,
        tokens=len(held.x),
        held_out=about,
        systems={one: found[one] for one in order},
        clean=None,
        no_ce=NO_MODEL,
        settings=_said(dictionary, said["model"], said["stream"], asked),
        seconds={"all": round(time.monotonic() - began, 3)},
    )


def _checked_controls(controls: bool | Sequence[str]) -> list[str]:
    wanted = list(CONTROLS) if controls is True else list(controls or ())
    if unknown := [name for name in wanted if name not in CONTROLS]:
        raise InputError(f"There is no control {unknown[0]!r}: choose of {', '.join(CONTROLS)}.")
    return wanted


def _settings(dictionary: ITDA, hooked: Any, hook: str, split: heldout.Split, asked: dict[str, Any]) -> dict[str, Any]:
    """What was `asked`, and of which dictionary, model, text and versions."""
    text = split.stream.provenance | {"hash": hash_rows(split.held)}
    return _said(dictionary, hooked.provenance(hook) | {"device": str(hooked.device)}, text, asked)


def _said(dictionary: ITDA, model: dict[str, Any], text: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    probe = asked["probe"]
    asked |= {"probe": os.fspath(probe) if isinstance(probe, str | os.PathLike) else None}
    content = hashlib.sha256()
    for tensor in (dictionary.atoms, dictionary.mean):
        content.update(b"" if tensor is None else bytes_of(tensor.contiguous()))
    own = {
        "sha256": content.hexdigest(),
        "n_atoms": len(dictionary),
        "itda_version": dictionary.cfg.get("itda_version"),
    }
    versions = {"itda": __version__, "torch": torch.__version__, "transformers": version("transformers")}
    return asked | {"dictionary": own, "model": model, "text": text, "versions": versions}


def measure(
    system: System,
    x: Float[Tensor, "tokens d"],
    labels: Any,
    scored: Bool[ndarray, " tokens"] | None = None,
    threshold: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What `Evaluation.systems` has of one system, but for cross-entropy, on the activations `x` with their `labels`.

    `scored` marks the tokens that count; the others are in "with_position_0" alone.
    """
    scored = np.ones(len(x), bool) if scored is None else scored
    errors, cosines, l0s, negative, used = [], [], [], 0, np.zeros(len(system.atoms), np.int64)
    for start in range(0, len(x), CHUNK):
        part, of = x[start : start + CHUNK], torch.from_numpy(scored[start : start + CHUNK])
        x_hat, codes = system.run(part)
        x_hat, codes, exact = x_hat.double().cpu(), codes.to("cpu"), part.double().cpu()
        errors.append((exact - x_hat).square().sum(1).numpy())
        cosines.append(cosine(exact, x_hat).numpy())
        l0s.append(codes.l0().numpy())
        values = codes.values[of]
        negative += int((values < 0).sum())
        used += np.bincount(codes.indices[of][values != 0].numpy(), minlength=len(used))
    error, total = np.concatenate(errors), x.double().square().sum(1).cpu().numpy()
    centred = x.double().cpu() if system.mean is None else x.double().cpu() - system.mean.double().cpu()
    loss = error / np.maximum(centred.square().sum(1).numpy(), 1e-300)
    relative = error / np.where(total > 0, total, 1.0)
    l0 = np.concatenate(l0s)
    draws = Bootstrap(groups_of(labels[scored]), seed)
    known = relative[scored]
    fvu, interval = _fvu(x, error, scored, draws)
    out: dict[str, Any] = {"n_atoms": len(system.atoms), "k": system.k, "fvu": fvu, "fvu_interval": interval}
    for name, values in {"relative_error": known, "cosine": np.concatenate(cosines)[scored], "l0": l0[scored]}.items():
        out |= {name: float(values.mean()), f"{name}_interval": draws.of_mean(values.astype(float))}
    out |= {"tails": {tail: float(np.quantile(known, q)) for tail, q in TAILS.items()}}
    out |= {"above": None if threshold is None else float((loss[scored] > threshold).mean())}
    out |= {"alive": float((used > 0).mean()), "negative": negative / max(1, int(used.sum())), "use": used.tolist()}
    out |= {"coherence": coherence(system.atoms), "with_position_0": None, "ce": None}
    if not scored.all():
        out["with_position_0"] = {"fvu": _fvu(x, error)[0], "relative_error": float(relative.mean())}
    return out | {"positions": _by_position(x, error, labels.position, scored), **system.cost}


class Bootstrap:
    """The middle 95 % of a mean, or of a ratio of sums, over groups of tokens drawn with replacement."""

    def __init__(self, groups: Int[ndarray, " tokens"], seed: int) -> None:
        self.groups, self.n = groups, int(groups.max()) + 1 if len(groups) else 1
        drawn = np.random.default_rng([seed, 3]).integers(self.n, size=(DRAWS, self.n))
        self.weights = np.stack([np.bincount(row, minlength=self.n) for row in drawn]).astype(float)

    def sums(self, values: Float[ndarray, " tokens"]) -> Float[ndarray, " draws"]:
        """The sum of `values` in each draw."""
        return self.weights @ np.bincount(self.groups, values, minlength=self.n)

    def of_mean(self, values: Float[ndarray, " tokens"]) -> tuple[float, float]:
        """The interval of the mean of `values`."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return interval_of(self.sums(values) / self.sums(np.ones(len(values))))


def interval_of(values: Float[ndarray, " draws"]) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of what is finite."""
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (math.nan, math.nan)
    return float(low), float(high)


def _fvu(
    x: Tensor, error: ndarray, scored: ndarray | None = None, draws: Bootstrap | None = None
) -> tuple[float, tuple[float, float] | None]:
    """Global, centred FVU of the tokens that are scored; and its interval, all draws about the one mean."""
    exact = x.double().cpu()
    if scored is not None:
        exact, error = exact[torch.from_numpy(scored)], error[scored]
    variance = float((exact - exact.mean(0)).square().sum()) if len(exact) else 0.0
    value = float(error.sum()) / variance if variance > 0 else math.nan
    if draws is None:
        return value, None
    spread = draws.sums((exact - exact.mean(0)).square().sum(1).numpy())
    with np.errstate(invalid="ignore", divide="ignore"):
        return value, interval_of(draws.sums(error) / spread)


def _by_position(x: Tensor, error: ndarray, position: ndarray, scored: ndarray) -> list[dict[str, Any]]:
    """FVU, and mean |x|, at positions 0, 1, 2-3, 4-7, 8-15 and so on; of all tokens there, scored or not."""
    bucket = np.frexp(position)[1]
    norms, out = x.double().square().sum(1).sqrt().cpu().numpy(), []
    for b in np.unique(bucket).tolist():
        there = bucket == b
        part = {"first": 2 ** (b - 1) if b else 0, "last": 2**b - 1, "tokens": int(there.sum())}
        part |= {"scored": int((there & scored).sum()), "norm": float(norms[there].mean())}
        of = error[there] / np.where(norms[there] > 0, norms[there] ** 2, 1.0)
        out.append(part | {"fvu": _fvu(x, error, there)[0], "relative_error": float(of.mean())})
    return out


def _check_places(systems: Sequence[System], hooked: Any, hook: str, d: int, force: bool) -> None:
    """Refuse systems of another width, and unless `force` those that say that they were made for another place."""
    for system in systems:
        if system.atoms.shape[1] != d:
            raise InputError(
                f"{system.name} is for activations of width {system.atoms.shape[1]}, and these have {d}: give one of "
                "this hook point."
            )
        place = None
        with suppress(InputError):
            place = hooked.canonical(system.hook_point) if system.hook_point else hook
        if place != hook and not force:
            raise InputError(
                f"{system.name} was made for {system.hook_point}, and the dictionary for {hook}: give one of the same "
                "place, or measure it all the same with `force` (`--force`)."
            )


def _threshold(dictionary: ITDA) -> float | None:
    """The dictionary's, where it is one of the relative error."""
    threshold = dictionary.cfg.get("threshold")
    return float(threshold) if isinstance(threshold, float | int) and dictionary.cfg.get("loss") == "relative" else None


# -- cross-entropy ----------------------------------------------------------------------------------------------------


def _cross_entropies(hooked, hook, rows, systems, held, found, special_tokens, seed, report) -> dict[str, float]:
    """Put the scores of all systems into `found`; what the model loses without the hook point, for all of them."""
    mean = held.x[torch.from_numpy(held.scored)].double().mean(0)
    replacements: dict[str, Any] = {"zero": torch.zeros_like, "mean": lambda x: mean.to(x).expand_as(x)}
    replacements |= {system.name: lambda x, run=system.run: run(x)[0] for system in systems}
    began = time.monotonic()

    def done(count: int) -> None:
        report(Step("splicing", count, len(rows), time.monotonic() - began))

    out = spliced(hooked, rows, hook, replacements, special_tokens=special_tokens, progress=done)
    labels = heldout.labels_of(rows)
    key = {pair: i for i, pair in enumerate(map(tuple, labels.pairs().tolist()))}
    at = np.array([key[pair] for pair in zip(out.prompt.tolist(), out.position.tolist(), strict=True)], np.int64)
    draws = Bootstrap(groups_of(labels[at]), seed)
    for system in systems:
        found[system.name]["ce"] = cross_entropy(out, system.name, draws)
    levels = {name: float(out.cross_entropy[name].mean()) for name in ("clean", "zero", "mean")}
    return levels | {"tokens": len(at)}


def cross_entropy(out: Spliced, name: str, draws: Bootstrap | None = None) -> dict[str, Any]:
    """CE-loss scores (eq. 7) of what was spliced in as `name`: 1 for what changes nothing, 0 for the ablation.

    score is (zero - spliced) / (zero - clean), score_mean the same with the mean ablation in place of zero's; loss is
    the cross-entropy in nats, kl the divergence of the predictions from the clean ones.
    """
    loss = out.cross_entropy[name]
    found: dict[str, Any] = {"loss": float(loss.mean()), "kl": float(out.kl[name].mean())}
    clean = out.cross_entropy["clean"]
    for key, ablation in (("score", "zero"), ("score_mean", "mean")):
        base = out.cross_entropy[ablation]
        found[key] = ce_score(clean.mean(), loss.mean(), base.mean())
        if draws is not None:
            sums = (draws.sums(values) for values in (clean, loss, base))
            with np.errstate(invalid="ignore", divide="ignore"):
                a, b, c = sums
                found[f"{key}_interval"] = interval_of((c - b) / (c - a))
    return found


# -- controls ---------------------------------------------------------------------------------------------------------


def _every(
    dictionary: ITDA,
    held: heldout.Held,
    wanted: list[str],
    settings: Mapping[str, Any],
    systems: Sequence[System],
    seed: int,
) -> list[System]:
    """The dictionary, those of its controls that are measured on the same activations, and the other systems."""
    every = [System.of(dictionary, "itda", **settings)]
    if "random tokens" in wanted:
        every.append(_random_tokens(dictionary, held, settings, seed))
    if "gaussian" in wanted:
        every.append(_gaussian(dictionary, settings, seed))
    names = named(None, [*RESERVED, *(s.name for s in systems)])[len(RESERVED) :]
    return every + [replace(s, name=n) for s, n in zip(systems, names, strict=True)]


def _random_tokens(dictionary: ITDA, held: heldout.Held, settings: Mapping[str, Any], seed: int) -> System:
    """As many activations of the same stream, drawn without looking."""
    return System.of(_drawn(dictionary, held, seed), "random tokens", **_like(dictionary, settings))


def _drawn(dictionary: ITDA, held: heldout.Held, seed: int) -> ITDA:
    x = held.pool.float()
    x = x if dictionary.mean is None else x - dictionary.mean.to(x.device)
    x = x[x.square().sum(1) > 0]
    rows = np.random.default_rng([seed, 4]).permutation(len(x))[: len(dictionary)]
    return _plain(normalize(x[torch.from_numpy(np.sort(rows))]), dictionary)


def _gaussian(dictionary: ITDA, settings: Mapping[str, Any], seed: int) -> System:
    """As many directions drawn from the sphere."""
    noise = torch.randn(len(dictionary), dictionary.d, generator=torch.Generator().manual_seed(seed))
    return System.of(_plain(normalize(noise), dictionary), "gaussian", **_like(dictionary, settings))


def _plain(atoms: Tensor, dictionary: ITDA) -> ITDA:
    from itda.labels import Labels

    ones = torch.ones(len(atoms))
    return ITDA(atoms.cpu(), Labels.counted(0, len(atoms)), dictionary.k, dictionary.mean, ones, ones, {})


def _like(dictionary: ITDA, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary's own settings of the pursuit, and those given."""
    own = {"method": dictionary.cfg.get("method", "mp"), "nonneg": bool(dictionary.cfg.get("nonneg"))}
    return {"k": dictionary.k} | own | dict(settings)


def _untrained(dictionary: ITDA, hooked, reader: heldout.Reader, settings, seed: int) -> dict[str, dict[str, Any]]:
    """A dictionary of as many atoms, built as this one, of a model with random weights, measured there."""
    other = hooks.load(hooks.untrained(hooked, hooked.tokenizer, seed=seed), hooks=reader.hook)
    held = reader.read(other, "reading the untrained model")
    grow: dict[str, Any] = {"center": dictionary.mean is not None, "loss": dictionary.cfg.get("loss") or "relative"}
    wish = min(len(dictionary), len(held.pool))
    built = build(held.pool, k=dictionary.k, n_atoms=wish, max_atoms=wish, **grow)
    assert isinstance(built, ITDA)
    system = System.of(built, "untrained model", **_like(dictionary, settings))
    return {"untrained model": measure(system, held.x, held.labels, held.scored, _threshold(dictionary), seed)}
