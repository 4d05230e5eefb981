"""What SAEBench and SAELens say of a dictionary, beside what we say of it on the same tokens, and why they differ.

    make interop
    python benchmarks/interop.py [--out benchmarks/results]

Wholly offline: the demo model, a small dictionary of it, and documents that neither was trained on. SAEBench's core
evaluation runs through `itda.interop.saebench.adapter`, with the settings of its documented command; SAELens' on the
folder that `itda export` writes. Every figure of theirs is then recomputed from our own activations, codes and losses
by the rule that stands beside it in the table, to a relative 1e-4: the script fails if a rule is untrue.
"""

import argparse
import json
import logging
import os
import tempfile
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import itda
from itda import demo
from itda.evaluation.heldout import labels_of
from itda.evaluation.measures import measure
from itda.evaluation.splicing import cross_entropy
from itda.evaluation.systems import System
from itda.interop import saebench, saelens
from itda.models import loading
from itda.models.splice import spliced
from itda.text.prompts import TokenStream, valid

ROOT = Path(__file__).resolve().parents[1]
LAYER, LENGTH, ROWS, BATCH = 2, 64, 32, 16  # SAEBench takes means over batches of BATCH rows, and then of these
TOLERANCE = 1e-4

# What SAEBench 0.6.0 computes, where that is not what its name or our figure says. e = x - x_hat, E the mean over
# tokens of a batch; all figures are then means over batches.
WHY = {
    "explained_variance": "1 - E‖e‖² / (E‖x‖² - (E‖x‖²/d)²): the mean that it takes off is not that of x",
    "explained_variance_legacy": "mean over tokens of 1 - ‖e‖²/‖x - batch mean‖²",
    "mse": "E‖e‖² over the tokens of a batch, divided by their number again",
    "l0": "the same: the two signs of an atom are two latents, and no token has both",
    "frac_alive": "of 2n latents, an atom and its negative apart",
    "cossim": "the same",
    "ce_loss_without_sae": "leaves out the token after BOS",
    "ce_loss_with_sae": "leaves out the token after BOS",
    "ce_loss_with_sae (default)": "without --exclude_special_tokens_from_reconstruction: replaces BOS too",
    "ce_loss_with_ablation": "leaves out the token after BOS, and zeroes BOS too",
    "ce_loss_score": "of these three",
    "kl_div_with_sae": "leaves out the token after BOS, counts what follows the last token of a row",
    "kl_div_with_ablation": "likewise, and zeroes BOS too",
    "kl_div_score": "of these two",
}
WHY_SAELENS = {
    "explained_variance": "1 - FVU, as ours, and mse the mean squared error",
    "l0": "its own pursuit on the split dictionary: an atom that a token takes with either sign counts twice",
}


