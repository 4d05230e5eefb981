"""From text to saved dictionary on the two real models: where the time goes, beside the bare forward pass.

    make real-models && python benchmarks/end_to_end.py [--quick] [--models gemma3 ...] [--sizes 4096 16384]

The bare forward pass is transformers' own model, cut after the block that is read, on the same batches of ids with
their mask. Reading is what `itda.activations` does: tokenising, the forward pass, the labels. Training is `itda.train`
where nothing else is said, from a loaded model and a text to a folder. Activations of both ways are asserted to be
the same before anything is timed. Ratios are of processor seconds in one run, the smaller of two rounds.
"""

import itertools
import shutil
import tempfile
import time
from collections import deque
from pathlib import Path

import real_models
import shared
import torch

import itda
from itda.models import loading
from itda.text.prompts import TokenStream

LAYERS = {"smollm2": 15, "gemma3": 9}


def seconds(function):
    """Processor seconds that `function` takes."""
    began = time.process_time()
    function()
    return time.process_time() - began


def consume(items):
    for _ in items:
        pass


def bare(folder, layer, dtype):
    """transformers' own model, cut after block `layer`, without its last norm."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=dtype, num_hidden_layers=layer + 1)
    model.norm = torch.nn.Identity()
    return model.eval()


@torch.no_grad()
def run(model, groups):
    return [
        model(input_ids=group.ids, attention_mask=group.mask, use_cache=False).last_hidden_state for group in groups
    ]


def measured(name, args):
    folder, layer = real_models.ensure(name), LAYERS[name]
    model = loading.load_model(folder, hooks=[layer])
    dtype = next(model._base.parameters()).dtype
    text = args.data / "moby_dick.txt"
    reading = itda.activations(model, text, layer=layer, tokens=args.tokens, seed=0)
    groups = list(reading._groups(deque()))
    plain = bare(folder, layer, dtype)
    one = next(iter(reading)).activations
    theirs = run(plain, groups[:1])[0]
    assert torch.equal(one[:100], theirs[groups[0].mask.bool()][1:101]) or torch.allclose(
        one[:100].float(), theirs[groups[0].mask.bool()][1:101].float(), rtol=0.02, atol=1
    )
    del theirs
    found, rows = {}, TokenStream(text, model.tokenizer, seed=0)

    def least(what, function):
        found[what] = min(found.get(what, float("inf")), seconds(function))

    for _ in range(1 if args.quick else 2):
        least("forward", lambda: consume(run(plain, [group]) for group in groups))
        least("tokenising", lambda: consume(itertools.islice(rows, sum(len(g.ids) for g in groups))))
        least("reading", lambda: consume(reading))
        for size in args.sizes:
            with tempfile.TemporaryDirectory() as place:
                out = Path(place) / "d"
                least(
                    f"training, {size:,} atoms",
                    lambda out=out, size=size: itda.train(
                        model, text, out, layer=layer, tokens=args.tokens, seed=0, n_atoms=size
                    ),
                )
                shutil.rmtree(out)
    return found | {"tokens": args.tokens, "dtype": str(dtype)}


def main():
    parser = shared.parser(__doc__, "few tokens, to see that it runs")
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 16_384])
    parser.add_argument("--tokens", type=int, default=200_000)
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.sizes = 4000, [256]
    results = shared.Results("end_to_end", args)
    print(f"{shared.processor()}, {torch.get_num_threads()} threads\n")
    for name in args.models:
        found = measured(name, args)
        results.keep(name, **shared.stamp(), **found)
        print(f"| {name}, {args.tokens:,} tokens, {found['dtype']} | seconds | of the forward pass |\n|---|---:|---:|")
        for what in (key for key, value in found.items() if isinstance(value, float)):
            print(f"| {what} | {found[what]:.1f} | {found[what] / found['forward']:.2f} |", flush=True)
        print()


if __name__ == "__main__":
    main()
