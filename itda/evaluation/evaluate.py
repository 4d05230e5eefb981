"""How good is a dictionary: reconstruction, cross-entropy and use on held-out text, beside what chance would give."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch

from itda._version import __version__
from itda.beside import EVAL, EVAL_FORMAT, content_hash, is_evaluation
from itda.dictionary.folder import MANIFEST
from itda.dictionary.itda import ITDA
from itda.disk import write_file
from itda.errors import InputError, shortened
from itda.evaluation import heldout, heldout_on_disk, verdict
from itda.evaluation import probing as probes
from itda.evaluation.controls import CONTROLS, like, systems_of, untrained
from itda.evaluation.measures import Bootstrap, measure
from itda.evaluation.splicing import cross_entropies
from itda.evaluation.systems import System, check_hook, check_model
from itda.labels import groups_of
from itda.locks import PATIENCE, locked
from itda.metrics import variance
from itda.models import loading
from itda.progress import Step, reporter, stage
from itda.provenance import section
from itda.reading.on_disk import is_stored
from itda.reading.own_model import model_of, stored_of
from itda.report import drawing_evaluation, zf_plot
from itda.results import Report, finite
from itda.settings import groups as g
from itda.settings import pick, takes, verbs
from itda.text.prompts import hash_rows

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

ASKED = (
    *("tokens", "ce_tokens", "tol", "probe", "probe_column", "probe_label", "in_sample", "force", "seed"),
    "special_tokens",
)
NO_MODEL = "activations on disk have no model to run"
NONE_ASKED = "it was asked for on 0 tokens (`ce_tokens`)"


@dataclass(frozen=True, repr=False)
class Evaluation(Report):
    """What was measured of a dictionary and of its controls, in one table; made by `evaluate`.

    `verdict` says whether the dictionary is better than random tokens (`itda.evaluation.verdict`), None where these
    were not measured; `variance` where that of the activations lies (`itda.metrics.variance`); `denominator` what the
    relative errors of tokens are relative to, the same in all of the table and for the threshold.

    `systems` are dicts by system, the dictionary first, each with: n_atoms; k; fvu, fvu_robust without massive tokens,
    relative_error, cosine, l0, each with its 95 % interval over documents; fvu_standardised, without massive tokens and
    each coordinate over its deviation; median_error and tails, quantiles of the relative error; above, the share of
    tokens beyond the dictionary's threshold; alive, the share of atoms used; use, the tokens that use each atom;
    negative, the share of negative coefficients; coherence; with_position_0, fvu and mean relative error of special
    tokens and position 0 too; positions, fvu and share of the variance of all by place in the row; afa, how long codes
    are beside what they encode (`itda.metrics.afa`), and zf, |x| and the norm of the code with the bias for the last
    tokens of rows; ce (see `cross_entropy`), None where there is no language model.
    `held_out` says which text was measured on, and where the random tokens are from; `no_ce` why there are no figures
    of cross-entropy, where there are none; `settings` all that was chosen, and of what model, dictionary, text and
    versions this is; `probing` is that of `itda.evaluation.probing.probe`.
    """

    dictionary: str
    model: str
    hook_point: str
    tokens: int
    held_out: dict[str, Any]
    denominator: str
    variance: dict[str, Any]
    verdict: dict[str, Any] | None
    systems: dict[str, dict[str, Any]]
    clean: dict[str, float] | None  # cross-entropies: clean, zero, mean; and the tokens predicted
    no_ce: str | None = None
    probing: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {"format": EVAL_FORMAT, **finite({each.name: getattr(self, each.name) for each in fields(self)})}

    def save(self, path: str | os.PathLike) -> Path:
        """Write it to the file `path`, or as eval.json into that folder, replacing an older one; returns where.

        Raises `InputError` for a folder with another dictionary than was measured, or an eval.json of something else,
        and where another process goes on writing into it.
        """
        data = [json.dumps(self.to_json(), indent=1, allow_nan=False).encode()]
        if not os.path.isdir(path):
            write_file(path, data)
            return Path(path)
        target = Path(path) / EVAL
        with locked(Path(os.path.realpath(path)), patience=PATIENCE, within=True):
            if os.path.lexists(target) and not is_evaluation(target):
                raise InputError(f"{target} is no evaluation of itda's, so it stays: name another file (`--out`).")
            measured = section(self.settings, "dictionary").get("sha256")
            if measured and (Path(path) / MANIFEST).is_file() and content_hash(ITDA.load(path)) != measured:
                raise InputError(
                    f"{path} holds another dictionary than was measured, it was replaced meanwhile: measure that, or "
                    "name a file for these figures (`--out`)."
                )
            write_file(target, data)
        return target

    def __getattr__(self, name: str) -> Any:
        """What was measured of the dictionary itself: `result.fvu` is that of the first of `systems`."""
        first: dict[str, Any] = next(iter(self.__dict__.get("systems", {}).values()), {})
        if name in first:
            return first[name]
        raise AttributeError(f"an Evaluation has no {name!r}: it has {', '.join(first)}")

    def zf(self, path: str | os.PathLike) -> None:
        """Draw the norms of codes against those of what they encode, a square for each system, by matplotlib.

        Raises `InputError` for an ending other than PNG, SVG and PDF, and where the picture cannot be written.
        """
        zf_plot.zf(self, path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return drawing_evaluation.evaluation(self, options)


@takes(verbs.EVALUATE)
def evaluate(dictionary: ITDA | str | os.PathLike, data: Any, **given: Unpack[verbs.Evaluate]) -> Evaluation:
    """Measure `dictionary` on text that it was not built on, beside its controls.

    dictionary   an ITDA, its folder or its repository on the hub
    data         text, as for `itda.activations`, cut into rows as the dictionary's own (but a text of one document is
                 read whole, also where the dictionary has first rows of documents alone); if that is what the
                 dictionary was built on, measuring begins at the first document that it has not read; or a folder of
                 activations (`itda collect`), measured without a model: no cross-entropy, no untrained model
    model        where activations are from, if not what the dictionary names: a name, or what `itda.load_model` gave
    tokens       valid tokens to measure on at most
    ce_tokens    of them, those on which reconstructions are spliced into the running model; 0 for none, None for all
    k, method, nonneg   of the pursuit, if not the dictionary's
    controls     all of them, none, or some of: "random tokens", as many activations drawn from the same stream (or, if
                 `data` is other text, from other documents of it); "gaussian" directions; "untrained model", a
                 dictionary of as many atoms built on and measured on a model with random weights
    tol          measure the dictionary also with as many atoms as each token needs to leave this relative error or less
                 (at most d, or 1,024), and beside it with so many for every token, their mean
    systems      further ones, for the same table
    probe        labelled texts (a .jsonl or .parquet file, or records): how well a linear probe on a few latents, or
                 all, tells `probe_label` from the `probe_column` (`itda.evaluation.probing.probe`)
    in_sample    measure on text that the dictionary was built on all the same
    special_tokens   score and replace special tokens and position 0 too; as in building by default
    Other settings of the text (`context_length`, `column`, ...) are those of building unless given.

    Raises `InputError` for text of which no document is left, and for another model unless `force`.
    """
    asked: dict[str, Any] = {name: given[name] for name in ASKED}  # type: ignore[literal-required]
    wanted, tol = _checked_controls(given["controls"]), _checked_tol(given["tol"])
    tokens, ce_tokens, seed, special_tokens = (
        asked[name] for name in ("tokens", "ce_tokens", "seed", "special_tokens")
    )
    if seed >= 1 << 63:
        raise InputError(f"`seed` is {shortened(seed)}: pass a whole number below 2**63.")
    systems, probe = list(given["systems"]), given["probe"]
    cut = pick(g.Rows, given) | pick(g.Source, given)
    stream = {name: value for name, value in cut.items() if value is not None}
    settings = {name: value for name in ("k", "method", "nonneg") if (value := given[name]) is not None}
    labelled = None if probe is None else probes.labelled(probe, given["probe_column"], given["probe_label"])
    began = time.monotonic()
    report = reporter(given["progress"])
    name = str(dictionary) if not isinstance(dictionary, ITDA) else repr(dictionary)
    dictionary = ITDA.of(dictionary)
    if not len(dictionary):
        raise InputError(f"{name} has no atoms to measure: give one with some (a lower `threshold` admits more).")
    if is_stored(data):
        idle = ("tokenizer", "device", "trust_remote_code")
        verbs.EVALUATE.refuse(given, idle, "activations on disk are measured without a model")
        reading = stream | {name: given[name] for name in ("model", "dtype", "special_tokens")}
        return _on_disk(name, dictionary, data, reading, asked, wanted, settings, systems, report)
    hooked, hook = model_of(dictionary.cfg, given, head=ce_tokens != 0)
    _check_places(systems, hooked, hook, dictionary.d, given["force"])
    special_tokens = bool(dictionary.cfg.get("special_tokens")) if special_tokens is None else special_tokens
    pool = heldout.pool_size(len(dictionary)) if set(wanted) & {"random tokens", "untrained model"} else 0
    stage(report, "choosing held-out text")
    split = heldout.split(
        dictionary, data, hooked.tokenizer, tokens, pool, special_tokens, given["in_sample"], seed, stream
    )
    reader = heldout.Reader(split, hook, special_tokens, report)
    held = reader.read(hooked)
    every = systems_of(dictionary, held, wanted, settings, systems, seed, tol)
    found, said = _measured(every, held, dictionary, seed, report)
    at_ce, clean, no_ce = None, None, NONE_ASKED if ce_tokens == 0 else hooked.no_logits
    if no_ce is None:
        rows = split.first(ce_tokens)
        clean, at_ce = cross_entropies(hooked, hook, rows, every, held, found, special_tokens, seed, report)
    _judged(said, at_ce)
    probing = None if labelled is None else _probed(hooked, hook, every, labelled, split, special_tokens, seed, report)
    if "untrained model" in wanted:
        other, there = untrained(dictionary, hooked, reader, settings, seed)
        found |= _measured([other], there, dictionary, seed, report)[0]
    asked |= like(dictionary, settings) | dict(controls=wanted, special_tokens=special_tokens)
    report(None)
    return Evaluation(
        dictionary=name,
        model=hooked.provenance(hook)["id"],
        hook_point=hook,
        tokens=int(held.scored.sum()),
        held_out=split.about,
        **said,
        systems=_in_order(found),
        clean=clean,
        no_ce=no_ce,
        probing=probing,
        settings=_settings(dictionary, hooked, hook, split, asked),
        seconds={"all": round(time.monotonic() - began, 3)},
    )


def _probed(hooked, hook, systems, labelled, split, special_tokens, seed, report) -> dict[str, Any]:
    """Probes of texts that are cut as those that were measured on."""
    texts = {"context_length": split.stream.context_length, "bos": split.stream.bos, "progress": report}
    model = loading.load_model(hooked, hooks=hook)
    return probes.probe(model, hook, systems, labelled, special_tokens=special_tokens, seed=seed, **texts)


def _on_disk(
    name: str,
    dictionary: ITDA,
    data: Any,
    reading: dict[str, Any],
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
    stream = stored_of(dictionary.cfg, dictionary.d, data, asked["force"], reading)
    (hook,) = stream.hook_points
    for system in systems:
        if system.atoms.shape[1] != dictionary.d:
            width = system.atoms.shape[1]
            raise InputError(f"{system.name} is for activations of width {width}: give one of width {dictionary.d}.")
        if not asked["force"]:
            came = section(stream.provenance, "model")
            check_hook(system, hook, came.get("layer"))
            check_model(system, str(came.get("id")), known=bool(came.get("id")))
    pool = heldout.pool_size(len(dictionary)) if "random tokens" in wanted else 0
    held, about = heldout_on_disk.held(dictionary, stream, asked["tokens"], pool, asked["in_sample"], seed, report)
    if "untrained model" in wanted:
        wanted = [control for control in wanted if control != "untrained model"]
        about["left_out"] = f"the untrained model, since {NO_MODEL}"
    every = systems_of(dictionary, held, wanted, settings, systems, seed, asked["tol"])
    found, shown = _measured(every, held, dictionary, seed, report)
    _judged(shown)
    report(None)
    said = stream.provenance
    asked |= like(dictionary, settings) | dict(controls=wanted, special_tokens=said.get("special_tokens"))
    return Evaluation(
        dictionary=name,
        model=str(said["model"].get("id")),
        hook_point=hook,
        tokens=len(held.x),
        held_out=about,
        **shown,
        systems=_in_order(found),
        clean=None,
        no_ce=NO_MODEL,
        settings=_said(dictionary, said["model"], said["stream"], asked),
        seconds={"all": round(time.monotonic() - began, 3)},
    )


def _measured(
    systems: Sequence[System], held: heldout.Held, dictionary: ITDA, seed: int, report: Callable[[Step | None], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What is measured of all `systems`, and what there is to say of the activations and of all systems together."""
    errors: dict[str, np.ndarray] = {}
    threshold = _threshold(dictionary)
    found = {}
    for i, system in enumerate(systems):
        which = f" ({i + 1} of {len(systems)} systems)" * (len(systems) > 1)
        done = stage(report, f"{system.name}: encoding{which}", len(held.x))
        found[system.name] = measure(system, held.x, held.labels, held.scored, threshold, seed, errors, done)
    draws = Bootstrap(groups_of(held.labels[held.scored]), seed)
    where = variance(held.x[torch.from_numpy(held.scored)])
    said = {"denominator": _denominator(dictionary), "variance": where, "verdict": verdict.of_errors(errors, draws)}
    return found, said


