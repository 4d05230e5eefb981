"""Activations put back into the running model, of every family: what comes out, and what it costs."""

import numpy as np
import pytest
import torch

from itda.errors import InputError
from itda.metrics import ce_score
from itda.models import loading
from itda.models.splice import COPIES, FLOAT32, spliced
from itda.text.prompts import TokenStream
from tests import tiny_models

CAUSAL = [family for family in tiny_models.FAMILIES if family != "bert"]


def hooked(family="gpt2", hook=1):
    tokenizer = tiny_models.tokenizer(family)
    return loading.load_model(tiny_models.module(family, len(tokenizer)), tokenizer, hooks=hook)


def rows_of(model, documents=tiny_models.DOCUMENTS, length=24):
    return list(TokenStream(documents, model.tokenizer, context_length=length))


def scores(found, name):
    clean, zero = (found.cross_entropy[kind].mean() for kind in ("clean", "zero"))
    return ce_score(clean, found.cross_entropy[name].mean(), zero)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("place", ["block", "last block", "attn_out", "mlp_out"])
def test_identity_scores_one_and_zero_scores_zero_exactly(family, place):
    hook = {"block": 1, "last block": 3}.get(place, f"blocks.2.hook_{place}")
    model = hooked(family, hook)
    name = model.hook_points[0]
    replacements = {"zero": torch.zeros_like, "same": torch.clone, "nothing": torch.zeros_like}
    replacements |= {"other": lambda x: x.roll(1, 0)}
    found = spliced(model, rows_of(model), name, replacements, batch_rows=3)
    assert scores(found, "same") == 1.0 and scores(found, "nothing") == 0.0
    assert not found.kl["same"].any() and found.kl["other"].mean() > 0
    assert (found.cross_entropy["other"] != found.cross_entropy["clean"]).any()


@pytest.mark.parametrize("family", CAUSAL)
def test_losses_are_those_of_the_module_with_a_hook_of_ones_own(family):
    model, shift = hooked(family), 0.3
    row = max(rows_of(model), key=lambda row: len(row.ids))
    found = spliced(model, [row], model.hook_points[0], {"shifted": lambda x: x + shift})
    ids = torch.from_numpy(row.ids)[None]

    def moved(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        x = x.clone()
        x[0, 1:] += shift  # position 0 and special tokens pass untouched
        return (x, *output[1:]) if isinstance(output, tuple) else x

    block = model.module.get_submodule(model.hook_points[0])
    for name, hook in (("clean", None), ("shifted", moved)):
        handle = block.register_forward_hook(hook) if hook else None
        with torch.no_grad():
            logits = model.module(input_ids=ids).logits
        if handle:
            handle.remove()
        want = torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="none")
        assert np.allclose(found.cross_entropy[name], want.numpy(), atol=1e-4), name
        if name == "clean":
            base = logits[0, :-1].double().log_softmax(1)
        else:
            other = logits[0, :-1].double().log_softmax(1)
            assert np.allclose(found.kl[name], (base.exp() * (base - other)).sum(1).numpy(), atol=1e-4)
    assert not row.special[1:].any()


def test_batches_and_padding_change_nothing():
    model = hooked()
    rows, hook = rows_of(model), model.hook_points[0]
    assert len({len(row.ids) for row in rows}) > 2
    whole, single = (spliced(model, rows, hook, {"half": lambda x: x / 2}, batch_rows=n) for n in (len(rows), 1))
    for kind in ("clean", "half"):
        assert np.allclose(whole.cross_entropy[kind], single.cross_entropy[kind], atol=1e-4)
    assert (whole.prompt == single.prompt).all() and (whole.position == single.position).all()
    lengths = np.array([len(row.ids) for row in rows])
    assert len(whole.prompt) == (lengths - 1).sum()
    assert np.bincount(whole.prompt).tolist() == (lengths - 1).tolist()


