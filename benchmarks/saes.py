"""SAEs of `itda sae`: how good and how fast, beside SAELens' trainer, and what a dictionary gives to begin with.

    python benchmarks/saes.py [--quick] [--only kinds start speed] [--at seed0:2 gemma3:9] [--most 600]

kinds   FVU, CE score, tails and alive latents of every kind at one L0, with the same tokens, beside SAELens' trainer
start   the same with the first latents random, random tokens, a dictionary and one whose atoms moved, of whose making
        the seconds are counted, at a sixteenth, a quarter and all of the tokens
speed   tokens a second of the two trainers, in turn, on activations in memory; that both reach the same error is
        asserted first

Activations and held-out tokens are those of quality.py. Seconds are of the processor; speeds of the clock, so that
nothing else may run beside. Rows are added to saes.json as they come.
"""

import argparse
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import quality
import shared
import torch
from quality import Place, random_tokens, timed, train_sae

import itda
from itda.dictionary.refine import refine
from itda.evaluation.systems import System
from itda.saes.fit import Fit
from itda.saes.learner import Aim

KINDS = ("topk", "batchtopk", "relu", "mp", "top-afa")
PEERS = ("topk", "batchtopk")
STARTED = ("topk", "batchtopk", "mp")
FRACTIONS = (16, 4, 1)
AGREE = 1.1  # the error of ours beside that of SAELens, at most
ROUNDS = 3


def aim_of(kind, k):
    return {"top-afa": dict(afa=1 / 16)}.get(kind, dict(k=k))


def kinds(place, args):
    """Every kind, with all of the tokens."""
    x, n, k, tokens = place.train, args.n_atoms, args.k, args.tokens

    def ours(kind):
        sae, seconds = timed(lambda: train_sae(kind, x, n, tokens, **aim_of(kind, k)))
        return place.row(replace(System.of_sae(sae, kind), k=k), seconds, tokens)

    def theirs(kind):
        from itda.interop.saelens import system_of

        sae, seconds = timed(lambda: saelens(kind, x, n, tokens, k))
        return place.row(replace(system_of(sae, f"{kind}, SAELens"), k=k), seconds, tokens)

    for kind in args.kinds:
        yield kind, partial(ours, kind)
    for kind in PEERS if args.peers else ():
        yield f"{kind}, SAELens", partial(theirs, kind)
    for passes in (0, 3):
        yield f"itda, {passes} passes", partial(dictionary, place, args, passes)


