"""Adapters, GGUF files, models in wrappers, weights that torch quantised, and folders that hide a model of the hub."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import itda
from itda.dictionary.build import build
from itda.dictionary.itda import ITDA
from itda.errors import InputError
from itda.models import hub
from itda.models.hub import load_tokenizer
from itda.models.loading import language_model, load_model, untrained
from itda.reading.activations import activations
from itda.reading.own_model import model_of
from itda.report.hook_points import hook_points
from tests.tiny_models import DOCUMENTS, save, tokenizer

WORDS = tokenizer()
IDS = torch.arange(1, 11).reshape(2, 5)


def read(model, hook=1) -> torch.Tensor:
    (found,) = model.at([hook], model.tokenizer).read(IDS, torch.ones_like(IDS)).values()
    return found


def fingerprint(model, hook=1) -> str:
    return model.provenance(hook)["fingerprint"]


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("base"))


def with_adapter(base, **settings):
    """The base with a LoRA whose numbers are drawn, as peft has it."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    chosen = dict(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    config = peft.LoraConfig(**chosen | {"init_lora_weights": False} | settings)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    pytest.importorskip("peft", reason="peft is not installed (`pip install 'itda[peft]'`)")
    with_adapter(base).save_pretrained(folder)
    return folder


def test_an_adapter_is_its_base_with_the_adapter_on_it(base, adapter, tmp_path):
    merged = with_adapter(base).merge_and_unload()
    expected = load_model(merged, WORDS, hooks=1)
    plain = load_model(base, hooks=1)
    for model in (load_model(adapter, hooks=1), load_model(with_adapter(base), WORDS, hooks=1)):
        assert model.hook_points == ("model.layers.1",)
        torch.testing.assert_close(read(model), read(expected))
        assert not torch.allclose(read(model), read(plain), atol=1e-2)
        assert model.provenance(1)["adapter"] == {"type": "LORA", "base": str(base), "base_revision": None}
        assert fingerprint(model) == fingerprint(load_model(adapter, hooks=1)) != fingerprint(plain)
    assert load_model(adapter, hooks=1).provenance(1)["id"] == str(adapter)
    assert "adapter" not in plain.provenance(1)
    with_head = language_model(adapter, hooks=1)
    assert with_head.predicts
    with torch.no_grad():
        torch.testing.assert_close(with_head.logits(IDS, torch.ones_like(IDS)), merged(input_ids=IDS).logits)
    assert fingerprint(with_head) == fingerprint(load_model(adapter, hooks=1))
    assert load_model(adapter, hooks="model.layers.1.self_attn.q_proj").d == {"model.layers.1.self_attn.q_proj": 32}


def test_the_fingerprint_is_of_what_the_adapter_does(base):
    model = with_adapter(base)
    prints = [fingerprint(load_model(model, WORDS, hooks=1))]
    prints.append(fingerprint(load_model(with_adapter(base, lora_alpha=4), WORDS, hooks=1)))  # the same weights
    with model.disable_adapter():
        hooked = load_model(model, WORDS, hooks=1)
        torch.testing.assert_close(read(hooked), read(load_model(base, hooks=1)))
        prints.append(fingerprint(hooked))
    assert len(set(prints)) == 3
    other = with_adapter(base)
    other.add_adapter("other", other.peft_config["default"])
    assert fingerprint(load_model(other, WORDS, hooks=1)) == prints[0]  # it is there, and not at work
    other.set_adapter("other")
    assert fingerprint(load_model(other, WORDS, hooks=1)) != prints[0]


def test_a_dictionary_of_an_adapter_finds_it_again(adapter):
    stream = activations(adapter, DOCUMENTS, layer=1, context_length=24, batch_rows=3)
    dictionary = build(stream, k=4, threshold=0.3)
    hooked, hook = model_of(dictionary.cfg)
    assert hook == "model.layers.1"
    assert fingerprint(hooked) == dictionary.cfg["model"]["fingerprint"]


def test_what_an_adapter_changed(base, adapter):
    found = itda.diff(str(base), str(adapter), DOCUMENTS * 3, layer=1, context_length=24, k=4, n_atoms=20)
    assert found.tuned == adapter.name and found.hook_points == ["model.layers.1"]
    assert found.layers[0]["change"]["mean"] > 0.01
    same = itda.diff(str(base), str(base), DOCUMENTS * 3, layer=1, context_length=24, k=4, n_atoms=20)
    assert same.layers[0]["change"]["mean"] < 1e-3


def test_the_tokenizer_of_an_adapter(base, adapter, tmp_path):
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(base).get_vocab()
    folder = shutil.copytree(adapter, tmp_path / "with words")
    words = tokenizer()
    words.bos_token = "!"
    words.save_pretrained(folder)
    assert load_model(folder, hooks=1).tokenizer.bos_token == "!"
    assert hook_points(adapter).n_layers == 4
    assert untrained(adapter, WORDS).n_layers == 4


