"""Activations are those of the full model on the same rows, whatever was not loaded, not run, skipped or cut off."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

from itda.dictionary.build import build
from itda.errors import InputError
from itda.labels import Labels
from itda.models.loading import load_model
from itda.reading.activations import activations
from itda.text.prompts import TokenStream, hash_rows
from tests.tiny_models import DOCUMENTS, FAMILIES, LAYERS, POSITIONS, WIDTH, module, save, tokenizer

ROWS, LENGTH = 3, 24  # of a group: three rows, so that taking the first for all shows
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
BLOCKS |= {"bert": "bert.encoder.layer"}  # "model.layers" in the others


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a family, made when it is first asked for."""
    made = {}

    def folder(family: str, seed: int = 0, **settings) -> str:
        key = (family, seed, *sorted(settings.items()))
        if key not in made:
            made[key] = str(save(family, tmp_path_factory.mktemp(family), seed, **settings))
        return made[key]

    return folder


@pytest.fixture
def gpt2(folders):
    return folders("gpt2")


def read(model, **settings):
    """All batches of `activations` on the documents, as one (activations, labels); or a dict of them."""
    return joined(activations(model, DOCUMENTS, **{"context_length": LENGTH, "batch_rows": ROWS} | settings))


def joined(stream):
    batches = list(stream)
    if isinstance(batches[0], dict):
        return {hook: _joined([batch[hook] for batch in batches]) for hook in batches[0]}
    return _joined(batches)


def _joined(batches):
    for x, labels in batches:
        assert len(x) == len(labels) > 0
    return torch.cat([x for x, _ in batches]), Labels.concat([labels for _, labels in batches])


def same(a, b) -> bool:
    """Are two (activations, labels) the same to the last bit?"""
    arrays = ("token_id", "document", "start", "end")
    return (
        torch.equal(a[0], b[0])
        and np.array_equal(a[1].pairs(), b[1].pairs())
        and all(np.array_equal(getattr(a[1], name), getattr(b[1], name)) for name in arrays)
    )