def _judged(said: dict[str, Any], cross_entropy: dict[str, Any] | None = None) -> None:
    """Complete the verdict, if there is one."""
    if said["verdict"] is not None:
        said["verdict"] |= {"cross_entropy": cross_entropy}
        said["verdict"]["overall"] = verdict.overall(said["verdict"])


def _denominator(dictionary: ITDA) -> str:
    """What errors of tokens are relative to: that of the dictionary's own loss, mean and scale."""
    of = "|x|²" if dictionary.mean is None else "|x - mean|²"
    return of if dictionary.scale is None else f"{of}, each coordinate over its deviation"


def _in_order(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The dictionary first, then its controls, then the others."""
    return {name: found[name] for name in dict.fromkeys(("itda", *CONTROLS, *found)) if name in found}


def _checked_controls(controls: bool | Sequence[str]) -> list[str]:
    if isinstance(controls, str):
        controls = [controls]
    wanted = list(CONTROLS) if controls is True else list(controls or ())
    if unknown := [name for name in wanted if name not in CONTROLS]:
        raise InputError(f"There is no control {unknown[0]!r}: choose of {', '.join(CONTROLS)}.")
    return wanted


def _checked_tol(tol: float | None) -> float | None:
    if tol is not None and not 0 < tol < 1:
        raise InputError(f"`tol` is {tol:g}: pass a relative error between 0 and 1, such as 0.1.")
    return tol


def _settings(dictionary: ITDA, hooked: Any, hook: str, split: heldout.Split, asked: dict[str, Any]) -> dict[str, Any]:
    """What was `asked`, and of which dictionary, model, text and versions."""
    text = split.stream.provenance | {"hash": hash_rows(split.held)}
    return _said(dictionary, hooked.provenance(hook) | {"device": str(hooked.device)}, text, asked)


def _said(dictionary: ITDA, model: dict[str, Any], text: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    probe = asked["probe"]
    asked |= {"probe": os.fspath(probe) if isinstance(probe, str | os.PathLike) else None}
    own = {
        "sha256": content_hash(dictionary),
        "n_atoms": len(dictionary),
        "itda_version": dictionary.cfg.get("itda_version"),
        "threshold": _threshold(dictionary),
        **({"selected": True} if dictionary.cfg.get("selected") else {}),
        **({"refined": True} if dictionary.moved is not None else {}),
    }
    versions = {"itda": __version__, "torch": torch.__version__, "transformers": version("transformers")}
    return asked | {"dictionary": own, "model": model, "text": text, "versions": versions}


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
        if not force:
            model = hooked._layout.model
            check_model(system, model, known=model != type(hooked.module).__name__)


def _threshold(dictionary: ITDA) -> float | None:
    """The dictionary's, where it is one of the relative error."""
    threshold = dictionary.cfg.get("threshold") if not dictionary.cfg.get("selected") else None
    return float(threshold) if isinstance(threshold, float | int) and dictionary.cfg.get("loss") == "relative" else None
