"""Which blocks, which head and which class: models that also see or hear, code from elsewhere, states of four axes."""

from __future__ import annotations

import functools
import json
import shutil
import sys

import pytest
import torch
from torch import nn

from itda.errors import InputError
from itda.models.loading import language_model, load_model, untrained
from itda.reading.activations import activations
from itda.report.hook_points import hook_points
from tests.tiny_models import DOCUMENTS, module, save, tokenizer

WORDS = tokenizer()
TEXT = {
    "vocab_size": len(WORDS) + 4,  # the last of them stand for a picture or a sound
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
SEES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
HEARS = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 8}
QUIET = {"bos_token_id": 0, "eos_token_id": 0}
LAST = len(WORDS) + 3
# Four blocks that read and four that see or hear. The settings of each kind of model are its own.
KINDS = {
    "llava": dict(
        vision_config=SEES | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        text_config=TEXT | QUIET | {"model_type": "llama"},
        image_token_index=LAST,
    ),
    "internvl": dict(
        vision_config=SEES | {"image_size": [16, 16], "patch_size": [8, 8]},
        text_config=TEXT | QUIET | {"model_type": "qwen2"},
        image_token_id=LAST,
    ),
    "qwen2_vl": dict(
        vision_config={"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
        text_config=TEXT
        | QUIET
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}},
        image_token_id=LAST,
        video_token_id=LAST - 1,
        vision_start_token_id=LAST - 2,
        vision_end_token_id=LAST - 3,
    ),
    "qwen2_audio": dict(
        audio_config=HEARS | {"max_source_positions": 16},
        text_config=TEXT | QUIET | {"model_type": "qwen2"},
        audio_token_index=LAST,
    ),
    "gemma3": dict(
        vision_config=SEES | {"image_size": 16, "patch_size": 8},
        text_config=TEXT | QUIET | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
        mm_tokens_per_image=4,
        image_token_index=LAST,
    ),
}


@functools.cache
def whole(kind: str) -> nn.Module:
    """A model with its head, random weights."""
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **KINDS[kind])
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "Qwen2AudioForConditionalGeneration"):
        try:
            auto = getattr(transformers, name)
            torch.manual_seed(0)
            return (auto.from_config(config) if name.startswith("Auto") else auto(config)).eval()
        except (AttributeError, ValueError):
            continue
    raise AssertionError(kind)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    @functools.cache
    def saved(kind):
        folder = tmp_path_factory.mktemp(kind)
        whole(kind).save_pretrained(folder)
        WORDS.save_pretrained(folder)
        return folder

    return saved


