"""What an SAE says it was made for: refused, or told, where its error on our activations would say nothing."""

from __future__ import annotations

import json

import pytest
import sae_lens
import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAEConfig

import itda
from itda.errors import InputError
from itda.evaluation.evaluate import evaluate
from itda.interop.saelens import as_sae, load_sae, system_of
from itda.progress import telling
from tests import tiny_models

HOOK = "blocks.1.hook_resid_post"
TEXTS = [f"{text} {word}." for word in ("one", "two", "three", "four", "five") for text in tiny_models.DOCUMENTS]
NEW = [f"{a} {b}".swapcase() for a in tiny_models.DOCUMENTS for b in tiny_models.DOCUMENTS[:4]]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model that is called as one of the hub is, a dictionary of it, activations, and an SAE without a flaw."""
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "gpt2")
    how = {"layer": 1, "context_length": 24, "batch_rows": 2}
    itda.train(str(home / "gpt2"), TEXTS, home / "d", k=4, tokens=500, **how)
    (home / "new.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in NEW))
    itda.collect(str(home / "gpt2"), NEW, home / "acts", tokens=400, **how)
    return home


def made(folder, kind=StandardSAEConfig, **settings):
    """A random SAE saved by SAELens; `settings` that its config does not know go into the metadata."""
    own = {name: settings.pop(name) for name in list(settings) if name in kind.__dataclass_fields__}
    if "coder" in kind.architecture():
        own["apply_b_dec_to_input"] = False
    metadata = SAEMetadata(**{"hook_name": HOOK, "model_name": "gpt2-small"} | settings)
    cfg = kind(**{"d_in": 32, "d_sae": 64, "metadata": metadata} | own)
    sae = sae_lens.SAE.get_sae_class_for_architecture(kind.architecture())(cfg)
    noise = torch.Generator().manual_seed(1)
    for p in sae.parameters():
        p.data = torch.randn(p.shape, generator=noise) * 0.3
    sae.save_model(folder)
    return sae


def refusal(function, *args, **settings) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FLAWS = [
    ("transcoder", {"d_out": 32}, "'x' is a transcoder, which predicts other activations than it reads"),
    ("transcoder", {"d_out": 48}, "'x' is a transcoder, which predicts other activations than it reads"),
    ("skip_transcoder", {"d_out": 32}, "'x' is a skip transcoder, which predicts other activations"),
    ("jumprelu_transcoder", {"d_out": 32}, "'x' is a jumprelu transcoder, which predicts other activations"),
    ("standard", {"hook_name_out": "blocks.1.hook_mlp_out"}, "other activations at 'blocks.1.hook_mlp_out' than"),
    (
        "standard",
        {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
        r"processed weights \(`center_wri",
    ),
    (
        "standard",
        {"hook_name": "blocks.1.ln2.hook_normalized", "model_from_pretrained_kwargs": {"fold_ln": True}},
        r"processed weights \(`fold_ln`\), whose activations are others",
    ),
    (
        "standard",
        {"normalize_activations": "expected_average_only_in"},
        r"was trained on scaled activations .*: fold the scale in \(`sae.fold_activation_norm_scaling_factor`\)",
    ),
    ("standard", {"reshape_activations": "hook_z", "hook_name": "blocks.1.attn.hook_z"}, "reads attention heads apart"),
    ("standard", {"hook_head_index": 3}, "reads attention heads apart"),
]


@pytest.mark.parametrize(("kind", "settings", "sentence"), FLAWS)
def test_what_is_no_sae_of_these_activations_is_refused(kind, settings, sentence, tmp_path):
    from sae_lens.registry import get_sae_class

    config = get_sae_class(kind)[1]
    sae = made(tmp_path / "x", config, **settings)
    for function, args in ((load_sae, (tmp_path / "x",)), (system_of, (sae, "x"))):
        with pytest.raises(InputError, match=sentence):
            function(*args)


def test_an_sae_says_where_it_was_made(tmp_path):
    made(tmp_path / "x", hook_name=None)
    assert "'x' does not say at which hook point it was made" in refusal(load_sae, tmp_path / "x")
    cfg = json.loads((tmp_path / "x" / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = HOOK  # which is the advice
    (tmp_path / "x" / "cfg.json").write_text(json.dumps(cfg))
    assert load_sae(tmp_path / "x").hook_point == HOOK


def test_a_scale_that_was_folded_in_is_no_flaw(tmp_path, home):
    sae = made(tmp_path / "x", normalize_activations="expected_average_only_in")
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sae.decode(sae.encode(x * 0.5)) / 0.5
    sae.fold_activation_norm_scaling_factor(0.5)
    sae.save_model(tmp_path / "x")
    torch.testing.assert_close(load_sae(tmp_path / "x").run(x)[0], expected, rtol=1e-4, atol=1e-4)
    for kind in ("layer_norm", "constant_norm_rescale"):  # which SAELens does as it runs
        sae = made(tmp_path / kind, normalize_activations=kind)
        with torch.no_grad():
            torch.testing.assert_close(load_sae(tmp_path / kind).run(x)[0], sae(x), rtol=1e-4, atol=1e-4)


def test_an_sae_of_another_model_or_place_is_refused(home, tmp_path):
    def measured(data="new.jsonl", **said):
        made(tmp_path / "x", **said)
        settings = dict(tokens=150, ce_tokens=0, controls=False, systems=[load_sae(tmp_path / "x")])
        return evaluate(home / "d", home / data, **settings, in_sample=True)

    for data in ("new.jsonl", "acts"):
        told: list[str] = []
        with telling(told.append):
            measured(data)  # TransformerLens calls it gpt2-small
            assert not any("was made for" in line for line in told)
            measured(data, model_name="pythia-70m")  # a folder may be called anything
        assert any("x was made for pythia-70m; whether" in line for line in told)
        assert "x was made for" in refusal(measured, data, hook_name="blocks.2.hook_resid_post")
    assert measured(hook_name=f"transformer.h.{1}").systems["x"]["fvu"] > 0


def test_a_name_of_the_hub_says_which_model_it_is(tmp_path):
    from itda.evaluation.systems import check_model

    made(tmp_path / "x", model_name="pythia-70m-deduped")
    system = load_sae(tmp_path / "x")
    check_model(system, "EleutherAI/pythia-70m-deduped")
    said = refusal(check_model, system, "EleutherAI/pythia-160m")
    assert "x was made for the model 'pythia-70m-deduped', and the dictionary for 'EleutherAI/pythia-160m'" in said


def test_our_own_architecture_has_no_flaw(home):
    dictionary = itda.ITDA.load(home / "d")
    assert system_of(as_sae(dictionary), "own").made_for == str(home / "gpt2")
