"""What makes the decomposition of one token readable: which vector is decomposed, into how many atoms, with what signs.

    make real-models && python benchmarks/readable.py [--quick] [--at smollm2:15 gemma3:9]

Of the activations after a block: as they are; less the mean of all tokens with that id; less what a linear map of the
embedding explains; what the block adds; its attention's and MLP's outputs. Each with atoms that are random tokens, and
with these refined three times. FVU is of the vector that is decomposed, and of the activation where what was taken out
can be put back. The judge is that of real.py; it is asked too by the words around alone and by the token alone.
The last line of each is what the token " is" of "The capital of France is" consists of.
"""

import numpy as np
import real
import real_models
import shared
import torch

import itda
from itda.dictionary.refine import refine
from itda.evaluation.systems import System
from itda.labels import Labels

BLOCKS = {"smollm2": 15, "gemma3": 9}
SENTENCE = "The capital of France is"
RARE = 8  # tokens with an id, below which the mean of all stands for theirs


class Inside:
    """All that is read in and around one block, of training and held-out text."""

    def __init__(self, name, layer, args):
        self.hooks = ["model.embed_tokens", f"model.layers.{layer - 1}", f"model.layers.{layer}"]
        self.hooks += [f"model.layers.{layer}.mlp", f"model.layers.{layer}.self_attn"]
        folder, where = real_models.ensure(name), real.texts(args.data, args.folder / "texts")
        self.parts = {}
        for part, tokens in (("train", args.tokens), ("in", args.held)):
            store = args.folder / "activations" / f"{name}-inside-{part}"
            if real.held_by(store) < tokens:
                how = dict(hook=self.hooks, tokens=tokens, seed=0, dtype="bfloat16")
                itda.collect(folder, where / part, out=store, **how)
            self.parts[part] = read(store, self.hooks, tokens)
        stream = itda.activations(folder, [SENTENCE], hook=self.hooks, dtype="bfloat16")
        items = next(iter(stream))
        self.parts["sentence"] = (
            {hook: items[hook].activations.float() for hook in self.hooks},
            items[self.hooks[0]].labels,
        )

    def vectors(self, kind, part):
        """The vectors to decompose, (tokens, d), and what was taken out of the activation, None for another vector."""
        acts, labels = self.parts[part]
        embedding, before, after, mlp, attention = (acts[hook] for hook in self.hooks)
        if kind == "the activation":
            return after, torch.zeros_like(after)
        if kind == "less the mean of its token":
            out = self.means()[torch.from_numpy(labels.token_id)]
            return after - out, out
        if kind == "less a linear map of the embedding":
            out = embedding @ self.map()
            return after - out, out
        return {"what the block adds": after - before, "output of the MLP": mlp, "output of attention": attention}[
            kind
        ], None

    def means(self):
        acts, labels = self.parts["train"]
        x, ids = acts[self.hooks[2]], torch.from_numpy(labels.token_id)
        most = 1 + max(int(other.token_id.max()) for _, other in self.parts.values())
        sums = torch.zeros(most, x.shape[1]).index_add_(0, ids, x)
        count = torch.bincount(ids, minlength=most)[:, None]
        return torch.where(count >= RARE, sums / count.clamp_min(1), x.mean(0))

    def map(self):
        acts, _ = self.parts["train"]
        e, x = acts[self.hooks[0]].double(), acts[self.hooks[2]].double()
        keep = x.norm(dim=1) <= 5 * x.norm(dim=1).median()  # massive tokens would decide it
        e, x = e[keep], x[keep]
        gram = e.T @ e
        return torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)), e.T @ x).float()


def read(store, hooks, tokens):
    found, labels, count = {hook: [] for hook in hooks}, [], 0
    for item in itda.Store(store, hook=hooks):
        size = min(len(item[hooks[0]].labels), tokens - count)
        for hook in hooks:
            found[hook].append(item[hook].activations[:size].float())
        labels.append(item[hooks[0]].labels[:size])
        count += size
        if count == tokens:
            break
    return {hook: torch.cat(parts) for hook, parts in found.items()}, Labels.concat(labels)


