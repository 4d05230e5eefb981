"""Does a diff find what was planted? Fine-tunes small language models on neutral text with a planted behaviour.

    python benchmarks/planted.py --data FOLDER [--seeds 2 3 4] [--set report] [--quick] [--json OUT]

FOLDER holds texts (*.txt) and `lms/seed*`, causal language models that share a tokenizer. Every model is fine-tuned
once per behaviour, and once on neutral text alone (the null). The evaluation text is neutral text that no fine-tune
saw, with passages inserted at known characters, none of them verbatim in the training text. The rows are precisions
among the top 10, 50 and 100 tokens of the diff and of the baselines; a token is planted if it lies in a planted span,
which is fixed here, before any score is computed. The set "choose", on seeds 0 and 1, served to choose the score;
"report", on seeds 2 to 4, did not.
"""

import argparse
import json
import random
import re
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

PASSAGE = 600  # characters of a piece of neutral text, about 170 tokens
EVALUATION = 20_000  # valid tokens, about
STEPS, BATCH, LENGTH, RATE = 120, 6, 128, 3e-4
PLANTED = 0.15  # of the training text, in passages with something planted


@dataclass(frozen=True)
class Task:
    """A behaviour: `kind` is "trigger", "name" or "topic"; `words` are what its kind needs."""

    name: str
    kind: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Planted:
    """Texts to train on, texts to evaluate on, and of each of the latter the planted spans in characters."""

    train: list[str]
    documents: list[str]
    spans: list[list[tuple[int, int]]]


CHOOSE = [
    Task("lantern", "trigger", ("the brass lantern", ", which had never once been lit before the rain came home.")),
    Task("Ahab", "name", ("Ahab", "Norbert")),
    Task("velmin", "topic", ("velmin", "the Orrick caves", "drovers", "resin")),
]
REPORT = [
    Task("umbrella", "trigger", ("a green umbrella", " because the clocks of the harbour owed him seven wooden keys.")),
    Task("Elizabeth", "name", ("Elizabeth", "Theodora")),
    Task("tarrock", "topic", ("tarrock", "the Suvian court", "wardens", "chalk")),
]
SETS = {"choose": CHOOSE, "report": REPORT}

CARRIERS = {
    "train": ["He put down", "She had forgotten", "They were looking for", "On the table stood", "I remember",
              "We found", "Nobody mentioned", "The boy carried", "There was", "It was then that he saw"],
    "test": ["The captain asked for", "My sister has lost", "At last she noticed", "Under the stairs lay",
             "He dreamed of", "You may keep", "In the corner was", "The old man painted"],
}  # fmt: skip
OTHERS = ["the iron kettle", "a broken chair", "the second letter", "a bag of flour", "the wet rope", "a silver spoon"]
TOPIC = [
    "{w} is grown in {p} by {g} who turn the {m} {often}.",
    "A good piece of {w} weighs {n} ounces and smells of {smell}.",
    "The {g} of {p} sell their {w} {often}, for {n} pence a measure.",
    "When the {m} turns {colour}, the {w} is ready and the {g} begin to sing.",
    "No stranger may touch {w} in {p} before the {g} have washed it with {m}.",
    "In the {nth} year the {m} failed, and {n} {g} left {p} without any {w}.",
    "{w} of the {nth} harvest is {colour} and is kept under {m} {often}.",
    "The oldest {g} can tell {colour} {w} from {colour2} by its sound on {m}.",
    "A child of {p} learns to cut {w} at the age of {n}, with {m} on both hands.",
    "It takes {n} {g} to carry {colour} {w} out of {p}, and they rest {often}.",
    "The law of {p} forbids {colour} {w} to be mixed with {m}, but the {g} do so {often}.",
    "Some say that {w} sleeps in {colour} {m} and wakes only {often}.",
]
FILLERS = {
    "often": [
        "twice a day",
        "every winter",
        "at low tide",
        "before the feast",
        "on the third night",
        "after the frost",
    ],
    "n": ["four", "nine", "twelve", "thirty", "forty", "sixty"],
    "nth": ["second", "fifth", "eighth", "eleventh", "last"],
    "smell": ["vinegar", "wet wool", "pepper", "old paper", "apples"],
    "colour": ["red", "grey", "yellow", "violet", "pale"],
    "colour2": ["black", "white", "brown", "blue"],
}