def first(output) -> torch.Tensor:
    """A block's activations: transformers 5 returns a tensor, transformers 4 often a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def reference(whole, words, inner: str | None = None):
    """Every block's output (or that of its module `inner`) on the valid tokens, from whole forward passes.

    The rows are padded and the outputs taken here once more, with nothing of the code under test.
    """
    blocks = next(m for m in whole.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    outputs: dict[int, torch.Tensor] = {}

    def keep(i):
        def hook(module, args, output):
            outputs[i] = first(output)

        return hook

    watched = [block.get_submodule(inner) if inner else block for block in blocks]
    handles = [m.register_forward_hook(keep(i)) for i, m in enumerate(watched)]
    rows, found = list(TokenStream(DOCUMENTS, words, context_length=LENGTH)), [[] for _ in blocks]
    for start in range(0, len(rows), ROWS):
        group = rows[start : start + ROWS]
        width = max(len(row.ids) for row in group)
        ids, mask = torch.zeros(len(group), width, dtype=torch.int64), torch.zeros(len(group), width, dtype=torch.int64)
        for i, row in enumerate(group):
            ids[i, : len(row.ids)], mask[i, : len(row.ids)] = torch.tensor(row.ids), 1
        with torch.no_grad():
            hidden = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for layer, kept in enumerate(found):
            if inner is None and layer < LAYERS - 1:  # the last of `hidden` is normalised
                assert torch.equal(hidden[layer + 1], outputs[layer])
            assert outputs[layer].shape == (*ids.shape, WIDTH)
            for i, row in enumerate(group):
                kept += [outputs[layer][i, t] for t in range(1, len(row.ids)) if not row.special[t]]
    for handle in handles:
        handle.remove()
    return [torch.stack(kept) for kept in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_that_of_the_whole_model(family, folders):
    words = tokenizer(family)
    expected = reference(module(family, len(words)), words)
    found = read(folders(family), layer=list(range(LAYERS)))
    blocks = BLOCKS.get(family, "model.layers")
    assert list(found) == [f"{blocks}.{layer}" for layer in range(LAYERS)]
    for layer, (x, labels) in enumerate(found.values()):
        assert x.dtype == torch.float32
        assert len(labels) > 100
        assert torch.equal(x, expected[layer])
        # Alone, from a model that has no blocks above: the same.
        assert same(read(folders(family), layer=layer), (x, labels))


@pytest.mark.parametrize("family", FAMILIES)
def test_upper_layers_are_not_loaded(family, folders):
    for layer in range(LAYERS):
        model = load_model(folders(family), hooks=[layer])
        whole = load_model(folders(family), hooks=[LAYERS - 1])
        blocks = [m for m in model.module.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layer + 1]
        assert len(blocks) == 1
        block = sum(p.numel() for p in blocks[0][0].parameters())
        total = [sum(p.numel() for p in m.module.parameters()) for m in (model, whole)]
        assert total[1] - total[0] == (LAYERS - 1 - layer) * block
        assert model.n_layers == LAYERS


def test_depth_that_the_blocks_compute_with_is_kept(folders):
    """MiniCPM3 scales its residuals by 1 / sqrt(depth): a config cut to two layers would give other activations."""
    pytest.importorskip("transformers.models.minicpm3")
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    words = tokenizer()
    expected = reference(module("minicpm3", len(words), **sizes), words)
    assert torch.equal(read(folders("minicpm3", **sizes), layer=1)[0], expected[1])


def test_an_architecture_that_cannot_be_cut_is_loaded_whole(gpt2, monkeypatch):
    from transformers import GPT2Model

    expected, tried = read(gpt2, layer=1), []

    def refuse(cls, *args, **kwargs):
        tried.append(cls)
        if cls is not GPT2Model:
            raise RuntimeError("its blocks know each other")
        return whole(*args, **kwargs)

    whole = GPT2Model.from_pretrained
    monkeypatch.setattr(GPT2Model, "from_pretrained", classmethod(refuse))
    stream = activations(gpt2, DOCUMENTS, layer=1, context_length=LENGTH, batch_rows=ROWS)
    assert len(tried) == 2
    assert len(stream.model.module.h) == LAYERS
    assert same(joined(stream), expected)


@pytest.mark.parametrize("last", [0, 2])
def test_forward_stops_at_the_last_hook_point(last, gpt2):
    model = module("gpt2")
    model.transformer.h[last + 1].forward = None  # would raise if called
    stream = activations(model, DOCUMENTS, layer=[0, last], tokenizer=tokenizer(), context_length=LENGTH)
    assert len(list(stream)) > 0


def test_a_module_path_is_that_module(folders):
    words = tokenizer("llama")
    expected = reference(module("llama", len(words)), words, "mlp")
    for hook in ("model.layers.2.mlp", "layers.2.mlp", "blocks.2.hook_mlp_out"):
        assert torch.equal(read(folders("llama"), hook=hook)[0], expected[2])


# What TransformerLens means by `blocks.2.hook_...`, as paths in a block of Hugging Face's.
LENS = {
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "llama": ("self_attn", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "opt": ("self_attn", "fc2"),
    "phi": ("self_attn", "mlp"),
}


@pytest.mark.parametrize("family", LENS)
def test_transformer_lens_names(family, folders):
    blocks = BLOCKS.get(family, "model.layers")
    hooks = [f"blocks.2.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    found = read(folders(family), hook=hooks)
    attention, mlp = LENS[family]
    named = (f"{blocks}.1", f"{blocks}.2.{attention}", f"{blocks}.2.{mlp}", f"{blocks}.2")
    assert [*found][:: len(found) - 1] == [named[0], named[3]]
    assert set(found) == set(named)
    # All families here add both to the residual stream, at once or one after the other.
    before, after_attention, after_mlp, after = (found[name][0] for name in named)
    torch.testing.assert_close(before + after_attention + after_mlp, after, rtol=1e-5, atol=1e-5)


def test_several_hook_points_are_the_single_ones_in_forward_order(gpt2):
    hooks = ["transformer.h.2", "transformer.h.0.mlp", "blocks.0.hook_resid_post", "transformer.wte", "h.2.mlp.c_fc"]
    order = ["transformer.wte", "transformer.h.0.mlp", "transformer.h.0", "transformer.h.2.mlp.c_fc", "transformer.h.2"]
    found = read(gpt2, hook=hooks)
    assert list(found) == order
    for hook in order:
        assert same(found[hook], read(gpt2, hook=hook))
    assert found["transformer.h.2.mlp.c_fc"][0].shape[1] == 4 * WIDTH
    assert list(read(gpt2, layer=[-1, 3])) == ["transformer.h.3"]


def test_what_a_later_module_writes_into_does_not_change(gpt2):
    """Remote code may add to the residual stream in place."""
    model, words = module("gpt2"), tokenizer()
    expected = read(model, layer=[0, 1], tokenizer=words)
    forward = model.transformer.h[1].forward

    def writes(x, *args, **kwargs):
        return x.copy_(first(forward(x.clone(), *args, **kwargs)))

    model.transformer.h[1].forward = writes
    found = read(model, layer=[0, 1], tokenizer=words)
    assert all(same(found[hook], expected[hook]) for hook in expected)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, None), lambda x: [x], lambda x: {"hidden": x, "other": None}]
)
def test_blocks_that_return_a_tensor_or_a_tuple(wrap, gpt2):
    """A tuple in transformers 4 for GPT-2 and others, a tensor in transformers 5."""
    model, words = module("gpt2"), tokenizer()
    expected = read(model, layer=2, tokenizer=words)
    forward = model.transformer.h[2].forward
    model.transformer.h[2].forward = lambda *args, **kwargs: wrap(first(forward(*args, **kwargs)))
    assert same(read(model, layer=2, tokenizer=words), expected)


def test_flattened_rows_are_unflattened():
    """As in OPT's feed-forward layers under transformers 4."""
    model, words = module("llama"), tokenizer()
    expected = read(model, hook="layers.2.mlp", tokenizer=words)
    forward = model.model.layers[2].mlp.forward
    model.model.layers[2].mlp.forward = lambda x: forward(x).flatten(0, 1)
    assert same(read(model, hook="layers.2.mlp", tokenizer=words), expected)