KINDS = ("the activation", "less the mean of its token", "less a linear map of the embedding", "what the block adds")
KINDS += ("output of the MLP", "output of attention")


def rows(inside, kind, args, judge, at):
    train, labels = inside.vectors(kind, "train")[0], inside.parts["train"][1]
    held, out = inside.vectors(kind, "in")
    held_labels = inside.parts["in"][1]
    usual = train.norm(dim=1) <= 5 * train.norm(dim=1).median()
    mean = train[usual].mean(0)
    for n, k, nonneg, passes in (
        (2048, 40, False, 0),
        (2048, 40, False, 3),
        (2048, 10, False, 3),
        (2048, 10, True, 3),
        (8192, 10, False, 3),
        (8192, 40, False, 3),
    ):
        if args.quick:
            n = n // 16
        drawn = np.sort(np.random.default_rng(7).permutation(len(train))[:n])
        atoms, ones = itda.normalize(train[torch.from_numpy(drawn)] - mean), torch.ones(n)
        d = itda.ITDA(atoms, labels[drawn], k, mean, ones, ones, cfg={"method": "mp", "nonneg": nonneg})
        if passes:
            d = refine(d, train, passes=passes)
        rest = torch.cat([x - d.decode(d.encode(x)) for x in held.split(4096)])
        keep = held.norm(dim=1) <= 5 * held.norm(dim=1).median()

        found = judge.read(System.of(d, kind), d.labels, (train, labels), (held, held_labels), mean)
        found |= dict(at=at, kind=kind, n_atoms=n, k=k, nonneg=nonneg, passes=passes, fvu=fvu(rest[keep], held[keep]))
        found["fvu of the activation"] = None if out is None else fvu(rest[keep], (held + out)[keep])
        found["example"] = example(d, inside, kind)
        yield found


def fvu(rest, whole):
    return float(rest.square().sum() / (whole - whole.mean(0)).square().sum())


def example(d, inside, kind, n=5):
    """The atoms of the sentence's last token, largest first: coefficient, share of |x - mean|^2, label."""
    x = inside.vectors(kind, "sentence")[0][-1:]
    codes, total = d.encode(x), float((x - d.mean).square().sum())
    order = codes.values[0].abs().argsort(descending=True)[:n].tolist()
    picked = ((float(codes.values[0, i]), d.labels.text(int(codes.indices[0, i]), 30, 10)) for i in order)
    return [f"{value:+.1f} ({value * value / total:.0%}) {text}" for value, text in picked]


COLUMNS = ("n_atoms", "k", "nonneg", "passes", "fvu", "fvu of the activation", "first 3", "auc", "auc of context")
COLUMNS += ("auc of token", "auc by label")


def table(found):
    lines = ["| vector | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for row in found:
        cells = (row[name] for name in COLUMNS)
        lines.append(
            f"| {row['kind']} | " + " | ".join(real.figure(c) if isinstance(c, float) else str(c) for c in cells) + " |"
        )
    return "\n".join(lines)


def main():
    parser = shared.parser(__doc__, "small sizes, to see that it runs")
    parser.add_argument("--at", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    real.flags(parser)
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.held = 5000, 2000
    args.tokens = min(args.tokens, 60_000)
    results = shared.Results("readable", args)
    for name in args.at:
        inside, judge = None, real.Judge()
        for kind in KINDS:
            key = f"{name}, block {BLOCKS[name]}: {kind}"
            if key not in results.rows:
                inside = inside or Inside(name, BLOCKS[name], args)
                results.keep(key, **shared.stamp(), rows=list(rows(inside, kind, args, judge, name)))
            print(f"\n## {key}\n\n{table(results.rows[key]['rows'])}\n", flush=True)
            for row in results.rows[key]["rows"]:
                print(row["n_atoms"], row["k"], row["nonneg"], row["passes"], *row["example"], sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