def test_adapters_that_cannot_be_read(base, adapter, tmp_path, monkeypatch):
    def refused(match, model=None, **settings):
        with pytest.raises(InputError, match=match) as caught:
            load_model(model or folder, hooks=1, **settings)
        assert "\n" not in str(caught.value)

    def said(**changes):
        settings = json.loads((adapter / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | changes))

    folder = shutil.copytree(adapter, tmp_path / "adapter")
    refused(r"is an adapter, and `stream_layers` needs a model in safetensors: merge it", stream_layers=True)
    refused(r"is an adapter, and `tensor_parallel` needs a model in safetensors", tensor_parallel=2)
    said(base_model_name_or_path=None)
    refused(r"does not say which model it was made for: write its id")
    said(base_model_name_or_path="./not/there")
    refused(r"is an adapter of `./not/there`, and that cannot be loaded .*is not there.*write where it is into")
    said(base_model_name_or_path=str(adapter))
    refused(r"which is an adapter too: merge that into its model")
    said(base_model_name_or_path=str(save("gpt2", tmp_path / "other")))
    refused(r"does not fit")
    said(target_modules=["q_proj"])
    refused(r"does not fit `.*` \(8 of its weights have no place there")
    said()
    shutil.copy(base / "config.json", folder)
    shutil.copy(base / "model.safetensors", folder)
    refused(r"holds a model and an adapter .*: move one of the two")
    (folder / "model.safetensors").unlink()
    assert load_model(folder, hooks=1).provenance(1)["adapter"]["type"] == "LORA"
    (folder / "adapter_model.safetensors").unlink()
    refused(r"without adapter_model.safetensors, and pickles are not read")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    refused(r"is an adapter, which peft puts on its base model: install it with `pip install 'itda\[peft\]'`", adapter)


