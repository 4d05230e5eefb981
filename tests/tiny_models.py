"""Tiny random models of many families with their tokenizers, made on the spot: nothing is downloaded.

`save(family, folder)` writes one as users have it on disk; `FAMILIES` and `DOCUMENTS` are what to run tests over.
"""

from __future__ import annotations

from pathlib import Path

import torch

LAYERS, WIDTH = 4, 32
POSITIONS = 64

DOCUMENTS = [
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse.",
    "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "Short.",
    "The mouse sat on the carpet, and the cat sat on the mouse; nobody was surprised, least of all the carpet.",
    "Numbers 1 2 3 and naïve café, with 東京 and a 🙂 in between.",
    "Whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing.",
    "She is tolerable; but not handsome enough to tempt me.",
    "There now is your insular city of the Manhattoes, belted round by wharves as Indian isles by coral reefs.",
]

_SIZES = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 64}
_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
# family: settings of its config besides those of `config`
_FAMILIES: dict[str, dict] = {
    "gpt2": {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "n_positions": POSITIONS},
    "gpt_neox": _SIZES,
    "llama": _SIZES | _HEADS,
    "mistral": _SIZES | _HEADS | {"sliding_window": 8},
    "qwen3": _SIZES | _HEADS,
    "gemma2": _SIZES | _HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "opt": {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 4, "ffn_dim": 64},
    "phi": _SIZES,
    "bert": _SIZES,
}
FAMILIES = list(_FAMILIES)


def config(family: str, vocabulary: int, **settings):
    """The config of a tiny model of `family`; `settings` replace its own."""
    from transformers import AutoConfig

    sizes = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if family == "bert":
        sizes["pad_token_id"] = 0
    if family != "gpt2":
        sizes["max_position_embeddings"] = POSITIONS
    if family == "opt":
        sizes |= {"word_embed_proj_dim": WIDTH, "pad_token_id": 1}
    return AutoConfig.for_model(family, **{**sizes, **_FAMILIES.get(family, _SIZES), **settings})


def module(family: str, vocabulary: int = 300, seed: int = 0, **settings) -> torch.nn.Module:
    """A random causal language model (of BERT the base model), float32, in eval mode, no weight 0 or 1."""
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = AutoModel if family == "bert" else AutoModelForCausalLM
        model = kind.from_config(config(family, vocabulary, **settings))
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                # Norms and biases too, so that one that is missed is missed by more than rounding.
                p.add_(torch.randn_like(p), alpha=0.2 if p.ndim > 1 else 0.1)
                assert p.isfinite().all(), name
    return model.eval()


def tokenizer(family: str = "gpt2"):
    """A fast tokenizer of about 300 tokens: byte-level BPE with a BOS, for BERT WordPiece with CLS and SEP."""
    from transformers import PreTrainedTokenizerFast

    if family == "bert":
        backend, names = _word_pieces()
    else:
        backend, names = _byte_pairs(), {"bos_token": "<s>", "eos_token": "<s>", "unk_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> Path:
    """Write a model of `family` with its tokenizer into `folder`, and return the folder."""
    words = tokenizer(family)
    module(family, len(words), seed, **settings).to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return Path(folder)


def _byte_pairs():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(DOCUMENTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return backend


def _word_pieces():
    """Written down, not trained: the trainer of WordPiece breaks its ties at random."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    text = normalizer.normalize_str(" ".join(DOCUMENTS))
    words = sorted({word for word, _ in splitter.pre_tokenize_str(text)})
    letters = sorted({letter for word in words for letter in word})
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *(w for w in words if len(w) > 4)]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, splitter, decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend, {f"{name.strip('[]').lower()}_token": name for name in special}