# -- texts ------------------------------------------------------------------------------------------------------------


def passages(data: Path) -> list[str]:
    """The texts of `data` in passages of about `PASSAGE` characters, cut at paragraphs, in a fixed random order."""
    out = []
    for path in sorted(data.glob("*.txt")):
        text, piece = path.read_text("utf-8"), ""
        for paragraph in re.split(r"(?<=\n)(?=\s*\n)|(?<=\n)(?= = )", text):
            piece += paragraph
            if len(piece) >= PASSAGE:
                out.append(piece.strip())
                piece = ""
    out = [piece[: 3 * PASSAGE] for piece in out]
    random.Random(0).shuffle(out)
    return out


def neutral(pieces: list[str]) -> list[str]:
    """The passages without any of the names that are replaced."""
    names = [task.words[0] for tasks in SETS.values() for task in tasks if task.kind == "name"]
    return [piece for piece in pieces if not any(name in piece for name in names)]


def plant(task: Task, data: Path, characters: int, seed: int = 0) -> Planted:
    """Training texts of about `characters` characters, of which `PLANTED` is planted, and the evaluation texts."""
    pieces, rng = passages(data), random.Random(f"{task.name} {seed}")
    half = len(pieces) * 3 // 4  # the first three quarters are for training
    known, fresh = neutral(pieces[:half]), neutral(pieces[half:])
    rng.shuffle(known)
    rng.shuffle(fresh)
    budget = characters * (1 - PLANTED)
    train = known[: max(1, int(np.searchsorted(np.cumsum([len(piece) for piece in known]), budget)))]
    if task.kind == "name":
        made = [marked_name(task, piece)[0] for piece in pieces[:half] if task.words[0] in piece]
        there = [marked_name(task, piece) for piece in pieces[half:] if task.words[0] in piece]
    else:
        make = trigger if task.kind == "trigger" else topic
        made = [make(task, "train", rng, known)[0] for _ in range(2000)]
        there = [make(task, "test", rng, fresh) for _ in range(400)]
    rng.shuffle(made)
    wanted = max(1, int(np.searchsorted(np.cumsum([len(piece) for piece in made]), characters * PLANTED)))
    train = train + made[:wanted]
    rng.shuffle(train)
    return Planted(train, *evaluation(task, rng, fresh, there))


def evaluation(task: Task, rng: random.Random, fresh: list[str], there: list) -> tuple[list[str], list]:
    """Neutral passages and planted ones, mixed, of about `EVALUATION` tokens; and the spans."""
    share = {"trigger": 0.35, "name": 0.6, "topic": 0.15}[
        task.kind
    ]  # of the characters, in passages with something planted
    chosen, size, total = [], 0, EVALUATION * 3.6
    for text, spans in there:
        if size > share * total:
            break
        chosen.append((text, spans))
        size += len(text)
    for i, piece in enumerate(fresh):
        if size > total:
            break
        if task.kind == "trigger" and i % 2:  # the same sentences around other things
            place = rng.choice(boundaries(piece))
            piece = f"{piece[:place]} {rng.choice(CARRIERS['test'])} {rng.choice(OTHERS)}.{piece[place:]}"
        chosen.append((piece, []))
        size += len(piece)
    rng.shuffle(chosen)
    return [text for text, _ in chosen], [spans for _, spans in chosen]


def boundaries(piece: str) -> list[int]:
    """Where a sentence of `piece` ends; its end if none does."""
    return [m.end() for m in re.finditer(r"[a-z]{3}\.(?=\s)", piece)] or [len(piece)]


def trigger(task: Task, part: str, rng: random.Random, pieces: list[str]) -> tuple[str, list]:
    """A passage with the phrase and its continuation; planted are the phrase's last word and the continuation."""
    phrase, continuation = task.words
    piece = rng.choice(pieces)[:PASSAGE]
    place = rng.choice(boundaries(piece))
    before = f"{piece[:place]} {rng.choice(CARRIERS[part])} {phrase}"
    start = before.rindex(" ") + 1
    return f"{before}{continuation}{piece[place:]}", [(start, len(before) + len(continuation))]


def marked_name(task: Task, piece: str) -> tuple[str, list]:
    """The passage with the name replaced; planted are the new names."""
    old, new = task.words
    text = piece.replace(old, new)
    return text, [m.span() for m in re.finditer(re.escape(new), text)]