def test_the_head_the_folder_and_the_base_model_make_no_difference(gpt2):
    model, words = module("gpt2"), tokenizer()
    assert same(read(model, layer=1, tokenizer=words), read(gpt2, layer=1))
    assert same(read(model.transformer, layer=1, tokenizer=words), read(gpt2, layer=1))
    assert same(read(load_model(gpt2, hooks=[0, 1, 2]), layer=1), read(gpt2, layer=1))
    assert same(read(model, layer=1, tokenizer=gpt2), read(gpt2, layer=1))


def state(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [m.training for m in model.modules()], hooks, [p.requires_grad for p in model.parameters()]


def test_a_loaded_module_is_left_as_it_was():
    model, words = module("gpt2", attn_pdrop=0.5, resid_pdrop=0.5), tokenizer()
    expected = read(model, layer=2, tokenizer=words)
    model.train()
    model.transformer.h[0].mlp.eval()  # a part that its owner has frozen
    model.transformer.h[1].register_forward_hook(lambda *_: None)
    before = state(model)
    assert same(read(model, layer=2, tokenizer=words), expected)  # without dropout
    assert not read(model, layer=2, tokenizer=words)[0].requires_grad
    assert state(model) == before


def test_a_loaded_module_is_left_as_it_was_when_reading_fails():
    model, words = module("gpt2").train(), tokenizer()
    stream = activations(model, DOCUMENTS, layer=[1, 3], tokenizer=words, context_length=LENGTH)
    before, forward = state(model), model.transformer.h[2].forward

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    model.transformer.h[2].forward = fail
    with pytest.raises(ZeroDivisionError):
        list(stream)
    with pytest.raises(ZeroDivisionError):
        load_model(model, words, hooks=[3])
    assert state(model) == before
    model.transformer.h[2].forward = forward
    assert len(list(stream)) > 0


def test_labels_say_which_token_of_which_document(folders):
    for family in ("gpt2", "bert"):
        words = tokenizer(family)
        x, labels = read(folders(family), layer=0)
        rows = list(TokenStream(DOCUMENTS, words, context_length=LENGTH))
        assert len(x) == len(labels)
        for i in range(len(labels)):
            row, t = rows[labels.prompt[i]], labels.position[i]
            assert (row.prompt, row.document) == (labels.prompt[i], labels.document[i])
            assert row.ids[t] == labels.token_id[i]
            assert not row.special[t] and t > 0
            assert labels.token(i) == DOCUMENTS[row.document][labels.start[i] : labels.end[i]]
            if DOCUMENTS[row.document].isascii():
                assert words.decode([row.ids[t]]).removeprefix("##") == labels.token(i).lower() or family == "gpt2"
                assert words.decode([row.ids[t]]) == labels.token(i) or family == "bert"
        assert "".join(labels.token(int(i)) for i in np.flatnonzero(labels.document == 2)) == "Short."


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_special_tokens_on_request(family, folders):
    rows = list(TokenStream(DOCUMENTS, tokenizer(family), context_length=LENGTH))
    x, labels = read(folders(family), layer=1, special_tokens=True)
    assert len(x) == sum(len(row.ids) for row in rows)
    plain = read(folders(family), layer=1)
    special = np.concatenate([row.special for row in rows])
    first = labels.position == 0
    assert first.sum() == len(rows)
    assert np.array_equal(special, first if family == "gpt2" else first | (labels.token_id == 3))
    assert labels.token(0) == f"<token {labels.token_id[0]}>"
    assert same((x[torch.from_numpy(~special)], labels[~special]), plain)


def test_padding_on_request_is_that_of_the_published_code(gpt2):
    """Rows filled to the context length with EOS, no attention mask, the filling read like text."""
    rows = list(TokenStream(DOCUMENTS, tokenizer(), context_length=LENGTH))
    x, labels = read(gpt2, layer=1, padding=True, special_tokens=True)
    assert len(x) == len(rows) * LENGTH
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.int64)  # EOS is 0
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
    with torch.no_grad():
        hidden = module("gpt2", len(tokenizer()))(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(x, hidden.flatten(0, 1))
    assert np.array_equal(labels.token_id, ids.flatten().numpy())
    filling = labels.position >= np.array([len(row.ids) for row in rows])[labels.prompt]
    assert filling.any()
    assert filling.sum() == sum(LENGTH - len(row.ids) for row in rows)
    assert (labels.start[filling] == -1).all() and (labels.end[filling] == -1).all()
    # Without the special tokens: the filling, and what is not special.
    fewer = read(gpt2, layer=1, padding=True)
    special = np.concatenate([np.r_[row.special, np.zeros(LENGTH - len(row.ids), bool)] for row in rows])
    assert same(fewer, (x[torch.from_numpy(~special)], labels[~special]))


@pytest.mark.parametrize(("padding", "width"), [(False, None), (True, LENGTH)])
def test_rows_are_filled_to_the_longest_of_their_group(padding, width, gpt2, monkeypatch):
    texts = ["One short.", "Two.", "Some more words.", "A.", "Be."]
    lengths = [len(row.ids) for row in TokenStream(texts, tokenizer(), context_length=LENGTH)]
    assert max(lengths[:3]) != max(lengths[3:]) and max(lengths) < LENGTH
    stream = activations(gpt2, texts, layer=0, context_length=LENGTH, batch_rows=ROWS, padding=padding)
    shapes, original = [], type(stream.model).read
    monkeypatch.setattr(
        type(stream.model), "read", lambda m, ids, mask: shapes.append(ids.shape) or original(m, ids, mask)
    )
    list(stream)
    assert shapes == [(3, width or max(lengths[:3])), (2, width or max(lengths[3:]))]


def test_groups_of_rows_depend_on_the_stream_alone(gpt2):
    """A budget, several hook points or a seed of the caller change no bit."""
    whole = read(gpt2, layer=1)
    sizes = [len(labels) for _, labels in activations(gpt2, DOCUMENTS, layer=1, context_length=LENGTH, batch_rows=ROWS)]
    for tokens in (1, sizes[0] - 1, sizes[0], sizes[0] + 1, sum(sizes) - 1, sum(sizes), sum(sizes) + 1):
        stream = activations(gpt2, DOCUMENTS, layer=1, tokens=tokens, context_length=LENGTH, batch_rows=ROWS)
        assert stream.tokens == tokens
        n = min(tokens, sum(sizes))
        found = joined(stream)
        assert len(found[0]) == n
        assert same(found, (whole[0][:n], whole[1][:n]))
        assert same(joined(stream), found)  # again
    # Other groups: the same up to rounding.
    torch.testing.assert_close(read(gpt2, layer=1, batch_rows=1)[0], whole[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [None, 150])
def test_skip_continues_identically(budget, gpt2, monkeypatch):
    stream = activations(gpt2, DOCUMENTS, layer=1, tokens=budget, context_length=LENGTH, batch_rows=ROWS)
    batches = list(stream)
    ends = np.cumsum([len(batch.labels) for batch in batches])
    provenance = stream.provenance
    ran = []
    original = type(stream.model).read
    monkeypatch.setattr(type(stream.model), "read", lambda self, *args: ran.append(1) or original(self, *args))
    for done, end in enumerate(ends, 1):
        rest = stream.skip(int(end))
        assert rest.tokens == (None if budget is None else budget - end)
        ran.clear()
        found = list(rest)
        assert len(found) == len(ran) == len(batches) - done
        assert all(same(a, b) for a, b in zip(found, batches[done:], strict=True))
        assert rest.provenance == provenance
        if done > 1:
            assert same(next(iter(stream.skip(int(ends[0])))), batches[1])
            assert [*map(len, stream.skip(int(ends[0])).skip(int(end - ends[0])))] == [*map(len, found)]
    # Inside a group: the rest of it, from a run of the whole group.
    inside = joined(stream.skip(int(ends[0]) + 5))
    x, labels = _joined(batches[1:])
    assert same(inside, (x[5:], labels[5:]))
    with pytest.raises(InputError, match=rf"`data` has {ends[-1]}: pass what was read before"):
        list(stream.skip(10_000))
    with pytest.raises(InputError, match="`tokens` is -1, and no fewer than 0"):
        stream.skip(-1)


@pytest.mark.parametrize("settings", [{}, {"special_tokens": True}, {"padding": True}, {"tokens": 150}])
def test_tokens_are_counted_without_the_model(settings, gpt2, monkeypatch):
    stream = activations(gpt2, DOCUMENTS, layer=0, context_length=LENGTH, batch_rows=ROWS, **settings)
    n = sum(len(batch.labels) for batch in stream)
    monkeypatch.setattr(type(stream.model), "read", None)
    assert stream.count_tokens() == stream.count_tokens(10_000) == n
    assert stream.count_tokens(7) == stream.skip(10).count_tokens(7) == 7
    assert stream.skip(n - 20).count_tokens() == 20
    assert stream.skip(n + 20).count_tokens() == 0


def test_provenance_can_be_written_down(gpt2):
    stream = activations(gpt2, DOCUMENTS, layer=2, context_length=LENGTH, batch_rows=ROWS)
    empty = stream.provenance["stream"]["hash"]
    list(stream)
    found = json.loads(json.dumps(stream.provenance))
    assert found == stream.provenance
    rows = TokenStream(DOCUMENTS, tokenizer(), context_length=LENGTH)
    assert found["stream"] == {**rows.provenance, "hash": hash_rows(rows)}
    assert found["stream"]["hash"] != empty
    list(stream)  # again
    assert stream.provenance == found
    assert stream.skip(5).provenance["stream"]["hash"] == empty
    # A budget ends the reading of rows with the group in which it is reached.
    first = [*rows][:ROWS]
    n = sum(len(row.ids) - 1 for row in first)
    for tokens in (1, n):
        cut = activations(gpt2, DOCUMENTS, layer=2, tokens=tokens, context_length=LENGTH, batch_rows=ROWS)
        list(cut)
        assert cut.provenance["stream"]["hash"] == hash_rows(first)
    model = found["model"]
    assert (model["id"], model["hook_point"], model["layer"], model["d"]) == (gpt2, "transformer.h.2", 2, WIDTH)
    assert (model["dtype"], model["model_type"], model["revision"]) == ("float32", "gpt2", None)
    assert found["batch_rows"] == ROWS and found["padding"] is False and found["special_tokens"] is False
    several = activations(gpt2, DOCUMENTS, hook=["h.2", "transformer.wte"], context_length=LENGTH, batch_rows=ROWS)
    list(several)
    assert several.provenance["transformer.h.2"] == found
    assert several.provenance["transformer.wte"]["model"]["layer"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_is_that_of_the_weights_that_are_read(family, folders, tmp_path):
    def fingerprint(model, layer=1, **settings):
        return load_model(model, hooks=[layer], **settings).provenance(layer)["fingerprint"]

    words = tokenizer(family)
    whole = module(family, len(words))
    expected = fingerprint(folders(family))
    assert fingerprint(whole, tokenizer=words) == fingerprint(whole.base_model, tokenizer=words) == expected
    assert load_model(folders(family), hooks=[1, 3]).provenance(1)["fingerprint"] == expected
    assert fingerprint(folders(family), dtype="bfloat16") == expected
    assert fingerprint(folders(family), layer=2) != expected
    assert fingerprint(folders(family, seed=1)) != expected
    # The same half precision checkpoint in three precisions.
    half = save(family, tmp_path / "half", dtype=torch.float16)
    assert len({fingerprint(half, dtype=dtype) for dtype in ("float32", "float16", "bfloat16")}) == 1
    # Every weight up to block 1 counts, and no other.
    model = load_model(whole, words, hooks=[1])
    for name, p in whole.base_model.named_parameters():
        above = any(f".{layer}." in f".{name}" for layer in (2, 3)) or name.startswith(("ln_f", "norm", "pooler"))
        above |= name.startswith(("final_layer", "decoder.final_layer"))
        with torch.no_grad():
            p.view(-1)[0] += 1
            assert (model.provenance(1)["fingerprint"] == expected) == above, name
            p.view(-1)[0] -= 1


def test_the_fingerprint_of_a_part_is_that_of_its_block(gpt2):
    """One value per depth, wherever in the block a hook point is."""
    hooks = ["transformer.h.1.attn", "transformer.h.1.mlp.c_fc", "transformer.h.1"]
    found = {load_model(gpt2, hooks=[hook]).provenance(hook)["fingerprint"] for hook in hooks}
    assert len(found | {load_model(gpt2, hooks=hooks).provenance(hooks[0])["fingerprint"]}) == 1


def test_precision(gpt2, tmp_path):
    half = save("gpt2", tmp_path, dtype=torch.float16)
    assert load_model(half, hooks=[1], device="cpu").dtype == torch.float32
    assert read(gpt2, layer=1, dtype="float16")[0].dtype == torch.float16
    assert read(gpt2, layer=1, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    model = load_model(gpt2, hooks=[1], dtype="bfloat16", device="cpu")
    assert (model.dtype, model.device, model.provenance(1)["dtype"]) == (
        torch.bfloat16,
        torch.device("cpu"),
        "bfloat16",
    )


def test_rows_as_long_as_the_model_has_positions(gpt2):
    text = [" ".join(DOCUMENTS)]
    rows = list(activations(gpt2, text, layer=0, context_length=POSITIONS))
    assert max(batch.labels.position.max() for batch in rows) == POSITIONS - 1
    with pytest.raises(InputError, match=f"`context_length` is {POSITIONS + 1}.*pass {POSITIONS} or fewer"):
        activations(gpt2, text, layer=0, context_length=POSITIONS + 1)


def test_roberta_has_fewer_positions_than_its_table(tmp_path):
    folder = save("roberta", tmp_path, pad_token_id=1)
    assert load_model(folder, hooks=[0]).max_length == POSITIONS - 2


def test_loading_is_silent_and_leaves_logging_alone(gpt2, capfd):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    def settings():
        levels = [logging.getLogger(name).level for name in ("transformers", "huggingface_hub")]
        return (
            *levels,
            transformers_logging.is_progress_bar_enabled(),
            are_progress_bars_disabled(),
            [*warnings.filters],
        )

    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    before = settings()
    assert before[2:4] == (True, False)
    list(activations(gpt2, DOCUMENTS, layer=0, context_length=LENGTH))
    with pytest.raises(InputError):
        load_model(gpt2, hooks=[99])
    assert settings() == before
    assert capfd.readouterr() == ("", "")


def test_a_stream_says_what_it_is_of(gpt2, tmp_path):
    stream = activations(gpt2, DOCUMENTS, layer=[0, 1], tokens=5000, context_length=LENGTH)
    assert repr(stream) == f"Activations({gpt2!r} at transformer.h.0, transformer.h.1, 5,000 tokens of texts in memory)"
    (tmp_path / "book.txt").write_text("Some words.", "utf-8")
    stream = activations(gpt2, tmp_path / "book.txt", layer=1, context_length=LENGTH)
    assert repr(stream) == f"Activations({gpt2!r} at transformer.h.1, all tokens of {tmp_path / 'book.txt'})"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layer": 4}, r"has no layer 4: it has 4 layers, so pass one of 0 to 3"),
        ({"layer": -5}, r"has no layer -5: it has 4 layers"),
        ({"layer": True}, r"`layer` is True: pass a whole number or a list of whole numbers"),
        ({"layer": []}, r"No hook point is given"),
        ({}, r"Pass one of `layer` \(`--layer`\), a number, and `hook`"),
        ({"layer": 1, "hook": "transformer.h.1"}, r"Pass one of `layer` \(`--layer`\), a number, and `hook`"),
        (
            {"hook": "transformer.h.1.mpl"},
            r"no module `transformer.h.1.mpl`: name a layer \(0 to 3\).*`transformer.h.1.mlp`",
        ),
        ({"hook": "h.1.mpl"}, r"`transformer.h.1.mlp`"),
        ({"hook": ""}, r"no module ``: name a layer"),
        ({"hook": "blocks.9.hook_resid_post"}, r"has no layer 9"),
        ({"hook": "blocks.0.hook_resid_pre"}, r"`blocks.0.hook_resid_pre` is the input of the first block"),
        (
            {"hook": "transformer.h"},
            r"never calls `transformer.h`: choose another hook point, such as `transformer.h.0`",
        ),
        ({"layer": 1, "tokens": 0}, r"`tokens` is 0: pass a whole number, 1 or more"),
        ({"layer": 1, "batch_rows": 0}, r"`batch_rows` is 0: pass a whole number, 1 or more"),
        ({"layer": 1, "dtype": "int8"}, r"`dtype` is 'int8': pass 'auto', 'float32'"),
        ({"layer": 1, "context_length": 65}, r"`context_length` is 65, and `.*` has 64 positions"),
        ({"layer": 1, "tokenizer": "bert"}, r"Token id 3\d\d came.*has 300 token embeddings: pass the tokenizer"),
    ],
)
def test_bad_settings(settings, sentence, gpt2):
    if settings.get("tokenizer"):
        settings = settings | {"tokenizer": _larger_tokenizer()}
    with pytest.raises(InputError, match=sentence) as caught:
        list(activations(gpt2, DOCUMENTS, **{"context_length": LENGTH, **settings}))
    assert "\n" not in str(caught.value)


def _larger_tokenizer():
    words = tokenizer()
    words.add_tokens(["Ishmael"] + [f"unused{i}" for i in range(9)])
    return words


def test_hook_points_are_refused_before_weights_are_read(folders, tmp_path):
    folder = shutil.copytree(folders("llama"), tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\0")
    with pytest.raises(InputError, match="has no layer 4"):
        load_model(folder, hooks=[4])
    with pytest.raises(InputError, match="has no module `lm_head`"):
        load_model(folder, hooks=["lm_head"])
    with pytest.raises(InputError, match=r"The weights of `.*` are damaged"):
        load_model(folder, hooks=[1])


def test_text_that_is_missing_is_said_before_a_model_is_loaded(tmp_path):
    with pytest.raises(InputError, match=r"`data` is .*no such file or folder"):
        activations(str(tmp_path / "no model"), tmp_path / "no text.txt", layer=0)


def test_misspelt_settings_and_layers_that_are_text_are_said(gpt2):
    with pytest.raises(InputError, match="no setting `contxt_length`: perhaps `context_length` was meant"):
        activations(gpt2, ["text"], layer=1, contxt_length=64)
    with pytest.raises(InputError, match="no setting `layr`: perhaps `layer`"):
        activations(gpt2, ["text"], layr=1)
    with pytest.raises(InputError, match="`layer` is '1': pass a whole number or a list of whole numbers"):
        activations(gpt2, ["text"], layer="1")
    with pytest.raises(InputError, match=r"`tokens` is 2.5: pass a whole number, 1 or more"):
        activations(gpt2, ["text"], layer=1, tokens=2.5)


def test_bad_folders(gpt2, tmp_path):
    def refused(match, path=None, **settings):
        with pytest.raises(InputError, match=match) as caught:
            load_model(path or folder, hooks=[1], **settings)
        assert "\n" not in str(caught.value)

    folder = tmp_path / "nothing"
    refused("is not there: pass a folder that `save_pretrained` wrote")
    refused("is not there: pass a folder", "./some/model")
    folder.mkdir()
    refused("holds no config.json, so it is not a model")
    refused("is a file: pass a folder", f"{gpt2}/config.json")
    refused("is not there: pass a folder", "/" + "x" * 5000)
    shutil.copy(f"{gpt2}/config.json", folder)
    refused(r"holds no weights \(no \*.safetensors\)")
    torch.save({}, folder / "pytorch_model.bin")
    refused("weights as a pickle only, which could run any code and is not read: save the model as safetensors")
    shutil.copy(f"{gpt2}/model.safetensors", folder / "adapter.safetensors")
    refused("could not be loaded.*no file named model.safetensors", tokenizer=tokenizer())
    (folder / "adapter.safetensors").rename(folder / "model.safetensors")
    refused("has no tokenizer that can be loaded.*pass one with `tokenizer=`")
    assert load_model(folder, tokenizer(), hooks=[1]).hook_points == ("transformer.h.1",)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    refused("The weights of `.*` are damaged", tokenizer=tokenizer())
    (folder / "config.json").write_text("{")
    refused("could not be loaded", tokenizer=tokenizer())
    (folder / "config.json").write_text('{"model_type": "no_such_type"}')
    refused("could not be loaded.*no_such_type", tokenizer=tokenizer())


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_tokenizers_of_either_transformers(name, gpt2, tmp_path):
    """The class that transformers 5 writes is unknown to 4, and the other way round it has another name."""
    folder = shutil.copytree(gpt2, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
    assert same(read(folder, layer=0), read(gpt2, layer=0))


def test_weights_of_another_model(folders, tmp_path):
    folder = shutil.copytree(folders("gpt2"), tmp_path / "model")
    shutil.copy(f"{folders('llama')}/model.safetensors", folder)
    with pytest.raises(InputError, match=r"lacks \d+ of the weights that are read \(`h.0.attn.c_attn.bias` for one\)"):
        load_model(folder, hooks=[1])


def test_a_weight_that_is_not_read_may_be_missing(folders, tmp_path):
    """BERT's pooler is not in a masked language model's checkpoint, and comes after every block."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders("bert"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert same(read(folder, layer=1), read(folders("bert"), layer=1))
    with pytest.raises(InputError, match="lacks 1 of the weights"):
        kept.pop(next(name for name in kept if "layer.1.output.dense.weight" in name))
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        load_model(folder, hooks=[1])


def test_an_unknown_id_without_a_network():
    with pytest.raises(InputError, match="`no-such/model` is neither a local folder nor in the local cache") as caught:
        load_model("no-such/model", hooks=[1], local_files_only=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="The Hugging Face hub has no model `no such model`"):
        load_model("no such model", hooks=[1], local_files_only=True)


def test_code_of_the_models_own_is_not_run_unasked(gpt2, tmp_path):
    folder = shutil.copytree(gpt2, tmp_path / "model")
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own_type", "auto_map": auto}))
    (folder / "own.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(InputError, match=r"runs code of its own: read that code.*`trust_remote_code=True`"):
        load_model(folder, hooks=[1])


OWN_CODE = """
from transformers import GPT2Config, GPT2Model

class Config(GPT2Config):
    model_type = "own_type"

class Model(GPT2Model):
    config_class = Config
"""


def test_code_of_the_models_own_is_run_when_trusted(gpt2, tmp_path, monkeypatch):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = shutil.copytree(gpt2, tmp_path / "own_model")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own_type", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(OWN_CODE)
    stream = activations(folder, DOCUMENTS, layer=1, trust_remote_code=True, context_length=LENGTH, batch_rows=ROWS)
    assert same(joined(stream), read(gpt2, layer=1))
    assert len(stream.model.module.h) == 2


def test_bad_modules(gpt2):
    words = tokenizer()
    with pytest.raises(InputError, match="is a Linear: pass a Hugging Face `PreTrainedModel`"):
        load_model(torch.nn.Linear(2, 2), words, hooks=[1])
    with pytest.raises(InputError, match="does not know its tokenizer: pass `tokenizer=` too"):
        load_model(module("gpt2"), hooks=[1])
    with pytest.raises(InputError, match="is loaded already and used as it is: drop `dtype`"):
        load_model(module("gpt2"), words, hooks=[1], dtype="float16")
    with pytest.raises(InputError, match=r"lies above the part of `.*` that was loaded"):
        activations(load_model(gpt2, hooks=[1]), DOCUMENTS, layer=2)
    with pytest.raises(InputError, match=r"`2` is not read here: pass one of transformer.h.1\."):
        load_model(gpt2, hooks=[1]).provenance(2)
    with pytest.raises(InputError, match=r"`ids` has shape \(2, 3\) and `mask` \(3,\)"):
        load_model(gpt2, hooks=[1]).read(torch.zeros(2, 3, dtype=torch.int64), torch.ones(3))
    with pytest.raises(InputError, match=r"The output of `bert.pooler` is not one vector per token: choose another"):
        load_model(module("bert"), tokenizer("bert"), hooks=["pooler"])
    with pytest.raises(
        InputError,
        match=r"`blocks.1.hook_mlp_out` has no counterpart in `BertModel` \(bert\).*`bert.encoder.layer.0.attention`",
    ):
        load_model(module("bert"), tokenizer("bert"), hooks=["blocks.1.hook_mlp_out"])


def test_blocks_that_cannot_be_told():
    model = module("gpt2")
    model.transformer.more = torch.nn.ModuleList([torch.nn.Identity() for _ in range(LAYERS)])
    with pytest.raises(InputError, match="a GPT2Model has 2 lists of as many modules as its config has hidden layers"):
        load_model(model, tokenizer(), hooks=[1])
    # Lists inside the blocks are not meant: the experts of a model with as many experts as layers.
    model = module("gpt2")
    model.transformer.h[0].experts = torch.nn.ModuleList([torch.nn.Identity() for _ in range(LAYERS)])
    assert load_model(model, tokenizer(), hooks=[1]).hook_points == ("transformer.h.1",)


def test_the_next_group_is_read_while_the_last_is_judged(gpt2, monkeypatch):
    """In another thread, which is gone afterwards; the dictionary's stream is what was judged, not what was read."""
    stream = activations(gpt2, DOCUMENTS, layer=1, context_length=LENGTH, batch_rows=ROWS)
    threads, groups = [], []
    forward, rows = stream.model.read, stream._stream
    monkeypatch.setattr(
        stream.model, "read", lambda *args: threads.append(threading.current_thread()) or forward(*args)
    )
    whole = build(stream, k=3, threshold=0.1)
    assert {thread.name[:12] for thread in threads} == {"itda-reading"}
    assert not any(thread.is_alive() for thread in threads)
    assert whole.cfg["stream"]["hash"] == hash_rows(rows)
    for x, _ in stream:
        groups.append((len(x), stream.hash))
    assert len(groups) > 2
    first = build(stream, k=3, threshold=0.1, tokens=groups[0][0])
    assert first.cfg["stream"]["hash"] == groups[0][1] == hash_rows(list(rows)[:ROWS])


def test_an_error_in_reading_arrives_in_order(gpt2, monkeypatch):
    stream = activations(gpt2, DOCUMENTS, layer=1, context_length=LENGTH, batch_rows=ROWS)
    forward, calls, seen = stream.model.read, [], []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(*args)

    monkeypatch.setattr(stream.model, "read", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        build(stream, k=3, threshold=0.1, progress=lambda progress: seen.append(progress))
    assert len(seen) == 2
    assert not any(thread.name.startswith("itda-reading") for thread in threading.enumerate())