def dictionary(place, args, passes):
    """A dictionary of the same size and k, of a tenth of the tokens: what an SAE has to be better than."""
    first, seconds = made(place, args, passes)
    name = f"itda, refined, {passes} passes" if passes else "itda"
    return place.row(System.of(first, name, k=args.k), seconds, min(len(place.train), args.tokens // 10))


def made(place, args, passes):
    """The dictionary after so many passes and the seconds it took."""
    some = place.train[: args.tokens // 10]
    n = args.n_atoms

    def make():
        built = itda.build(some, k=args.k, n_atoms=n, max_atoms=n)
        return refine(built, some, passes=passes) if passes else built

    return timed(make)


def start(place, args):
    """The first latents, and how many of the tokens follow."""

    def row(kind, name, fraction):
        begun = {
            "random directions": lambda: (None, 0.0),
            "random tokens": lambda: (random_tokens(place, args.n_atoms, args.k), 0.0),
            "an ITDA": lambda: made(place, args, 0),
            "an ITDA, 3 passes": lambda: made(place, args, 3),
        }[name]
        first, before = begun()
        tokens = args.tokens // fraction
        sae, seconds = timed(lambda: train_sae(kind, place.train, args.n_atoms, tokens, args.k, start=first))
        system = replace(System.of_sae(sae, f"{kind} from {name}"), k=args.k)
        return place.row(system, before + seconds, tokens)

    for kind in STARTED:
        for name in ("random directions", "random tokens", "an ITDA", "an ITDA, 3 passes"):
            for fraction in FRACTIONS:
                yield f"{kind} from {name}, 1/{fraction}", partial(row, kind, name, fraction)


def speed(place, args):
    """Tokens a second of the two loops."""
    x, n, k = place.train, args.n_atoms, args.k
    steps = 20 if args.quick else 100

    def row(kind):
        errors = {}
        for name, sae in (
            ("ours", train_sae(kind, x, n, args.tokens, k)),
            ("SAELens", saelens(kind, x, n, args.tokens, k)),
        ):
            with torch.no_grad():
                x_hat = sae.decode(sae.encode(place.held))
            errors[name] = float((place.held - x_hat).square().sum() / (place.held - place.held.mean(0)).square().sum())
        assert errors["ours"] <= AGREE * errors["SAELens"], errors
        seconds = {"ours": [], "SAELens": []}
        for _ in range(ROUNDS):
            for name, run in (("ours", our_loop(kind, x, n, steps, k)), ("SAELens", their_loop(kind, x, n, steps, k))):
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        rate = {name: steps * quality.BATCH / float(np.median(taken)) for name, taken in seconds.items()}
        row = dict(at=place.name, kind=kind, n_atoms=n, k=k, ratio=rate["ours"] / rate["SAELens"])
        row |= {f"{name}, tokens/s": figure for name, figure in rate.items()}
        return row | {f"{name}, FVU": error for name, error in errors.items()}

    for kind in PEERS:
        yield kind, partial(row, kind)


def our_loop(kind, x, n, steps, k):
    """A training of so many steps, begun and not yet run."""
    fit = Fit(x, [Aim(kind, n, 10**9, k)], tokens=steps * quality.BATCH, batch=quality.BATCH, buffer=len(x), seed=0)
    fit.begin()
    return lambda: fit.run(lambda now: None, lambda: False, lambda stopping: None)


def their_loop(kind, x, n, steps, k):
    trainer, _ = saelens_trainer(kind, x, n, steps * quality.BATCH, k)

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit()

    return run


def saelens(kind, x, n, samples, k):
    """An SAE of SAELens' trainer for activations as they are."""
    trainer, scale = saelens_trainer(kind, x, n, samples, k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return unscaled(trainer.fit(), scale)


def saelens_trainer(kind, x, n, samples, k):
    """SAELens' trainer over random rows of `x`, and what these are scaled by; learning rate decayed over a fifth."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    classes = {
        "topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig),
        "batchtopk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig),
    }
    sae_class, cfg_class = classes[kind]
    torch.manual_seed(0)
    sae = sae_class(cfg_class(d_in=x.shape[1], d_sae=n, apply_b_dec_to_input=True, k=k))
    sae.b_dec.data.copy_(x[:65536].mean(0))
    scale = float(x.shape[1] ** 0.5 / x[:4096].norm(dim=1).mean())  # as for the learning rate that is usual
    sae.b_dec.data.mul_(scale)
    batch = quality.BATCH

    def batches():
        for number in count():
            yield scale * x[torch.from_numpy(np.random.default_rng(number).integers(len(x), size=batch))]

    steps = max(1, samples // batch)
    cfg = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=1e-3,
        lr_end=1e-4,
        lr_decay_steps=steps // 5,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg, sae, batches()), scale


def unscaled(sae, scale):
    """The SAE for activations as they are."""
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        inference = SAE.load_from_disk(folder)
    inference.fold_activation_norm_scaling_factor(scale)
    return inference.eval()


SECTIONS = {f.__name__: f for f in (kinds, start, speed)}


def main():
    parser = shared.parser(__doc__, "few tokens, to see where it goes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--at", nargs="+", default=["seed0:2"], help="model:layer")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="SAELens' trainer too")
    parser.add_argument("--n-atoms", type=int, default=2048)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=600_000, help="to train on, again and again")
    parser.add_argument("--held", type=int, default=20_000, help="tokens to measure on")
    parser.add_argument("--rows", type=int, default=100, help="rows to splice into")
    parser.add_argument("--most", type=int, help="rows of each text; all if not given")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.held, args.rows, args.most = 60_000, 4000, 16, 200
    results = shared.Results("saes", args)
    for place in (Place(name, args) for name in args.at):
        for name in args.only:
            print(f"\n## {name} at {place.name}\n\n{SECTIONS[name].__doc__}", flush=True)
            rows = []
            for what, make in SECTIONS[name](place, args):
                key = f"{name} at {place.name}, {args.n_atoms} latents, k {args.k}, {args.tokens} tokens: {what}"
                if key not in results.rows:
                    results.keep(key, **make(), **shared.stamp())
                rows.append(
                    {c: v for c, v in results.rows[key].items() if c not in ("command", "threads", "cpu", "at")}
                )
                print(quality.table(rows[-1:]), flush=True)
            print(f"\n{quality.table(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
