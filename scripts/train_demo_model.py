"""Train the demo model of `itda.demo`: a two-million-parameter Llama on Python's own standard library.

    python scripts/train_demo_model.py [--minutes 20] [--out itda/demo/model]

Run it from the root of the checkout, with torch and transformers installed. It trains a byte-level BPE tokenizer and
the model for the given minutes (the learning rate follows the clock, so a slower machine takes fewer steps; the data
order and the initial weights are seeded), saves both in the folder every two minutes and at the end, evaluates what it
saved on the documents and modules that `itda.demo.held_out` names, and writes the table to README.md there.
`--minutes 0` evaluates the folder without training.

Two kinds of text: *docstrings* is `itda.demo.documents()`; *code* is the source of the same modules without their
docstrings. The model sees `DOCSTRING_REPEATS` passes over the first for each pass over the second.
"""

import argparse
import ast
import copy
import ctypes
import json
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: threads that spin crawl on a machine in use
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from itda import demo

BOS = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 128
BATCH = 8  # rows of CONTEXT tokens per step: few tokens per step, so many steps, for the minutes there are
PEAK_RATE = 2.5e-3
WARM_UP = 0.02  # as a fraction of the training time
DOCSTRING_REPEATS = 6
SAVE_SECONDS = 120
THREADS = 2


def texts(kind: str, held_out: bool) -> list[str]:
    """Return the held-out or the other texts of a kind, "docstrings" or "code"."""
    named = demo.documents() if kind == "docstrings" else sources()
    return [text for name, text in named.items() if demo.held_out(name) == held_out]


def sources() -> dict[str, str]:
    """Return `{module name: source without docstrings}` of the standard library; the encodings are tables, left out."""
    found = {}
    for name, path in demo.modules().items():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        lines = source.split("\n")
        for node in demo.docstring_nodes(tree):
            docstring = node.body[0]
            lines[docstring.lineno - 1 : docstring.end_lineno] = [None] * (docstring.end_lineno - docstring.lineno + 1)
        if not name.startswith("encodings."):
            found[name] = "\n".join(line for line in lines if line is not None)
    return found


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, which can write every text and whose offsets cover every character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # as the rows that the model is trained on
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the tokenizer under the class name that transformers 4 and 5 both know."""
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": BOS}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Return the token ids of the documents one after the other, each closed by BOS, which is also EOS."""
    ids = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*row, tokenizer.bos_token_id]) for row in ids])


def rows(ids: np.ndarray, bos: int, start: int = 0) -> np.ndarray:
    """Return `ids[start:]` cut into rows of CONTEXT tokens, each opened by BOS; a rest too short for a row is lost."""
    width = CONTEXT - 1
    cut = ids[start : start + (len(ids) - start) // width * width].reshape(-1, width)
    return np.concatenate([np.full((len(cut), 1), bos), cut], axis=1)


def batches(docstrings: np.ndarray, code: np.ndarray, bos: int, generator: np.random.Generator):
    """Yield batches of rows without end; each epoch is cut at other places and shuffled."""
    while True:
        offsets = generator.integers(0, CONTEXT - 1, size=DOCSTRING_REPEATS + 1)
        epoch = [rows(code, bos, offsets[0]), *(rows(docstrings, bos, offset) for offset in offsets[1:])]
        epoch = generator.permutation(np.concatenate(epoch))
        for first in range(0, len(epoch) - BATCH + 1, BATCH):
            yield torch.from_numpy(epoch[first : first + BATCH])


def learning_rate(progress: float) -> float:
    """Return the rate at a fraction of the training: linear warm-up, then a cosine down to a fiftieth of the peak."""
    if progress < WARM_UP:
        return PEAK_RATE * max(progress / WARM_UP, 0.01)
    cosine = (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP)))) / 2
    return PEAK_RATE * (0.02 + 0.98 * cosine)


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in nats per token of rows (batch, CONTEXT), the opening BOS given."""
    logits = model(batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, table: np.ndarray) -> float:
    """Return the mean loss in nats per token over all rows of a table."""
    parts = torch.from_numpy(table).split(BATCH)
    return sum(loss_of(model, part).item() * len(part) for part in parts) / len(table)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=432,
            num_hidden_layers=5,
            num_attention_heads=5,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=True,
            attn_implementation="sdpa",
        )
    )


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Save the weights in float16, to halve the folder, with a config that says float32, to compute in it."""
    copy.deepcopy(model).half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    model.config.dtype = torch.float32
    model.config.save_pretrained(out)