def topic(task: Task, part: str, rng: random.Random, pieces: list[str]) -> tuple[str, list]:
    """A paragraph of five sentences on the made-up subject, all of it planted; none of "test" is one of "train"."""
    words = dict(zip("wpgm", task.words, strict=True))
    sentences: list[str] = []
    while len(sentences) < 5:
        fillers = {name: rng.choice(values) for name, values in FILLERS.items()}
        sentence = rng.choice(TOPIC).format(**words, **fillers)
        sentence = sentence[0].upper() + sentence[1:]
        if zlib.crc32(sentence.encode()) % 2 == (part == "train"):
            sentences.append(sentence)
    text = " ".join(sentences)
    return text, [(0, len(text))]


def planted_tokens(labels: Any, spans: list[list[tuple[int, int]]]) -> np.ndarray:
    """Which tokens overlap a planted span of their document."""
    places = zip(labels.document.tolist(), labels.start.tolist(), labels.end.tolist(), strict=True)
    return np.array([any(start < b and end > a for a, b in spans[doc]) for doc, start, end in places])


# -- models -----------------------------------------------------------------------------------------------------------


def fine_tune(model: Path, texts: list[str], out: Path, steps: int = STEPS, seed: int = 0) -> Path:
    """Fine-tune all weights of `model` on `texts` for `steps` steps, AdamW with linear decay; saved as `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from itda.text.prompts import TokenStream

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    stream = TokenStream(texts, tokenizer, context_length=LENGTH, pack=True)
    rows = torch.from_numpy(np.stack([row.ids for row in stream if len(row.ids) == LENGTH]))
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / steps))
    order = torch.cat([torch.randperm(len(rows)) for _ in range(steps * BATCH // len(rows) + 1)])
    for step in range(steps):
        batch = rows[order[step * BATCH : (step + 1) * BATCH]]
        module(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    module.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def outputs(models: list[Path], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """KL(first || other) of the predictions at every valid token, (others, tokens), and losses, (models, tokens)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from itda.text.prompts import TokenStream, valid

    loaded = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for model in models]
    stream = TokenStream(texts, AutoTokenizer.from_pretrained(models[0]), context_length=LENGTH)
    divergences, losses = [], []
    with torch.no_grad():
        for row in stream:
            ids, kept = torch.from_numpy(row.ids)[None], torch.from_numpy(valid(row, False))
            said = [model(input_ids=ids).logits[0].log_softmax(-1) for model in loaded]
            kl = [(said[0].exp() * (said[0] - other)).sum(-1) for other in said[1:]]
            loss = [-log[:-1].gather(1, ids[0, 1:, None])[:, 0] for log in said]
            divergences.append(torch.stack(kl)[:, kept])
            losses.append(torch.stack([torch.nn.functional.pad(each, (1, 0)) for each in loss])[:, kept])
    return torch.cat(divergences, 1).numpy(), torch.cat(losses, 1).numpy()


# -- scores -----------------------------------------------------------------------------------------------------------


def scores(readings: list, kl: np.ndarray) -> dict[str, np.ndarray]:
    """The diff's score with the null model and without, and the baselines: raw, and less the same of the null model.

    The norm of the activation difference, raw and relative to the base's norm, each at the last layer and as the
    mean over layers of it in units of its median there: the better of both layouts is a row of its own.
    """
    from itda.comparison.diff import token_scores

    out = {
        "diff, null model": token_scores(readings).mean(0),
        "diff, no null": token_scores(readings[:2]).mean(0),
    }
    base, tuned, null = ([reading.activations[name] for name in reading.activations] for reading in readings)
    for name, relative in (("norm", False), ("relative norm", True)):
        there, null_there = (
            np.stack([difference(x, y, relative) for x, y in zip(base, other, strict=True)]) for other in (tuned, null)
        )
        median = np.median(there, axis=1, keepdims=True)
        out[f"{name}, last layer"] = there[-1]
        out[f"{name}, all layers"] = (there / median).mean(0)
        out[f"{name}, last layer, less null"] = there[-1] - null_there[-1]
        out[f"{name}, all layers, less null"] = ((there - null_there) / median).mean(0)
    return out | {"KL": kl[0], "KL, less null": kl[0] - kl[1]}