def test_special_tokens_pass_untouched_unless_asked():
    model = hooked()
    rows, seen = rows_of(model, ["one two", "three <s> four"]), []
    assert sum(row.special.sum() for row in rows) == 3

    def watch(x):
        seen.append(len(x))
        return x

    for special in (False, True):
        spliced(model, rows, model.hook_points[0], {"watch": watch}, special_tokens=special)
    total = sum(len(row.ids) for row in rows)
    assert seen == [total - 3, total]


def test_a_model_without_a_head_predicts_nothing(tmp_path):
    encoder = hooked("bert")
    assert not encoder.predicts and hooked().predicts
    with pytest.raises(InputError, match="without a language modelling head"):
        spliced(encoder, rows_of(encoder), encoder.hook_points[0], {})
    cut = loading.load_model(tiny_models.save("llama", tmp_path / "llama"), hooks=1)
    assert not cut.predicts
    assert loading.language_model(tmp_path / "llama", hooks=1).predicts
    tiny_models.save("bert", tmp_path / "bert")
    assert not loading.language_model(tmp_path / "bert", hooks=1).predicts


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_sees_what_it_is_to_predict_is_refused(seed):
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_models.tokenizer("bert")
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(tiny_models.config("bert", len(tokenizer), is_decoder=False)).eval()
    model = loading.load_model(module, tokenizer, hooks=1)
    assert not model.predicts
    with pytest.raises(InputError, match=r"sees the tokens that it is to predict .*; pass a causal language model"):
        model.logits(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3))


def test_the_model_is_left_as_it_was():
    model = hooked()
    model.module.train()
    ids = torch.arange(5)[None]

    def stop(x):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.logits(ids, torch.ones(1, 5), {model.hook_points[0]: stop})
    assert model.module.training and all(not m._forward_hooks for m in model.module.modules())
    model.module.eval()
    with torch.no_grad():
        assert torch.equal(model.logits(ids, torch.ones(1, 5)), model.module(input_ids=ids).logits)


def test_nothing_to_read():
    model = hooked()
    with pytest.raises(InputError, match="There is no row of text"):
        spliced(model, [], model.hook_points[0], {})


def test_logits_stay_within_the_budget_and_the_clean_pass_serves_all():
    model = hooked("llama")
    rows, hook = rows_of(model), model.hook_points[0]
    replacements = {"half": lambda x: x / 2, "same": torch.clone, "nothing": torch.zeros_like}
    whole = spliced(model, rows, hook, replacements, batch_rows=4)
    sizes, run = [], model.logits

    def watched(ids, mask, replace=None, places=None):
        out = run(ids, mask, replace, places)
        sizes.append((replace is None, out.shape[0] * out.shape[1]))
        return out

    model.logits = watched
    for tokens in (1000, 60, 24, 7, 1):  # four rows, two, one, pieces of one, a token at a time
        sizes.clear()
        budget = float(tokens * COPIES * FLOAT32 * model.vocabulary)
        found = spliced(model, rows, hook, replacements, batch_rows=4, budget=budget)
        assert max(size for _, size in sizes) <= max(tokens, 1)
        assert sum(clean for clean, _ in sizes) * (1 + len(replacements)) == len(sizes)
        assert (found.prompt == whole.prompt).all() and (found.position == whole.position).all()
        for name in ("clean", *replacements):
            assert np.allclose(found.cross_entropy[name], whole.cross_entropy[name], atol=1e-4)
        assert (found.cross_entropy["same"] == found.cross_entropy["clean"]).all() and not found.kl["same"].any()
        assert np.allclose(found.kl["half"], whole.kl["half"], atol=1e-4)


def test_a_model_that_cannot_be_told_which_logits_to_give_gives_all(monkeypatch):
    model = hooked()
    ids, places = torch.arange(9)[None], torch.tensor([2, 5])
    want = model.logits(ids, torch.ones(1, 9))[:, places]
    assert torch.allclose(model.logits(ids, torch.ones(1, 9), None, places), want, atol=1e-5)
    real = model.module.forward
    monkeypatch.setattr(
        model.module, "forward", lambda input_ids, attention_mask: real(input_ids, attention_mask=attention_mask)
    )
    assert torch.allclose(model.logits(ids, torch.ones(1, 9), None, places), want, atol=1e-5)