def train(minutes: float, out: Path) -> None:
    """Train tokenizer and model and save them in the folder `out`."""
    torch.manual_seed(0)
    documents = {kind: texts(kind, held_out=False) for kind in ("docstrings", "code")}
    tokenizer = train_tokenizer(documents["docstrings"] * 2 + documents["code"])
    save_tokenizer(tokenizer, out)
    bos = tokenizer.bos_token_id
    ids = {kind: stream(tokenizer, documents[kind]) for kind in documents}
    check = rows(stream(tokenizer, texts("docstrings", held_out=True)), bos)[::4]
    model = new_model(tokenizer)
    print({kind: len(ids[kind]) for kind in ids}, "tokens;", model.num_parameters(), "parameters", flush=True)

    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    began = saved = time.monotonic()
    average = math.nan
    for step, batch in enumerate(batches(ids["docstrings"], ids["code"], bos, np.random.default_rng(0))):
        progress = (time.monotonic() - began) / (60 * minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 99:
            print(f"step {step + 1}  {time.monotonic() - began:.0f} s  loss {average:.3f}", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            save(model, out)
            saved = time.monotonic()
            print(f"saved; held-out docstrings {evaluate(model, check):.3f}", flush=True)
    save(model, out)
    print(f"{step} steps of {BATCH * CONTEXT} tokens in {time.monotonic() - began:.0f} s", flush=True)


def counts_of(table: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each token is predicted in rows, (size,), and after each other token, (size, size)."""
    pairs = np.bincount((table[:, :-1] * size + table[:, 1:]).ravel(), minlength=size * size).reshape(size, size)
    return np.bincount(table[:, 1:].ravel(), minlength=size), pairs


def baselines(train_rows: np.ndarray, test_rows: np.ndarray, size: int) -> tuple[float, float]:
    """Return the loss in nats per token of an add-one unigram and of a bigram interpolated with it.

    The bigram is `w * count(a, b) / count(a) + (1 - w) * unigram(b)`; w is the best of a grid on every twentieth
    training row, with counts of the others, and the counts of the result are those of all training rows.
    """

    def losses(fit: np.ndarray, table: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        single, pairs = counts_of(fit, size)
        before, after = table[:, :-1].ravel(), table[:, 1:].ravel()
        unigram = ((single + 1) / (single.sum() + size))[after]
        bigram = pairs[before, after] / np.maximum(1, pairs.sum(axis=1))[before]
        mixed = weights[:, None] * bigram + (1 - weights[:, None]) * unigram
        return -np.log(unigram).mean(), -np.log(mixed).mean(axis=1)

    weights = np.linspace(0.05, 0.95, 19)
    tuning = np.arange(len(train_rows)) % 20 == 0
    best = losses(train_rows[~tuning], train_rows[tuning], weights)[1].argmin()
    unigram, bigram = losses(train_rows, test_rows, weights[best : best + 1])
    return unigram, bigram[0]


def report(out: Path) -> None:
    """Evaluate the saved model beside the baselines, print the table and some continuations, write README.md."""
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True).float().eval()
    lines = ["| held-out text | tokens | model | bigram | unigram |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind in ("docstrings", "code"):
        fit, test = (rows(stream(tokenizer, texts(kind, held)), tokenizer.bos_token_id) for held in (False, True))
        unigram, bigram = baselines(fit, test, len(tokenizer))
        scores = f"{evaluate(model, test):.3f} | {bigram:.3f} | {unigram:.3f}"
        lines.append(f"| {kind} | {test[:, 1:].size:,} | {scores} |")
    table = "\n".join(lines)
    config = model.config
    (out / "README.md").write_text(README.format(table=table, parameters=model.num_parameters(), config=config))
    print(table)
    print(f"{sum(path.stat().st_size for path in out.iterdir()):,} bytes in the folder")
    for prompt in ("Return a list of", "The function", "Raise ValueError if the", "def __init__(self"):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        for sampled in (False, True):
            torch.manual_seed(0)
            made = model.generate(ids, max_new_tokens=40, do_sample=sampled, top_k=50 if sampled else None)
            print("sampled:" if sampled else "greedy: ", repr(tokenizer.decode(made[0, 1:])))


README = """# Demo model

A Llama of {parameters:,} parameters ({config.num_hidden_layers} blocks, width {config.hidden_size}, vocabulary \
{config.vocab_size}, context {config.max_position_embeddings}), trained on the docstrings and the code of Python's \
standard library and on the topics of `help()` (PSF License). Each row it was trained on opens with BOS, \
`<|endoftext|>`, which the tokenizer does not add by itself. The weights are stored in float16.

Loss in nats per token on the documents and modules that `itda.demo.held_out` names, on the same tokens for all three. \
The unigram (add-one) and the bigram (interpolated with it) are fit to the model's training text of the same kind.

{table}

Made by `python scripts/train_demo_model.py`.
"""


def keep_memory() -> None:
    """Let glibc keep what it frees: giving large tensors back to the system at every step costs a sixth of the time."""
    if sys.platform == "linux":
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**29)):
            ctypes.CDLL(None).mallopt(option, value)


def main() -> None:
    """Read the command line, train, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="training time; 0 evaluates only")
    parser.add_argument("--out", type=Path, default=demo.model_path(), help="the model's folder")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    keep_memory()
    if arguments.minutes > 0:
        arguments.out.mkdir(parents=True, exist_ok=True)
        train(arguments.minutes, arguments.out)
    report(arguments.out)


if __name__ == "__main__":
    main()