def test_adapters_of_themselves_and_in_a_circle(base, adapter, tmp_path):
    def of(name, base, **changes):
        folder = shutil.copytree(adapter, tmp_path / name, dirs_exist_ok=True)
        settings = json.loads((adapter / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
        return folder

    for a_base, b_base, said in (
        ("a", "a", "is an adapter whose base is itself: name the model that"),
        ("b", "a", "is an adapter of `.*b`, and that is an adapter of it: name the model that"),
        ("b", "b", "is an adapter of `.*b`, which is an adapter too: merge that"),
    ):
        folder = of("a", tmp_path / a_base)
        of("b", tmp_path / b_base)
        with pytest.raises(InputError, match=rf"^`{folder}` {said}") as caught:
            load_model(folder, hooks=1)
        assert len(str(caught.value)) < 400 + 4 * len(str(folder))
    other = of("a", base, target_modules=["nowhere"])
    with pytest.raises(InputError, match=r"^The adapter `.*` does not fit `.*: name the model that it was made for"):
        load_model(other, hooks=1)


def test_weights_that_git_lfs_did_not_fetch(base, packed, adapter, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n"
    for source, file in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors"), (packed, "model.gguf")):
        folder = tmp_path / file
        shutil.copytree(source if source.is_dir() else source.parent, folder)
        (folder / file).write_text(pointer)
        for model in {folder, folder / file if file.endswith(".gguf") else folder}:
            with pytest.raises(
                InputError, match=rf"{file}` is a pointer of Git LFS, .*: fetch them with `git lfs pull`"
            ):
                load_model(model, hooks=1)


def test_an_adapter_that_is_a_prompt_is_refused(base, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (`pip install 'itda[peft]'`)")
    from transformers import AutoModelForCausalLM

    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path)
    for given, words in ((model, WORDS), (tmp_path, None)):
        with pytest.raises(InputError, match="an adapter of type PROMPT_TUNING, which puts vectors before the text"):
            load_model(given, words, hooks=1)


# -- wrappers and quantised modules -----------------------------------------------------------------------------------


def test_a_model_in_a_wrapper_is_the_model(base):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    plain = load_model(model, WORDS, hooks=1)
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(with_adapter(base))):
        hooked = load_model(wrapped, WORDS, hooks=1)
        assert hooked.hook_points == ("model.layers.1",)
        if not hasattr(wrapped, "peft_config"):
            assert torch.equal(read(hooked), read(plain))
            assert fingerprint(hooked) == fingerprint(plain)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_torch_quantised_are_in_the_fingerprint(base):
    from torch.ao.quantization import quantize_dynamic
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    hooked = load_model(quantize_dynamic(plain, {nn.Linear}), WORDS, hooks=1)
    assert hooked.provenance(1)["quantization"] == "torch"
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight.mul_(2)
    other = load_model(quantize_dynamic(plain, {nn.Linear}), WORDS, hooks=1)
    assert fingerprint(hooked) != fingerprint(other)
    assert fingerprint(hooked, 1) == fingerprint(load_model(hooked, hooks=1))


# -- GGUF -------------------------------------------------------------------------------------------------------------


def written_gguf(folder, target):
    """The llama of `folder` as llama.cpp's converter writes it: float32, queries and keys in its order."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (`pip install 'itda[gguf]'`)")
    from safetensors.torch import load_file

    settings = json.loads((folder / "config.json").read_text())
    heads, key_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    words = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(settings["head_dim"])
    writer.add_value_length(settings["head_dim"])
    writer.add_rope_dimension_count(settings["head_dim"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_vocab_size(settings["vocab_size"])
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_token_types([3 if token == "<s>" else 1 for token in tokens])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, settings["num_hidden_layers"])
    for name, values in load_file(folder / "model.safetensors").items():
        if ".q_proj." in name or ".k_proj." in name:
            n = heads if ".q_proj." in name else key_heads
            values = values.reshape(n, 2, values.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(values.shape)
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory):
    pytest.importorskip("accelerate", reason="accelerate is not installed (`pip install 'itda[big]'`)")
    return written_gguf(base, tmp_path_factory.mktemp("packed") / "model.gguf")


def test_a_gguf_file_is_the_model_in_it(base, packed, capfd):
    plain = load_model(base, hooks=1)
    for name in (packed, packed.parent):
        model = load_model(name, hooks=1)
        assert model.provenance(1)["id"] == str(name)
        torch.testing.assert_close(read(model), read(plain))
        assert fingerprint(model) == fingerprint(plain)
        assert [model.tokenizer.decode(i) for i in range(300)] == [plain.tokenizer.decode(i) for i in range(300)]
        plainly = {"add_special_tokens": False}  # a GGUF file of this kind does not say what a text begins with
        assert load_tokenizer(name)(DOCUMENTS[0], **plainly).input_ids == WORDS(DOCUMENTS[0], **plainly).input_ids
        assert language_model(name, hooks=1).predicts
        assert hook_points(name).n_layers == 4
        assert untrained(name, WORDS).n_layers == 4
    assert capfd.readouterr() == ("", "")


def test_a_dictionary_of_a_gguf_file_finds_it_again(packed):
    stream = activations(packed, DOCUMENTS, layer=1, context_length=24, batch_rows=3)
    dictionary = build(stream, k=4, threshold=0.3)
    assert fingerprint(model_of(dictionary.cfg)[0]) == dictionary.cfg["model"]["fingerprint"]


def test_gguf_files_that_cannot_be_read(base, packed, tmp_path, monkeypatch):
    def refused(match, model=None, **settings):
        with pytest.raises(InputError, match=match) as caught:
            load_model(model or tmp_path, hooks=1, **settings)
        assert "\n" not in str(caught.value)

    refused(r"is a GGUF file, and `stream_layers` needs a model in safetensors", packed, stream_layers=True)
    refused(r"is a GGUF file, and `tensor_parallel` needs a model in safetensors", packed, tensor_parallel=2)
    shutil.copy(packed, tmp_path / "a.gguf")
    shutil.copy(packed, tmp_path / "b.gguf")
    refused(r"holds 2 GGUF files \(a.gguf for one\): pass the path of one")
    assert load_model(tmp_path / "b.gguf", hooks=1).n_layers == 4
    assert load_model(tmp_path, hooks=1, gguf_file="b.gguf").n_layers == 4
    (tmp_path / "b.gguf").rename(tmp_path / "b-00001-of-00002.gguf")
    refused(r"is one of several parts of a GGUF file", tmp_path / "b-00001-of-00002.gguf")
    (tmp_path / "b-00001-of-00002.gguf").write_bytes(packed.read_bytes()[:1000])
    (tmp_path / "b-00001-of-00002.gguf").rename(tmp_path / "c.gguf")
    refused(r"`.*c.gguf` could not be loaded", tmp_path / "c.gguf")
    monkeypatch.setattr(hub, "find_spec", lambda name: None if name == "gguf" else importlib.util.find_spec(name))
    refused(r"`model.gguf` is a GGUF file, which needs gguf: `pip install 'itda\[gguf\]'`", packed)


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_model_does_not_hide_one_of_the_hub_in_silence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "org/name"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "cfg.json").write_text("{}")
        with pytest.raises(InputError, match=rf"The folder `{name}` here .*hides the model `{name}` of the Hugging"):
            load_model(name, hooks=1)
        with pytest.raises(InputError, match=r"The folder `./.*` holds no config.json, so it is not a model: pass"):
            load_model(f"./{name}", hooks=1)
        with pytest.raises(InputError, match=rf"The folder `{name}` here .*hides"):
            load_tokenizer(name)
        (tmp_path / name / "cfg.json").unlink()
        with pytest.raises(InputError, match=rf"The folder {name} here .*so it is not an ITDA, and it hides {name}"):
            ITDA.from_pretrained(name)
    monkeypatch.chdir(tmp_path / "org")  # which is the advice
    with pytest.raises(InputError, match="`gpt2` is neither a local folder nor in the local cache"):
        load_model("gpt2", hooks=1, cache_dir=str(tmp_path / "cache"))


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_no_example_writes_into_a_folder_that_is_called_as_a_model_of_the_hub(page):
    said = (ROOT / page).read_text("utf-8")
    models = {"gpt2", "distilgpt2", *re.findall(r"itda (?:train|collect|hooks) ([\w./-]+)", said)}
    written = set(re.findall(r"--out ([\w./-]+)", said)) | set(re.findall(r"\.save\(\"([\w./-]+)\"\)", said))
    assert not models & written
