"""Cross-entropy of the model with reconstructions put back into it, with intervals over documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from itda.errors import counted
from itda.evaluation import heldout, verdict
from itda.evaluation.measures import Bootstrap, interval_of
from itda.labels import groups_of
from itda.metrics import ce_score
from itda.models.splice import Spliced, spliced
from itda.progress import stage


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


def cross_entropies(
    hooked, hook, rows, systems, held, found, special_tokens, seed, report
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Put the scores of all systems into `found`.

    Returns what the model loses without the hook point, for all of them, and the verdict on the cross-entropy.
    """
    mean = held.x[torch.from_numpy(held.scored)].double().mean(0)
    replacements: dict[str, Any] = {"zero": torch.zeros_like, "mean": lambda x: mean.to(x).expand_as(x)}
    replacements |= {system.name: lambda x, run=system.run: run(x)[0] for system in systems}
    done = stage(report, f"cross-entropy: clean pass and {counted(len(replacements), 'replacement')}", len(rows))
    out = spliced(hooked, rows, hook, replacements, special_tokens=special_tokens, progress=done)
    labels = heldout.labels_of(rows)
    key = {pair: i for i, pair in enumerate(map(tuple, labels.pairs().tolist()))}
    at = np.array([key[pair] for pair in zip(out.prompt.tolist(), out.position.tolist(), strict=True)], np.int64)
    draws = Bootstrap(groups_of(labels[at]), seed)
    for system in systems:
        found[system.name]["ce"] = cross_entropy(out, system.name, draws)
    levels = {name: float(out.cross_entropy[name].mean()) for name in ("clean", "zero", "mean")}
    return levels | {"tokens": len(at)}, verdict.of_cross_entropy(out.cross_entropy, draws)
