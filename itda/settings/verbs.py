"""Which settings each verb takes: groups put together, and the defaults that are its own.

A group is written out here once more as a class, because that is what type checkers read; no setting is.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

from itda.settings import groups as g
from itda.settings.declare import Setting, Verb, declarations, names

# The published code's practice, where nothing else is given. Its threshold, 4e-4, is the default of the cosine loss.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "loss": "cosine",
        "admission": "paper",
        "center": False,
        "batch_rows": 128,
        "truncate": True,
        "special_tokens": True,
        "padding": True,
    }
}


class Text(g.Rows, g.Order, g.Source, total=False):
    """Text as token rows."""


class Loading(g.Device, g.Revision, g.Backend, g.Large, g.Transformers, total=False):
    """A model by name."""


class Reading(g.Places, g.Amount, Text, g.Batches, g.Special, g.Padding, g.Tokenizer, Loading, total=False):
    """Activations of a model on text."""


class Stored(g.Places, g.Amount, total=False):
    """Activations on disk: `itda.Store`."""


class Cached(Stored, g.Batches, g.Special, total=False):
    """An activation cache of SAELens."""


class Grow(g.Steps, g.Signs, g.Size, g.Growth, total=False):
    """A dictionary of activations."""


class Build(Grow, g.Amount, g.Keeping, g.Progressing, g.Stopping, total=False):
    """`itda.build`."""

    checkpoint: Annotated[
        str | os.PathLike | None, Setting(None, "folder to keep progress in; goes on from what is there", flag=None)
    ]


class Training(
    g.Places,
    g.Amount,
    Grow,
    g.Preset,
    g.Improvement,
    Text,
    g.Batches,
    g.Special,
    g.Padding,
    g.Tokenizer,
    Loading,
    total=False,
):
    """All that decides what a training gives: what a sweep may vary."""


class Train(Training, g.Workers, g.Target, g.Keeping, g.Progressing, g.Stopping, total=False):
    """`itda.train`."""


class Collect(Reading, g.Target, g.Progressing, g.Stopping, total=False):
    """`itda.collect`."""


class TrainSAE(
    g.Places,
    g.Amount,
    g.Autoencoder,
    Text,
    g.Batches,
    g.Special,
    g.Tokenizer,
    Loading,
    g.Target,
    g.Keeping,
    g.Progressing,
    g.Stopping,
    total=False,
):
    """`itda.train_sae`."""


class Sweep(g.Workers, g.Progressing, g.Stopping, total=False):
    """`itda.sweep`."""


class Decompose(g.Again, total=False):
    """`itda.decompose`."""


class Use(
    g.Amount,
    g.Again,
    g.Rows,
    g.Order,
    g.Source,
    g.Batches,
    g.Special,
    g.Target,
    g.Keeping,
    g.Progressing,
    g.Stopping,
    total=False,
):
    """`itda.uses`."""


class Evaluate(g.Measuring, g.Drawing, g.Again, g.Rows, g.Source, g.Special, g.Progressing, total=False):
    """`itda.evaluate`."""


class ReadSeveral(
    g.Places, g.Amount, g.Several, g.Rows, g.Source, g.Batches, g.Special, g.Device, g.Progressing, total=False
):
    """Several models that read one text."""


class ReadAll(ReadSeveral, g.Order, total=False):
    """`itda.comparison.common_tokens.read`."""


class Compare(ReadAll, g.Likeness, g.Steps, g.Size, total=False):
    """`itda.compare`."""


class Changed(g.Steps, g.Changes, g.Drawing, g.Progressing, total=False):
    """`itda.comparison.diff.of_readings`."""


class Diff(ReadSeveral, g.Null, Changed, total=False):
    """`itda.diff`."""


def _said(name: str, help: str) -> dict[str, Setting]:
    """The setting `name` where its help is more special."""
    return {name: declarations(Train)[name].setting.but(help=help)}


LOAD = Verb(Loading, open=True)
TEXT = Verb(Text)
ACTIVATIONS = Verb(Reading, open=True)
STORED = Verb(Stored)
CACHED = Verb(Cached)
GROW = Verb(Grow)
BUILD = Verb(Build)
_ADMISSION = g.ADMISSION.but(default=None, help=f"online unless another setting needs admission; {g.ADMISSION.help}")
_SIZES = {
    "admission": _ADMISSION,
    **_said("threshold", "admit a token whose loss exceeds this (0.2 is usual; the cosine loss: 4e-4): Algorithm 1"),
    **_said("n_atoms", "so many atoms; eight for each coordinate if nothing is said, at most 16,384"),
}
TRAIN = Verb(Train, {"tokens": 1_000_000, **_SIZES}, presets=PRESETS)
TRAIN_SAE = Verb(
    TrainSAE,
    {
        "tokens": Setting(10_000_000, "train on so many tokens; data that has fewer comes again", least=1),
        "seed": Setting(0, "of the order of rows and batches, and of the first weights", least=0, kept=True),
        "checkpoint_seconds": 300.0,
    },
)
COLLECT = Verb(Collect, {"tokens": 1_000_000}, open=True)
SWEEP = Verb(Sweep)
GRID = Verb(Training, {**TRAIN.changed, **_said("layer", "read the residual stream after these blocks, in one pass")})
DECOMPOSE = Verb(Decompose)
USES = Verb(
    Use,
    {"tokens": 1_000_000},
    as_before=frozenset((*names(g.Rows, g.Order, g.Source, g.Batches), "special_tokens")),
)
EVALUATE = Verb(Evaluate, as_before=frozenset((*names(g.Rows, g.Source), "special_tokens")))
READ_ALL = Verb(ReadAll, {"tokens": 50_000})
COMPARE = Verb(
    Compare,
    {
        "tokens": 50_000,
        **_said("layer", "compare after these blocks; after all if not given"),
        "k": g.STEPS.but(default=8, help="pursuit steps of the dictionaries and of shared-atom codes"),
        **_said("threshold", "build dictionaries at this threshold, to whatever size comes"),
        **_said("n_atoms", "aim at so many atoms in each layer's dictionary; a hundredth of the tokens if not given"),
    },
)
CHANGED = Verb(Changed, {"k": g.STEPS.but(default=16, help="pursuit steps of the dictionaries")})
DIFF = Verb(
    Diff,
    {
        "tokens": 50_000,
        **_said("layer", "compare after these blocks; after all if not given"),
        **CHANGED.changed,
    },
)
