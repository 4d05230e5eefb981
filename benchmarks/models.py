"""Language models of other shapes than those at hand, trained here: nothing should be tuned to one set of five.

    python benchmarks/models.py --data DATA --out MODELS [--kinds llama4 gpt8] [--seeds 0 1 2] [--steps 600]

Each takes minutes on two cores. They share the tokenizer of `DATA/lms/seed0` and are trained on its texts, less the
last 100,000 tokens of the last one, which stay for evaluation.
"""

import argparse
import math
from pathlib import Path

import torch

CONTEXT, ROWS, STEPS, PEAK = 128, 16, 600, 3e-3
KINDS = {
    "llama4": (
        "llama",
        dict(num_hidden_layers=4, hidden_size=96, intermediate_size=256, num_attention_heads=4),
        "Llama, 4 blocks, d = 96",
    ),
    "gpt8": ("gpt2", dict(n_layer=8, n_embd=96, n_head=4, n_positions=CONTEXT), "GPT-2, 8 blocks, d = 96"),
}
TEXTS = ("moby_dick.txt", "pride_and_prejudice.txt", "wikitext2_valid.txt")


def tokens_of(data, tokenizer, held_out=100_000):
    """The ids of all texts less the last `held_out`."""
    ids = []
    for name in TEXTS:
        ids += tokenizer((data / name).read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:-held_out])


def build(kind, tokenizer, seed):
    """A model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, sizes, _ = KINDS[kind]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, **sizes
    )
    config.max_position_embeddings = CONTEXT
    return AutoModelForCausalLM.from_config(config)


def train(model, ids, steps, seed, peak=PEAK):
    """AdamW with a cosine decay on rows drawn at random, each opened by BOS; the mean loss of the last tenth."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 40) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        starts = torch.randint(len(ids) - CONTEXT, (ROWS,), generator=generator)
        rows = torch.stack([ids[start : start + CONTEXT - 1] for start in starts.tolist()])
        rows = torch.cat([torch.zeros(ROWS, 1, dtype=rows.dtype), rows], dim=1)
        loss = model(input_ids=rows, labels=rows).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    return sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :])


def ensure(data, out, kinds=tuple(KINDS), seeds=(0, 1, 2), steps=STEPS):
    """Train what is not in `out` yet."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "lms" / "seed0")
    ids = tokens_of(data, tokenizer)
    for kind in kinds:
        for seed in seeds:
            folder = out / f"{kind}-seed{seed}"
            if (folder / "config.json").exists():
                continue
            model = build(kind, tokenizer, seed)
            loss = train(model, ids, steps, seed)
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
            print(f"{folder.name}: {steps} steps, training loss {loss:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    ensure(args.data, args.out, args.kinds, args.seeds, args.steps)


if __name__ == "__main__":
    main()