def states(kind: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each block of the text model puts out, by its own account; the last one before the final norm."""
    base, found = whole(kind).base_model, []
    handles = [
        block.register_forward_hook(
            lambda _, args, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in base.language_model.layers
    ]
    with torch.no_grad():
        base(input_ids=ids, attention_mask=torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_are_those_that_read_text(kind, folders):
    ids = torch.arange(1, 11).reshape(2, 5)
    expected = states(kind, ids)
    for model in (load_model(folders(kind), hooks=[1, 3]), load_model(whole(kind), WORDS, hooks=[1, 3])):
        assert model.n_layers == 4
        assert model.hook_points == ("model.language_model.layers.1", "model.language_model.layers.3")
        found = model.read(ids, torch.ones_like(ids))
        for layer, name in zip((1, 3), model.hook_points, strict=True):
            torch.testing.assert_close(found[name], expected[layer])
    assert len(load_model(folders(kind), hooks=1)._base.language_model.layers) == 2  # those above are not loaded
    assert hook_points(folders(kind)).n_layers == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_path_is_that_module_whatever_the_stacks(kind, folders):
    ids = torch.arange(1, 11).reshape(2, 5)
    path = "model.language_model.layers.2.mlp"
    model = load_model(folders(kind), hooks=path)
    assert model.hook_points == (path,)
    assert model.provenance(path)["layer"] == 2
    assert model.read(ids, torch.ones_like(ids))[path].shape == (2, 5, 32)
    blocks = [name for name, m in whole(kind).named_modules() if isinstance(m, nn.ModuleList) and len(m) == 4]
    (other,) = (name for name in blocks if "language_model" not in name)
    with pytest.raises(InputError, match=r"never calls .*such as `model.language_model.layers.0`\."):
        load_model(folders(kind), hooks=f"{other}.1")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_for_generation_has_its_head(kind, folders):
    ids = torch.arange(1, 11).reshape(2, 5)
    model = language_model(folders(kind), hooks=1)
    assert model.predicts, model.no_logits
    with torch.no_grad():
        expected = whole(kind)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(model.logits(ids, torch.ones_like(ids)), expected)
    moved = model.logits(ids, torch.ones_like(ids), {model.hook_points[0]: lambda x: x + 1})
    assert not torch.allclose(moved, expected)
    assert model.provenance(1)["fingerprint"] == load_model(folders(kind), hooks=1).provenance(1)["fingerprint"]


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_a_checkpoint_without_the_head_that_its_class_has_says_so(kind, folders, tmp_path):
    folder = tmp_path / "base"
    whole(kind).base_model.save_pretrained(folder)
    WORDS.save_pretrained(folder)
    assert "without a language modelling head" in (language_model(folder, hooks=1).no_logits or "")
    settings = json.loads((folder / "config.json").read_text())
    settings["architectures"] = [type(whole(kind)).__name__]
    (folder / "config.json").write_text(json.dumps(settings))
    if kind == "llava":  # the head of Gemma is its embedding
        with pytest.raises(InputError, match=r"lacks 1 weight of its language model \(`lm_head.weight` for one\)"):
            language_model(folder, hooks=1)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_two_stacks_untrained_and_on_text(kind, folders):
    assert untrained(folders(kind), WORDS).n_layers == 4
    text = activations(folders(kind), DOCUMENTS, layer=2, context_length=24, batch_rows=3)
    assert sum(len(batch.activations) for batch in text) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_that_read_text_are_streamed(kind, folders):
    ids = torch.arange(1, 11).reshape(2, 5)
    for hooks in ([3], [0, "model.language_model.layers.1.mlp", 2]):
        whole = load_model(folders(kind), hooks=hooks)
        streamed = load_model(folders(kind), hooks=hooks, stream_layers=True)
        expected, found = whole.read(ids, torch.ones_like(ids)), streamed.read(ids, torch.ones_like(ids))
        assert [*expected] == [*found] and all(torch.equal(expected[name], found[name]) for name in found)
        assert streamed.provenance(hooks[-1]) == whole.provenance(hooks[-1])
    bare = load_model(folders(kind), hooks=0, stream_layers=True)
    bare.read(ids, torch.ones_like(ids))
    there = sum(p.nbytes for p in load_model(folders(kind), hooks=0)._base.language_model.parameters())
    assert bare.bytes_read <= there  # no block above, and nothing that sees or hears


def test_two_lists_of_the_same_blocks_cannot_be_streamed(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders("llava"), tmp_path / "twice")
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace("language_model", "other"): tensor.clone() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"do not say which belong to which block.*2 hold what.*read it whole"):
        load_model(folder, hooks=2, stream_layers=True)


def test_blocks_that_cannot_be_told_can_be_read_by_path(tmp_path):
    model = module("gpt2")
    model.transformer.more = nn.ModuleList([nn.Identity() for _ in range(4)])
    for layer in (1, "blocks.1.hook_resid_post"):
        with pytest.raises(InputError, match=r"blocks of `GPT2LMHeadModel` cannot be told.*name a module by its path"):
            load_model(model, WORDS, hooks=layer)
    ids = torch.arange(1, 11).reshape(2, 5)
    plain = load_model(module("gpt2"), WORDS, hooks=1).read(ids, torch.ones_like(ids))
    found = load_model(model, WORDS, hooks="transformer.h.1")
    assert torch.equal(found.read(ids, torch.ones_like(ids))["transformer.h.1"], plain["transformer.h.1"])
    assert found.provenance("transformer.h.1")["layer"] is None
    with pytest.raises(InputError, match=r"has no module `transformer.h.9`: name one of its modules"):
        load_model(model, WORDS, hooks="transformer.h.9")


def test_an_encoder_with_a_decoder_is_read_by_path():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4
    )
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(InputError, match="cannot be told"):
        load_model(model, WORDS, hooks=1)
    ids = torch.arange(1, 11).reshape(2, 5)
    (found,) = load_model(model, WORDS, hooks="encoder.block.1").read(ids, torch.ones_like(ids)).values()
    assert found.shape == (2, 5, 32)


def test_a_forward_pass_that_fails_is_a_sentence():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = sizes | QUIET | {"vocab_size": len(WORDS), "max_position_embeddings": 64, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8})).eval()
    with pytest.raises(InputError, match=r"on text alone ends with an error \(.*\): pass a model that reads text"):
        load_model(model, WORDS, hooks=1)
    assert load_model(model.text_model, WORDS, hooks=1).n_layers == 2  # which is what it says


# -- advice -----------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A block whose states are several streams: (rows, length, streams, d)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = block

    def forward(self, x, *args, **kwargs):
        self.inner(x[:, :, 0] if x.ndim == 4 else x, *args, **kwargs)
        return x if x.ndim == 4 else torch.stack([x, x], 2)


def wide() -> nn.Module:
    model = module("gpt2")
    model.transformer.h = nn.ModuleList([Wide(block) for block in model.transformer.h])
    model.transformer.ln_f = nn.Identity()
    return model


def test_advice_names_a_place_that_can_be_read():
    with pytest.raises(
        InputError, match=r"`transformer.h.1` is not one vector per token: choose .*, such as `"
    ) as said:
        load_model(wide(), WORDS, hooks=1)
    named = str(said.value).rpartition("such as `")[2].rstrip("`.")
    assert load_model(wide(), WORDS, hooks=named).hook_points == (named,)
    assert load_model(wide(), WORDS, hooks="transformer.h.1.inner").d == {"transformer.h.1.inner": 32}
    with pytest.raises(InputError, match=r"has no module `nothing.at.all`.*such as `") as said:
        load_model(wide(), WORDS, hooks="nothing.at.all")
    for named in str(said.value).rpartition("such as `")[2].rstrip("`.").split("`, `"):
        assert load_model(wide(), WORDS, hooks=named).hook_points == (named,)


def test_advice_about_a_model_that_has_no_such_place():
    model = wide()
    for block in model.transformer.h:
        block.inner = nn.Identity()
    model.transformer.wte = type(
        "Sums", (nn.Embedding,), {"forward": lambda self, ids: self.weight[ids][..., None, :]}
    )(300, 32)
    model.transformer.wpe = model.transformer.drop = nn.Identity()
    with pytest.raises(InputError, match=r"choose another model|ends with an error"):
        load_model(model, WORDS, hooks=1)


# -- code from elsewhere ----------------------------------------------------------------------------------------------

OWN_CODE = """
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

class Config(GPT2Config):
    model_type = "own_causal_type"

class Model(GPT2LMHeadModel):
    config_class = Config
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A checkpoint whose code has a causal language model and nothing besides."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    plain = save("gpt2", tmp_path / "plain")
    folder = shutil.copytree(plain, tmp_path / "own_causal")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "own_causal_type",
        "architectures": ["Model"],
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(OWN_CODE)
    return plain, folder


def test_code_that_names_a_causal_model_alone_is_that_class(own):
    plain, folder = own
    ids = torch.arange(1, 11).reshape(2, 5)
    model = load_model(folder, hooks=1, trust_remote_code=True)
    expected = load_model(plain, hooks=1)
    assert len(model._base.h) == 2  # and it is cut
    assert torch.equal(*(m.read(ids, torch.ones_like(ids))["transformer.h.1"] for m in (model, expected)))
    assert model.provenance(1)["fingerprint"] == expected.provenance(1)["fingerprint"]
    assert language_model(folder, hooks=1, trust_remote_code=True).predicts
    streamed = load_model(folder, hooks=1, trust_remote_code=True, stream_layers=True)
    assert torch.equal(*(m.read(ids, torch.ones_like(ids))["transformer.h.1"] for m in (model, streamed)))
    assert untrained(folder, WORDS, trust_remote_code=True).n_layers == 4
    assert hook_points(folder, trust_remote_code=True).n_layers == 4