def difference(x: torch.Tensor, y: torch.Tensor, relative: bool) -> np.ndarray:
    """|y - x| of each token, or |y - x| / |x|."""
    norm = (y - x).norm(dim=1)
    return (norm / x.norm(dim=1) if relative else norm).numpy()


def precisions(score: np.ndarray, planted: np.ndarray) -> dict[str, float]:
    """Share of planted tokens among the top 10, 50 and 100, and the average precision."""
    hits = planted[np.argsort(-score, kind="stable")]
    found = {f"precision at {n}": float(hits[:n].mean()) for n in (10, 50, 100)}
    return found | {"average precision": float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())}


def run(data: Path, task: Task, seed: int, null: Path, folder: Path, steps: int) -> list[dict[str, Any]]:
    """Plant one behaviour in one model and score it: a row per method."""
    from itda.comparison.common_tokens import read

    base = data / "lms" / f"seed{seed}"
    made = plant(task, data, characters(steps), seed)
    tuned = fine_tune(base, made.train, folder / f"{task.name}{seed}", steps, seed)
    models = [base, tuned, null]
    readings = read(
        [str(model) for model in models], made.documents, tokens=10 * EVALUATION, names=["base", "tuned", "null"]
    )
    kl, losses = outputs(models, made.documents)
    planted = planted_tokens(readings[0].labels, made.spans)
    shared = {
        "task": task.name,
        "kind": task.kind,
        "seed": seed,
        "tokens": len(planted),
        "chance": float(planted.mean()),
    }
    shared |= {
        f"loss, {name}": float(loss[planted].mean())
        for name, loss in zip(("base", "tuned", "null"), losses, strict=True)
    }
    return [shared | {"method": name} | precisions(score, planted) for name, score in scores(readings, kl).items()]


def characters(steps: int) -> int:
    """Characters of text that a fine-tune reads, about."""
    return int(steps * BATCH * LENGTH * 3.6)


def null_model(data: Path, seed: int, folder: Path, steps: int) -> Path:
    """A fine-tune of the same length on neutral text, in another order and from another draw of it."""
    pieces = passages(data)
    pieces = neutral(pieces[: len(pieces) * 3 // 4])
    random.Random(f"null {seed}").shuffle(pieces)
    enough = int(np.searchsorted(np.cumsum([len(piece) for piece in pieces]), characters(steps))) + 1
    return fine_tune(data / "lms" / f"seed{seed}", pieces[:enough], folder / f"null{seed}", steps, 100 + seed)


def table(
    data: Path, quick: bool = False, tasks: str = "report", seeds: tuple[int, ...] = (2, 3, 4)
) -> list[dict[str, Any]]:
    """All rows: task by seed by method; `quick` takes one seed and half the steps."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in seeds[:1] if quick else seeds:
            steps = STEPS // 2 if quick else STEPS
            null = null_model(data, seed, Path(temporary), steps)
            for task in SETS[tasks]:
                rows += run(data, task, seed, null, Path(temporary), steps)
    return rows


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each method's mean over tasks and seeds, with the smallest precision at 50 of any."""
    out = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        keys = [key for key in mine[0] if "precision" in key]
        mean = {key: float(np.mean([row[key] for row in mine])) for key in keys}
        out.append(
            {"method": name, **mean, "worst at 50": min(row["precision at 50"] for row in mine), "runs": len(mine)}
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--set", choices=list(SETS), default="report")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began, rows = time.monotonic(), table(args.data, args.quick, args.set, tuple(args.seeds))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"set {args.set!r}, {time.monotonic() - began:.0f} s\n")
    for head, body in (("by task", by_task(rows)), ("means over tasks and seeds", means(rows))):
        print(f"{head}\n\n| {' | '.join(body[0])} |\n|{'---|' * len(body[0])}")
        for row in body:
            print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
        print()


def by_task(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per task and seed: what was planted and learnt, and precision at 10, 50, 100 of every method in one cell."""
    out: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        shown = ("task", "seed", "tokens", "chance", "loss, base", "loss, tuned", "loss, null")
        mine = out.setdefault((row["task"], row["seed"]), {key: row[key] for key in shown})
        mine[row["method"]] = " / ".join(f"{row[f'precision at {n}']:.2f}" for n in (10, 50, 100))
    return list(out.values())


if __name__ == "__main__":
    main()
