"""Which dictionaries find directions that are known? Tokens are sums of few of 2,000 directions in 256 dimensions.

    python benchmarks/truth.py [--quick] [--only KIND ...] [--seeds 0 1 2]

Directions are spread until the mean of their largest overlaps is 0.13. Direction i is active in a token with
probability proportional to i^-0.8, twelve are on average, each with strength 1 + 0.3 N(0, 1); nothing else is in a
token. Held out are 5,000 tokens. Of every dictionary: MCC, the mean of |cos| of directions and atoms over the best
matching of one to one; the share of directions that some atom comes within |cos| > 0.9 of; F1 of the matched atom as a
detector of its direction, the mean over directions active in at least five held-out tokens; and FVU. `directions`
are the truth itself, what pursuit makes of it. Seconds are of the processor, one thread.
"""

import time

import numpy as np
import shared
import torch
from scipy.optimize import linear_sum_assignment

import itda
from itda.dictionary.refine import refine

N, D, L0, ZIPF, OVERLAP, SPREAD = 2000, 256, 12, 0.8, 0.13, 0.3
HELD, BLOCK, STEPS = 5000, 10_000, 500


def directions(n, d, seed):
    """Unit rows (n, d), moved apart `STEPS` times or until the mean of their largest overlaps is `OVERLAP`."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(n, d, generator=generator).requires_grad_(True)
    step = torch.optim.Adam([f], lr=0.003)
    for _ in range(STEPS):
        unit = torch.nn.functional.normalize(f, dim=1)
        overlap = (unit @ unit.T - torch.eye(n)).abs()
        if float(overlap.detach().amax(1).mean()) <= OVERLAP:
            break
        step.zero_grad()
        (overlap**6).sum().pow(1 / 6).backward()
        step.step()
    return unit.detach()


def rates(n):
    """How often each direction is active (n,): `L0` in a token on average, none in more than half of the tokens."""
    p = torch.arange(1, n + 1).double() ** -ZIPF
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((p * middle).clamp(max=0.5).sum()) < L0 else (low, middle)
    return (p * low).clamp(max=0.5).float()


def tokens(f, count, seed):
    """Blocks of activations (tokens, d) and strengths (tokens, n), `count` tokens in all."""
    generator, rate = torch.Generator().manual_seed(seed), rates(len(f))
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        active = torch.rand(size, len(f), generator=generator) < rate
        strength = active * (1 + SPREAD * torch.randn(size, len(f), generator=generator)).clamp(min=0.1)
        yield strength @ f, strength


def figures(d, f, held):
    """MCC, found, F1 and FVU of the dictionary `d` for directions `f`, on held-out (activations, strengths)."""
    x, strength = held
    cosine = d.atoms @ f.T
    atoms, matched = linear_sum_assignment(-cosine.abs().numpy())
    codes = d.encode(x)
    used = codes.dense()[:, torch.from_numpy(atoms)] * cosine[atoms, matched].sign() > 0
    truth = strength[:, torch.from_numpy(matched)] > 0
    often = truth.sum(0) >= 5
    both = (used & truth).sum(0) / (0.5 * (used.sum(0) + truth.sum(0))).clamp_min(1)
    rest, spread = x - d.decode(codes), x - x.mean(0)
    return dict(
        n_atoms=len(d),
        mcc=float(cosine.abs().numpy()[atoms, matched].sum() / len(f)),
        found=float((cosine.abs().amax(0) > 0.9).float().mean()),
        f1=float(both[often].mean()),
        fvu=float(rest.square().sum() / spread.square().sum()),
    )


def plain(atoms):
    """The dictionary of these unit rows, not centred."""
    return itda.ITDA(atoms, None, L0, None, torch.ones(len(atoms)), torch.ones(len(atoms)))


def random_tokens(x, n):
    drawn = np.random.default_rng(7).permutation(len(x))[:n]
    return plain(itda.normalize(x[torch.from_numpy(drawn)]))


def k_means(x, n, passes=10):
    """Spherical: every token belongs to the centre of largest |cosine|."""
    centres, unit = random_tokens(x, n).atoms, itda.normalize(x)
    for _ in range(passes):
        nearest = torch.cat([(part @ centres.T).abs().argmax(1) for part in unit.split(8192)])
        signs = (unit * centres[nearest]).sum(1).sign()
        sums = torch.zeros_like(centres).index_add_(0, nearest, unit * signs[:, None])
        centres = itda.normalize(torch.where(sums.any(1)[:, None], sums, centres))
    return plain(centres)


def kinds(f, x, many, n):
    """Name and maker of each dictionary: of `x` (tokens, d), or of `many()`, blocks of ten times as many tokens."""
    yield "directions", 0, lambda: plain(f)
    for size in (n, 2 * n):
        yield "random tokens", len(x), lambda size=size: random_tokens(x, size)
        yield "Algorithm 1", len(x), lambda size=size: itda.build(x, k=L0, n_atoms=size, center=False)
        yield "spherical k-means", len(x), lambda size=size: k_means(x, size)
        for passes in (3, 10, 30):
            yield (
                f"random tokens, refined {passes}",
                len(x),
                lambda size=size, passes=passes: refine(random_tokens(x, size), x, passes=passes),
            )
        yield (
            "Algorithm 1, refined 10",
            len(x),
            lambda size=size: refine(itda.build(x, k=L0, n_atoms=size, center=False), x, passes=10),
        )
        yield (
            "drawn and moved in one pass",
            10 * len(x),
            lambda size=size: itda.build(many(), k=L0, n_atoms=size, center=False, admission="online"),
        )


def main():
    parser = shared.parser(__doc__, "a tenth of the directions and of the tokens, to see that it runs")
    parser.add_argument("--only", nargs="+", default=[], help="begin of a kind's name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=30_000, help="a tenth of what is read in one pass")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n, d, count = (N // 10, D // 4, args.tokens // 10) if args.quick else (N, D, args.tokens)
    results = shared.Results("truth", args)
    print("| dictionary | atoms | tokens | MCC | found | F1 | FVU | seconds |\n|---|" + "---:|" * 7, flush=True)
    for seed in args.seeds:
        f = directions(n, d, seed)
        x = torch.cat([part for part, _ in tokens(f, count, 100 + seed)])
        held = tuple(map(torch.cat, zip(*tokens(f, HELD, 200 + seed), strict=True)))

        def many(f=f, seed=seed):
            return (part for part, _ in tokens(f, 10 * count, 300 + seed))

        for number, (name, seen, make) in enumerate(kinds(f, x, many, n)):
            key = f"{name}, {number}, {seen} tokens, seed {seed}"
            if args.only and not any(name.startswith(wanted) for wanted in args.only):
                continue
            if key not in results.rows:
                began = time.process_time()
                made = make()
                seconds = time.process_time() - began
                results.keep(key, tokens=seen, seconds=seconds, **shared.stamp(), **figures(made, f, held))
            row = results.rows[key]
            cells = [f"{row[c]:.3f}" for c in ("mcc", "found", "f1", "fvu")]
            print(
                f"| {name} | {row['n_atoms']:,} | {seen:,} | {' | '.join(cells)} | {row['seconds']:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
