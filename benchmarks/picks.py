"""Ways to pick 2,048 real activations of 60,000 as atoms: FVU of 20,000 held-out tokens at L0 10, 20 and 40.

    python benchmarks/picks.py --data DATA [--at seed0:2] [--only random leverage ...]

The table is in docs/LOG.md. Seconds are of the processor, for picking from activations in memory.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from quality import Place, chosen, plain, timed
from torch.nn.functional import normalize

from itda.dictionary.refine import select
from itda.metrics import fvu, relative_error

TOKENS, ATOMS, K, MORE, ROUNDS = 60_000, 2_048, 20, 6, 8


class Picker:
    """Activations of one place, less their mean, and the ways to pick `n` of them: row numbers, best first."""

    def __init__(self, place):
        self.x, self.mean = place.train[:TOKENS], place.train[: 8 * ATOMS].mean(0)
        self.centred = self.x - self.mean
        self.unit = normalize(self.centred, dim=1)
        self.generator = np.random.default_rng(0)

    def of(self, rows):
        return plain(self.centred[rows], K, self.mean)

    def random(self, n):
        return torch.arange(n)

    def farthest(self, n):
        """Each the one whose largest |cosine| with those before is least."""
        nearest, rows = torch.full((len(self.unit),), -1.0), [0]
        for _ in range(n - 1):
            nearest = torch.maximum(nearest, (self.unit @ self.unit[rows[-1]]).abs())
            rows.append(int(nearest.argmin()))
        return torch.tensor(rows)

    def scores(self):
        """x' (X'X)^-1 x of every row."""
        exact = self.centred.double()
        return (exact @ torch.linalg.inv(exact.T @ exact) * exact).sum(1)

    def drawn(self, weights, n):
        return torch.from_numpy(
            self.generator.choice(len(weights), n, replace=False, p=(weights / weights.sum()).numpy())
        )

    def leverage(self, n):
        return self.drawn(self.scores(), n)

    def highest(self, n):
        return self.scores().topk(n).indices

    def apart(self, limit, n):
        """The first ones, none with a |cosine| above `limit` to one before."""
        kept, rows = torch.zeros(n, self.unit.shape[1]), []
        for i, one in enumerate(self.unit):
            if not rows or float((kept[: len(rows)] @ one).abs().max()) < limit:
                kept[len(rows)] = one
                rows.append(i)
                if len(rows) == n:
                    break
        return torch.tensor(rows)

    def left(self, model):
        """What a dictionary leaves of every activation."""
        return self.x - model.decode(model.encode(self.x, k=K))

    def worst(self, n):
        """In rounds, those of largest relative error."""
        rows = torch.arange(n // ROUNDS)
        for _ in range(ROUNDS - 1):
            loss = relative_error(self.x, self.x - self.left(self.of(rows)))
            loss[rows] = 0
            rows = torch.cat([rows, loss.topk(n // ROUNDS).indices])
        return rows

    def by_error(self, n, rounds=ROUNDS):
        """In rounds, some drawn by squared error."""
        rows = torch.arange(n // rounds)
        for _ in range(rounds - 1):
            loss = self.left(self.of(rows)).square().sum(1).double()
            loss[rows] = 0
            rows = torch.cat([rows, self.drawn(loss, n // rounds)])
        return rows

    def quantile(self, n, first=256, batch=1024):
        """Of every batch the same number, those of largest relative error."""
        rows = list(range(first))
        each = round((n - first) * batch / (len(self.x) - first))
        for start in range(first, len(self.x), batch):
            part, model = self.x[start : start + batch], self.of(torch.tensor(rows))
            loss = relative_error(part, model.decode(model.encode(part, k=K)))
            rows += (start + loss.topk(min(each, n - len(rows), len(part))).indices).tolist()
        return torch.tensor(rows)

    def regrown(self, model, n, more, rounds):
        """Rounds of so many `more` atoms, drawn by squared error, and pruned to `n` again."""
        for _ in range(rounds):
            rows = self.drawn(self.left(model).square().sum(1).double(), more)
            model = select(plain(torch.cat([model.atoms, self.centred[rows]]), K, self.mean), self.x, n)
        return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--at", default="seed0:2")
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    args.held, args.rows = 20_000, 2
    place = Place(args.at, args)
    pick = Picker(place)
    ways = {name: getattr(pick, name) for name in ("random", "farthest", "leverage", "highest", "worst", "by_error")}
    ways |= {f"apart {limit}": lambda n, limit=limit: pick.apart(limit, n) for limit in (0.95, 0.9, 0.8)}
    ways = {name: lambda way=way: pick.of(way(ATOMS)) for name, way in (ways | {"quantile": pick.quantile}).items()}
    ways["select of admission"] = lambda: chosen(pick.x, K, ATOMS, MORE)
    for name, way in (("random", pick.random), ("farthest", pick.farthest), ("leverage", pick.leverage)):
        ways[f"select of {name}"] = lambda way=way: select(pick.of(way(MORE * ATOMS)), pick.x, ATOMS)
    ways["select of by_error"] = lambda: select(pick.of(pick.by_error(MORE * ATOMS, MORE)), pick.x, ATOMS)
    ways["admission, regrown"] = lambda: pick.regrown(chosen(pick.x, K, ATOMS, MORE), ATOMS, ATOMS // 4, 4)
    ways["random, regrown"] = lambda: pick.regrown(pick.of(pick.random(ATOMS)), ATOMS, ATOMS, 5)
    print("| atoms | 10 | 20 | 40 | 99 %, 99.9 % of errors | seconds |\n|---|---:|---:|---:|---:|---:|")
    for name, way in ways.items():
        if args.only and name not in args.only:
            continue
        model, seconds = timed(way)
        found = {k: model.decode(model.encode(place.held, k=k)) for k in (10, 20, 40)}
        values = " | ".join(f"{fvu(place.held, x_hat):.4f}" for x_hat in found.values())
        tails = np.quantile(relative_error(place.held, found[K]).numpy(), (0.99, 0.999))
        print(f"| {name} | {values} | {tails[0]:.3f}, {tails[1]:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