class Bench:
    """The demo model as SAEBench has it and as we have it, and the rows that both read."""

    def __init__(self):
        from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

        model = demo.model_path()
        self.ours = loading.language_model(model, hooks=LAYER, dtype="float32")
        self.hook = self.ours.hook_points[0]
        self.theirs = SAETransformerBridge.boot_transformers(str(model), device="cpu", dtype=torch.float32)
        self.theirs.enable_compatibility_mode(no_processing=True)  # without it, it knows no "hook_resid_post"
        texts = [text for name, text in demo.documents().items() if demo.held_out(name)]
        self.train_texts = [text for name, text in demo.documents().items() if not demo.held_out(name)]
        stream = TokenStream(texts, self.ours.tokenizer, context_length=LENGTH)
        full = [row for row in stream if len(row.ids) == LENGTH]
        self.rows = full[:: len(full) // ROWS][:ROWS]
        self.ids = torch.from_numpy(np.stack([row.ids for row in self.rows]))
        batches = itda.activations(self.ours, stream.of(self.rows), layer=LAYER, special_tokens=True)
        self.x = torch.cat([batch.activations for batch in batches])
        self.scored = np.concatenate([valid(row) for row in self.rows])
        assert (self.scored == (self.ids != self.ours.tokenizer.bos_token_id).flatten().numpy()).all()  # as they mask

    def store(self, sae):
        """SAELens' store of our rows. A path to rows of tokens would not do: it is looked up on the hub."""
        from datasets import Dataset
        from sae_lens import ActivationsStore

        data = Dataset.from_dict({"input_ids": self.ids.tolist()})
        settings = dict(context_size=LENGTH, streaming=False, total_tokens=1, store_batch_size_prompts=BATCH)
        return ActivationsStore.from_sae(self.theirs, sae, data, **settings)

    def saebench(self, dictionary, batches=ROWS // BATCH, exclude=True):
        """All figures of SAEBench's core evaluation, through the adapter."""
        from sae_bench.evals.core import main as core
        from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

        _, sae, _ = load_and_format_sae("itda", saebench.adapter(dictionary), "cpu")
        compute = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
        config = core.CoreEvalConfig(
            batch_size_prompts=BATCH,
            n_eval_reconstruction_batches=batches,
            n_eval_sparsity_variance_batches=batches,
            exclude_special_tokens_from_reconstruction=exclude,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            **{f"compute_{name}": True for name in compute},
        )
        words = self.theirs.tokenizer
        ignored = {words.pad_token_id, words.eos_token_id, words.bos_token_id} - {None}
        found, features = core.run_evals(sae, self.store(sae), self.theirs, config, ignore_tokens=ignored)
        flat = {name: value for part in found.values() for name, value in part.items()}
        return flat | {"frac_alive": core.calculate_misc_metrics(features)["frac_alive"]}

    def saelens(self, dictionary):
        """All figures of SAELens' evaluation of the export, and how often a token takes an atom with either sign."""
        from sae_lens import SAE
        from sae_lens.evals import get_eval_everything_config, run_evals
        from sae_lens.training.activation_scaler import ActivationScaler

        with tempfile.TemporaryDirectory() as folder:
            sae = SAE.load_from_disk(saelens.export(dictionary, Path(folder) / "sae"))
        config = get_eval_everything_config(BATCH, ROWS // BATCH, ROWS // BATCH)
        found, _ = run_evals(sae, self.store(sae), self.theirs, ActivationScaler(), config)
        z, n = sae.encode(self.x[torch.from_numpy(self.scored)]), len(dictionary)
        twice = ((z[:, :n] > 0) & (z[:, n:] > 0)).sum(1).double().mean().item()
        return {name: value for part in found.values() for name, value in part.items()}, twice

    def itda(self, dictionary):
        """Our own figures, as `itda.evaluate` has them, by the names of SAEBench's."""
        found = measure(System.of(dictionary, "itda"), self.x, labels_of(self.rows), self.scored)
        mean = self.x[torch.from_numpy(self.scored)].mean(0)
        ablations = {"zero": torch.zeros_like, "mean": mean.expand_as}
        out = spliced(self.ours, self.rows, self.hook, {**ablations, "itda": dictionary.reconstruct})
        ce, zero = cross_entropy(out, "itda"), cross_entropy(out, "zero")
        clean = float(out.cross_entropy["clean"].mean())
        losses = {"ce_loss_without_sae": clean, "ce_loss_with_sae": ce["loss"], "ce_loss_with_ablation": zero["loss"]}
        losses |= {"ce_loss_with_sae (default)": ce["loss"], "ce_loss_score": ce["score"]}
        losses |= {"kl_div_with_sae": ce["kl"], "kl_div_with_ablation": zero["kl"]}
        losses |= {"kl_div_score": 1 - ce["kl"] / zero["kl"]}
        shares = {"explained_variance": 1 - found["fvu"], "explained_variance_legacy": 1 - found["fvu"]}
        shares |= {"mse": squared(self.x, dictionary)[torch.from_numpy(self.scored)].mean().item()}
        return {**shares, "cossim": found["cosine"], "l0": found["l0"], "frac_alive": found["alive"], **losses}

    def recomputed(self, dictionary, of_losses=slice(None), of_codes=slice(None)):
        """SAEBench's figures by the rules of WHY, from our activations, codes and losses of these rows."""
        return self._of_codes(dictionary, of_codes) | self._of_losses(dictionary, of_losses)

    def _of_codes(self, dictionary, which):
        parts = []
        kept = torch.from_numpy(self.scored).view(ROWS, LENGTH)[which]
        for mask, x in zip(kept.split(BATCH), self.x.view(ROWS, LENGTH, -1)[which].split(BATCH), strict=True):
            x = x[mask]
            codes = dictionary.encode(x)
            x, x_hat = x.double(), dictionary.decode(codes).double()
            error, energy = (x - x_hat).square().sum(1), x.square().sum(1).mean()
            norms, found, overlap = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)
            part = {
                "error": error.mean(),
                "energy": energy,
                "explained_variance_legacy": (1 - error / (x - x.mean(0)).square().sum(1)).mean(),
                "mse": error.mean() / len(x),
                "cossim": (overlap / norms / found).mean(),
                "l0": codes.l0().double().mean(),
                "l1": codes.values.abs().double().sum(1).mean(),
                "l2_norm_in": norms.mean(),
                "l2_norm_out": found.mean(),
                "l2_ratio": (found / norms).mean(),
                "relative_reconstruction_bias": found.square().mean() / overlap.mean(),
            }
            parts.append(part)
        out = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
        error, energy = out.pop("error"), out.pop("energy")
        out["explained_variance"] = 1 - error / (energy - (energy / dictionary.d) ** 2)
        dense = dictionary.encode(self.x.view(ROWS, LENGTH, -1)[which][kept]).dense()
        used = torch.cat([dense > 0] if dictionary.cfg.get("nonneg") else [dense > 0, dense < 0], 1).any(0)
        return out | {"frac_alive": used.double().mean().item()}

    def _of_losses(self, dictionary, which):
        # One token more, so that `spliced` scores what the last one predicts too; its own place is in no figure.
        rows = [longer(row) for row in self.rows[which]]
        kept = spliced(self.ours, rows, self.hook, {"sae": dictionary.reconstruct})
        every = {"sae (default)": dictionary.reconstruct, "ablation": torch.zeros_like}
        every = spliced(self.ours, rows, self.hook, every, special_tokens=True)
        loss, kl = kept.cross_entropy | every.cross_entropy, kept.kl | every.kl
        there, at = kept.position > 1, kept.position
        out = {f"ce_loss_with_{name}": loss[name][there & (at < LENGTH)].mean() for name in kl}
        out["ce_loss_without_sae"] = clean = loss["clean"][there & (at < LENGTH)].mean()
        ablated = out["ce_loss_with_ablation"]
        out["ce_loss_score"] = (ablated - out["ce_loss_with_sae"]) / (ablated - clean)
        out |= {f"kl_div_with_{name}": kl[name][there].mean() for name in ("sae", "ablation")}
        out["kl_div_score"] = 1 - out["kl_div_with_sae"] / out["kl_div_with_ablation"]
        return {name: float(value) for name, value in out.items()}


def squared(x, dictionary):
    return (x.double() - dictionary.reconstruct(x).double()).square().sum(1)


def longer(row):
    """`row` with one token more, whichever."""
    ends = {name: np.append(getattr(row, name), getattr(row, name)[-1]) for name in ("ids", "starts", "ends")}
    return replace(row, special=np.append(row.special, False), **ends)


def agree(theirs, mine, what, names=None):
    """The largest relative distance of two figures of one name; fails beyond TOLERANCE, naming the figure."""
    most = 0.0
    for name in names or theirs:
        apart = abs(theirs[name] - mine[name]) / max(abs(theirs[name]), 1e-9)
        assert apart <= TOLERANCE, f"{what}: {name} is {theirs[name]:.6g}, and by our rule {mine[name]:.6g}"
        most = max(most, apart)
    return most


def judged(bench, dictionary, what):
    """SAEBench's figures of `dictionary` and the same by our rules, which were found to agree; how far apart."""
    found = bench.saebench(dictionary)
    found = {name: value for name, value in found.items() if not name.startswith("total_tokens")}
    found["ce_loss_with_sae (default)"] = bench.saebench(dictionary, exclude=False)["ce_loss_with_sae"]
    mine = bench.recomputed(dictionary)
    assert found.keys() == mine.keys(), sorted(found.keys() ^ mine.keys())
    return found, agree(found, mine, what)


def check_rewinding(bench, dictionary):
    """SAEBench rewinds its rows before it measures sparsity, so it means: it reads on, and so of other rows."""
    found, half = bench.saebench(dictionary, batches=1), ROWS // 2
    mine = bench.recomputed(dictionary, slice(None, half), slice(half, None))
    agree(found, mine, "second half", ("explained_variance", "l0", "cossim", "ce_loss_with_sae", "ce_loss_without_sae"))


def variants(d, x):
    """The dictionary `d` as one of each kind; that of the table first."""
    yield "mp", d
    yield "centred", replace(d, mean=x.mean(0))
    yield "nonneg", replace(d, cfg=d.cfg | {"nonneg": True})
    yield from ((method, replace(d, cfg=d.cfg | {"method": method})) for method in ("omp", "gp"))


def table(found, lens, mine):
    """Lines of the table: theirs, ours, and the rule by which one becomes the other."""
    lines = ["| quantity | SAEBench | SAELens | itda | SAEBench - itda | what SAEBench does |"]
    lines += ["|---|---:|---:|---:|---:|---|"]
    for name in [*(name for name in WHY if name in mine), *(name for name in found if name not in mine)]:
        cells = [cell(found[name]), cell(lens.get(name)), cell(mine.get(name))]
        cells += [cell(found[name] - mine[name], "+") if name in mine else "", WHY.get(name, "")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def cell(value, sign=""):
    return "" if value is None else f"{value:{sign}.3g}" if abs(value) < 1e-3 and value else f"{value:{sign}.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported, which nothing has done yet
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    bench = Bench()
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(layer=LAYER, k=10, n_atoms=512, tokens=20_000, context_length=LENGTH)
        itda.train(demo.model_path(), bench.train_texts, Path(folder) / "d", **settings)
        d = itda.ITDA.load(Path(folder) / "d")
    apart, tables = {}, {}
    for what, dictionary in variants(d, bench.x):
        found, apart[what] = judged(bench, dictionary, what)
        tables[what] = {"saebench": found, "itda": bench.itda(dictionary)}
    check_rewinding(bench, d)
    lens, twice = bench.saelens(d)
    found, mine = tables["mp"]["saebench"], tables["mp"]["itda"]
    losses = [name for name in found if name.startswith(("ce_", "kl_")) and name in lens]
    own = {"explained_variance": mine["explained_variance"], "mse": mine["mse"], "l0": mine["l0"] + twice}
    apart["SAELens"] = agree(lens, found | own, "SAELens", [*own, "explained_variance_legacy", "cossim", *losses])
    tables["mp"]["saelens"] = lens

    tokens = int(bench.scored.sum())
    packages = {name: version(name) for name in ("sae-bench", "sae-lens", "transformer-lens", "torch", "numpy")}
    print(f"{d!r}: {tokens:,} held-out tokens in {ROWS} rows of {LENGTH}, BOS left out")
    print(", ".join(f"{name} {number}" for name, number in packages.items()), end="\n\n")
    print(*table(found, lens, mine), sep="\n", end="\n\n")
    print("SAELens:", *(f"{name}: {why}." for name, why in WHY_SAELENS.items()), f"Here {twice:.4f} times a token.")
    energy = bench.x[torch.from_numpy(bench.scored)].double().square().sum(1).mean().item()
    print(f"SAEBench's explained_variance depends on the unit: it passes 1 once E‖x‖², here {energy:,.0f}, is over")
    print(f"d² = {d.d**2:,}; over E‖x‖² alone it would be {1 - mine['mse'] / energy:.4f}.")
    print("SAEBench means to rewind between the two parts, and reads on: losses and codes can be of different rows.")
    said = ", ".join(f"{what} {distance:.0e}" for what, distance in apart.items())
    print(f"Recomputed by these rules from our activations, codes and losses, relative distance at most: {said}.")
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"packages": packages, "tokens": tokens, "tables": tables, "twice": twice, "apart": apart, "why": WHY}
    (args.out / "interop.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
