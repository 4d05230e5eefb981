"""A model that is streamed block by block is read as a whole one is, to the last bit, and goes on where it stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import itda
from itda import locks
from itda.errors import InputError
from itda.models import hidden_states, loading, pretrained, streamed_model
from itda.models.hooked_model import Group
from itda.progress import Progress
from tests import tiny_models

FAMILIES = [*tiny_models.FAMILIES, "gpt_neo", "mixtral", "qwen3_moe"]
EXTRA = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
}
TEXTS = [f"{i}: " + text for i, text in enumerate(tiny_models.DOCUMENTS * 3)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small Llama, whole in one file, and in several."""
    folder = tmp_path_factory.mktemp("home")
    tiny_models.save("llama", folder / "llama")
    shutil.copytree(folder / "llama", folder / "shards")
    module = tiny_models.module("llama", len(tiny_models.tokenizer("llama")))
    (folder / "shards" / "model.safetensors").unlink()
    module.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 4
    return folder


def groups(n=3, length=12):
    ids = torch.randint(3, 100, (n, 4, length))
    mask = torch.ones_like(ids)
    mask[:, 1, length // 2 :] = 0
    return [Group(i, ids[i], mask[i]) for i in range(n)]


def equal(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) > 0 and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def both(folder, at, **settings):
    whole = loading.load_model(folder, hooks=at, stream_layers=False)
    streamed = loading.load_model(folder, hooks=at, stream_layers=True, **settings)
    assert isinstance(streamed, streamed_model.StreamedModel) and not isinstance(whole, streamed_model.StreamedModel)
    return whole, streamed


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_it_is_whole(family, tmp_path):
    tiny_models.save(family, tmp_path, **EXTRA.get(family, {}))
    skeleton = loading.load_model(tmp_path, hooks=0)
    ends = (".1.mlp", ".1.fc2", ".1.attention.output")
    inside = next(path for path in sorted(skeleton._layout.paths) if path.endswith(ends))
    for at in ([2], [0, inside, 3]):
        whole, streamed = both(tmp_path, at)
        asked = groups()
        assert streamed.provenance(streamed.hook_points[0])["fingerprint"] is None  # nothing was read yet
        assert equal(whole.read_all(asked), streamed.read_all(asked))
        assert whole.d == streamed.d and whole.hook_points == streamed.hook_points
        assert [whole.provenance(h) for h in whole.hook_points] == [streamed.provenance(h) for h in whole.hook_points]


def test_activations_do_not_depend_on_where_weights_lie_in_their_file(home, tmp_path):
    shutil.copytree(home / "llama", tmp_path / "model")
    weights = load_file(home / "llama" / "model.safetensors")
    asked = groups()
    whole = list(loading.load_model(home / "llama", hooks=3).read_all(asked))
    for shift in range(1, 5):
        save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt", "a": "b" * 8 * shift})
        model = loading.load_model(tmp_path / "model", hooks=3, stream_layers=False)
        assert all(p.data_ptr() % 64 == 0 for p in model._base.parameters())
        assert equal(whole, model.read_all(asked))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_it_is", [True, False])
def test_half_precision(dtype, as_it_is, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "has_bfloat16", lambda: False)
    tiny_models.save("llama", tmp_path, dtype=dtype)
    settings = {"dtype": dtype} if as_it_is else {}
    whole = loading.load_model(tmp_path, hooks=2, **settings)
    streamed = loading.load_model(tmp_path, hooks=2, stream_layers=True, **settings)
    assert streamed.dtype == (dtype if as_it_is else torch.float32)
    asked = groups()
    assert equal(whole.read_all(asked), streamed.read_all(asked))


@pytest.mark.parametrize("where", ["llama", "shards"])
def test_no_more_is_read_than_is_needed(where, home, monkeypatch):
    folder = home / where
    names = {}
    for path in folder.glob("*.safetensors"):
        names |= load_file(path)
    streamed = loading.load_model(folder, hooks=1, stream_layers=True)
    list(streamed.read_all(groups()))
    needed = sum(x.nbytes for name, x in names.items() if "layers.0." in name or "layers.1." in name)
    assert streamed.bytes_read == needed + names["model.embed_tokens.weight"].nbytes


def test_files_without_a_needed_weight_are_not_fetched(home, monkeypatch):
    fetched = set()
    fetch = streamed_model.Survey.fetch
    monkeypatch.setattr(streamed_model.Survey, "fetch", lambda self, file: (fetched.add(file), fetch(self, file))[1])
    streamed = loading.load_model(home / "shards", hooks=1, stream_layers=True)
    list(streamed.read_all(groups()))
    index = json.loads((home / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file for name, file in index.items() if "layers.0." in name or "layers.1." in name or "embed" in name}
    assert fetched - {"model.safetensors", "model.safetensors.index.json"} == files < set(index.values())


def test_one_block_at_a_time(home, monkeypatch):
    streamed, seen = loading.load_model(home / "llama", hooks=3, stream_layers=True), []
    run = streamed_model.StreamedModel._run

    def watch(self, *args, **kwargs):
        blocks = self._base.get_submodule("layers")
        seen.append([i for i, block in enumerate(blocks) if not next(block.parameters()).is_meta])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(streamed_model.StreamedModel, "_run", watch)
    list(streamed.read_all(groups()))
    assert seen == [[0]] * 3 + [[1]] * 3 + [[2]] * 3 + [[3]] * 3
    assert all(p.is_meta for p in streamed._base.get_submodule("layers").parameters())


def test_rows_in_lots(home, tmp_path):
    whole, streamed = both(home / "llama", [0, 2], state_gb=30e-6, state_dir=tmp_path / "states")
    lots, before = [], streamed_model.StreamedModel._read_lot
    streamed._read_lot = lambda number, lot, kept: (lots.append(len(lot)), before(streamed, number, lot, kept))[1]
    asked = groups(5)
    assert equal(whole.read_all(asked), streamed.read_all(asked))
    assert len(lots) > 1 and sum(lots) == 5
    assert max(path.stat().st_size for path in (tmp_path / "states").glob("*.bin")) <= 10e3


def test_lots_fit_though_later_rows_are_longer(home, tmp_path, monkeypatch):
    lengths = (2, 30, 30, 1, 1, 40, 3)
    asked = [Group(i, torch.full((4, n), 7), torch.ones(4, n)) for i, n in enumerate(lengths)]
    whole, streamed = both(home / "llama", [0, 2], state_gb=50e-6, state_dir=tmp_path / "states")
    lots, begin = [], hidden_states.States.begin
    monkeypatch.setattr(
        hidden_states.States, "begin", lambda own, lot: (lots.append([len(g.ids[0]) for g in lot]), begin(own, lot))
    )
    assert equal(whole.read_all(asked), streamed.read_all(asked))
    assert lots == [[2, 30], [30, 1, 1], [40], [3]]  # 384 bytes a token


@pytest.mark.parametrize("stops", [1, 4, 5, 6, 11, 12])
def test_a_reading_that_is_stopped_goes_on(stops, home, tmp_path):
    whole, first = both(home / "llama", [0, 3], state_dir=tmp_path / "states")
    asked, count = groups(), iter(range(100))
    first.stop = lambda: next(count) == stops - 1
    with pytest.raises(KeyboardInterrupt):
        list(first.read_all(asked))
        raise KeyboardInterrupt  # no stop is asked for in the last block
    second = loading.load_model(home / "llama", hooks=[0, 3], stream_layers=True, state_dir=tmp_path / "states")
    ran, run = [], second._run
    second._run = lambda number, *args, **kwargs: (ran.append(number), run(number, *args, **kwargs))[1]
    assert equal(whole.read_all(asked), second.read_all(asked))
    assert min(ran) == (stops - 1) // 3 if stops < 10 else 3
    assert second.provenance(3) == whole.provenance(3)


def test_states_of_other_rows_or_weights_are_not_used(home, tmp_path):
    shutil.copytree(home / "llama", tmp_path / "model")
    kept = {"stream_layers": True, "state_dir": tmp_path / "states"}
    list(loading.load_model(tmp_path / "model", hooks=2, **kept).read_all(groups()))
    asked = groups()  # others
    whole = loading.load_model(tmp_path / "model", hooks=2)
    assert equal(whole.read_all(asked), loading.load_model(tmp_path / "model", hooks=2, **kept).read_all(asked))
    tiny_models.save("llama", tmp_path / "model", seed=1)
    other = loading.load_model(tmp_path / "model", hooks=2)
    streamed = loading.load_model(tmp_path / "model", hooks=2, **kept)
    assert equal(other.read_all(asked), streamed.read_all(asked)) and not equal(
        whole.read_all(asked), other.read_all(asked)
    )
    (tmp_path / "states" / "states.json").write_text("{")
    assert equal(other.read_all(asked), loading.load_model(tmp_path / "model", hooks=2, **kept).read_all(asked))
    hidden_states.remove(tmp_path / "states")
    assert not (tmp_path / "states").exists()


def forged(place, **changes):
    path = place / "states.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FORMS = {"hidden-1": [32, "float32"], "kept-0": [32, "float32"], "hidden-0": [32, "float32"]}
FORGERIES = {
    "missing": lambda p: (p / "hidden-1.bin").unlink(),
    "a kept one missing": lambda p: (p / "kept-0.bin").unlink(),
    "short": lambda p: os.truncate(p / "hidden-1.bin", 100),
    "a kept one short": lambda p: os.truncate(p / "kept-0.bin", 100),
    "empty": lambda p: os.truncate(p / "hidden-1.bin", 0),
    "long": lambda p: (p / "hidden-1.bin").write_bytes((p / "hidden-1.bin").read_bytes() + b"\0"),
    "a folder": lambda p: ((p / "hidden-1.bin").unlink(), (p / "hidden-1.bin").mkdir()),
    "a link": lambda p: (shutil.move(p / "hidden-1.bin", p / "x"), (p / "hidden-1.bin").symlink_to(p / "x")),
    "narrow": lambda p: forged(p, forms=FORMS | {"hidden-1": [16, "float32"]}),
    "a kept one narrow": lambda p: forged(p, forms=FORMS | {"kept-0": [8, "float32"]}),
    "half": lambda p: forged(p, forms=FORMS | {"hidden-1": [32, "bfloat16"]}),
    "a kept one in half": lambda p: forged(p, forms=FORMS | {"kept-0": [64, "float16"]}),
    "whole numbers": lambda p: forged(p, forms=FORMS | {"kept-0": [32, "int32"]}),
    "not named": lambda p: forged(p, forms={"hidden-0": [32, "float32"]}),
    "another block": lambda p: forged(p, block=0, forms={"hidden-1": [32, "float32"]}),
    "the last block": lambda p: forged(p, block=3),
    "past the last": lambda p: forged(p, block=7),
    "a tuple of words": lambda p: forged(p, notes={"tuple": "x", "samples": {}}),
    "a tuple of many": lambda p: forged(p, notes={"tuple": 10**9, "samples": {}}),
    "no samples": lambda p: forged(p, notes={"tuple": None, "samples": {}}),
    "groups twice": lambda p: forged(p, groups=json.loads((p / "states.json").read_text())["groups"] * 2),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_states_that_are_not_what_the_manifest_says(forgery, home, tmp_path):
    """They are made again, or refused in a sentence; never is anything else read from them."""
    place, asked = tmp_path / "states", groups()
    reading = loading.load_model(home / "llama", hooks=[0, 3], stream_layers=True, state_dir=place)
    reading.stop = lambda: json.loads((place / "states.json").read_text())["block"] == 1 if (
        place / "states.json").exists() else False  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        list(reading.read_all(asked))
    FORGERIES[forgery](place)
    again = loading.load_model(home / "llama", hooks=[0, 3], stream_layers=True, state_dir=place)
    whole = loading.load_model(home / "llama", hooks=[0, 3], stream_layers=False)
    if forgery == "a folder":
        with pytest.raises(InputError, match=r"states could not be written .*: give a smaller"):
            list(again.read_all(asked))
        return
    assert equal(whole.read_all(asked), again.read_all(asked))
    assert [again.provenance(h) for h in again.hook_points] == [whole.provenance(h) for h in whole.hook_points]


@pytest.mark.parametrize("what", ["embedding", "attention"])
def test_states_are_of_all_that_they_are_made_from(what, home, tmp_path):
    """The embedding too, which may lie in a file without blocks, and what the model is loaded with."""
    model, kept = shutil.copytree(home / "shards", tmp_path / "model"), {"state_dir": tmp_path / "states"}
    first = loading.load_model(model, hooks=3, stream_layers=True, attn_implementation="eager", **kept)
    asked, count = groups(), iter(range(100))
    first.stop = lambda: next(count) == 4
    with pytest.raises(KeyboardInterrupt):
        list(first.read_all(asked))
    if what == "embedding":
        index = json.loads((model / "model.safetensors.index.json").read_bytes())["weight_map"]
        file, name = model / index["model.embed_tokens.weight"], "model.embed_tokens.weight"
        save_file(load_file(file) | {name: load_file(file)[name] + 1}, file, metadata={"format": "pt"})
    how = {"attn_implementation": "eager" if what == "embedding" else "sdpa"}
    whole = loading.load_model(model, hooks=3, stream_layers=False, **how)
    second = loading.load_model(model, hooks=3, stream_layers=True, **how, **kept)
    assert equal(whole.read_all(asked), second.read_all(asked))
    assert second.provenance(3) == whole.provenance(3)


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


SETTINGS = {"k": 4, "threshold": 0.2, "context_length": 16, "batch_rows": 4, "center": False}


def test_dictionaries_are_the_same(home, tmp_path):
    for layer in (2, [0, 3]):
        for name, how in (("whole", False), ("streamed", True)):
            itda.train(str(home / "llama"), TEXTS, tmp_path / name, layer=layer, stream_layers=how, **SETTINGS)
        for path in (tmp_path / "whole").rglob("cfg.json"):
            other = tmp_path / "streamed" / path.parent.relative_to(tmp_path / "whole")
            assert folder_bytes(path.parent) == folder_bytes(other)
        shutil.rmtree(tmp_path / "whole")
        shutil.rmtree(tmp_path / "streamed")


def test_a_model_that_does_not_fit_is_streamed(home, monkeypatch):
    need = 4 * sum(p.numel() for p in loading.load_model(home / "llama", hooks=1)._base.parameters())
    for free, streamed in ((need / 0.9 * 1.2, False), (need / 0.9 * 0.8, True)):
        monkeypatch.setattr(loading, "free_bytes", lambda device, free=free: free)
        found = loading.load_model(home / "llama", hooks=1)
        assert isinstance(found, streamed_model.StreamedModel) == streamed
        assert not isinstance(
            loading.load_model(home / "llama", hooks=1, stream_layers=False), streamed_model.StreamedModel
        )


def test_a_language_model_that_does_not_fit_is_streamed_without_its_head(home, monkeypatch):
    assert loading.language_model(home / "llama", hooks=1).predicts
    monkeypatch.setattr(loading, "free_bytes", lambda device: 1000)
    found = loading.language_model(home / "llama", hooks=1)
    assert isinstance(found, streamed_model.StreamedModel) and not found.predicts


CODE = """
import sys, time, itda
from itda.models import streamed_model as streaming
say = streaming.StreamedModel._say
def slow(self, *args):
    print(*args[:2], flush=True)
    time.sleep(0.05)
    return say(self, *args)
streaming.StreamedModel._say = slow
itda.train(sys.argv[1], eval(sys.argv[3]), sys.argv[2], layer=3, stream_layers=True, **{settings})
"""


@pytest.mark.parametrize("lines", [1, 30])
def test_killed_and_run_again(lines, home, tmp_path, monkeypatch):
    out, code = tmp_path / "out", CODE.replace("{settings}", repr(SETTINGS))
    words = [sys.executable, "-c", code, str(home / "llama"), str(out), repr(TEXTS)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    said = [process.stdout.readline() for _ in range(lines)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    block = int(said[-1].split()[1])
    assert (out / "states").is_dir() and not (out / "cfg.json").exists() and block == 1 + (lines > 1)
    ran, say = [], streamed_model.StreamedModel._say
    monkeypatch.setattr(
        streamed_model.StreamedModel, "_say", lambda self, what, *args: (ran.append(what), say(self, what, *args))
    )
    itda.train(str(home / "llama"), TEXTS, out, layer=3, stream_layers=True, **SETTINGS)
    assert int(ran[0].split()[1]) in (block, block + 1)  # the block that was running, or the one after it
    monkeypatch.undo()
    itda.train(str(home / "llama"), TEXTS, tmp_path / "whole", layer=3, stream_layers=False, **SETTINGS)
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


def test_weights_that_change_between_two_runs(home, tmp_path):
    shutil.copytree(home / "llama", tmp_path / "model")
    out, judged = tmp_path / "out", []
    settings = {"layer": 1, "stream_layers": True, "stop": lambda: bool(judged)} | SETTINGS
    with pytest.raises(KeyboardInterrupt):
        itda.train(
            str(tmp_path / "model"),
            TEXTS,
            out,
            progress=lambda done: judged.append(done) if isinstance(done, Progress) else None,
            **settings,
        )
    assert (out / "checkpoint.safetensors").exists()
    tiny_models.save("llama", tmp_path / "model", seed=1)
    with pytest.raises(InputError, match="weights of the model have changed"):
        itda.train(str(tmp_path / "model"), TEXTS, out, layer=1, stream_layers=True, **SETTINGS)


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(match, folder, at=1, **settings):
    with pytest.raises(InputError, match=match) as caught:
        list(loading.load_model(folder, hooks=at, stream_layers=True, **settings).read_all(groups()))
    assert "\n" not in str(caught.value)


def test_one_process_at_a_time(home, tmp_path):
    """The states of one folder are of one reading, also where two train different layers into folders of it."""
    one = {"layer": [1], "stream_layers": True} | SETTINGS
    first = loading.load_model(home / "llama", hooks=3, stream_layers=True, state_dir=tmp_path / "out" / "states")
    reading = first.read_all(groups())
    next(reading)
    there = folder_bytes(tmp_path / "out" / "states")
    with pytest.raises(InputError, match=r"Another process is keeping hidden states in .*states: wait for it to end"):
        itda.train(str(home / "llama"), TEXTS, tmp_path / "out", **one)
    assert folder_bytes(tmp_path / "out" / "states") == there
    with (
        locks.locked(tmp_path / "out" / "model.layers.1", "training into"),
        pytest.raises(InputError, match="training"),
    ):
        itda.train(str(home / "llama"), TEXTS, tmp_path / "out", **one)
    reading.close()
    assert len(itda.train(str(home / "llama"), TEXTS, tmp_path / "out", **one)) == 1


def test_refusals(home, tmp_path):
    llama = home / "llama"
    refused("in no block", llama, "model.embed_tokens")
    refused("`state_gb` is 0.0: pass a number of gigabytes above 0", llama, state_gb=0.0)
    refused("`device_map` says where weights are kept: drop it, or pass `stream_layers=False`", llama, device_map="cpu")
    refused("no layer 9", llama, 9)
    loaded = loading.load_model(llama, hooks=1)
    with pytest.raises(InputError, match="loaded already"):
        loading.load_model(loaded, hooks=1, stream_layers=True)
    with pytest.raises(InputError, match="one process"):
        itda.train(str(llama), TEXTS, tmp_path / "x", layer=1, stream_layers=True, workers=2)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {"model.layers.0.x": "../llama/model.safetensors"}}, "no file of its own folder"),
        ({"weight_map": {"model.layers.0.x": "/etc/model.safetensors"}}, "no file of its own folder"),
        ({"weight_map": {"model.layers.0.x": "..\\model.safetensors"}}, "no file of its own folder"),
        ({"weight_map": {"model.layers.0.x": 3}}, "no file of its own folder"),
        ({"weight_map": {"model.layers.0.x": "model.bin"}}, "no file of its own folder"),
        ({"weight_map": []}, "cannot be read"),
        ({}, "cannot be read"),
        ([], "cannot be read"),
        ({"weight_map": {"model.layers.0.x": "model-00009-of-00009.safetensors"}}, "lacks|belong together"),
        ({"weight_map": {f"model.layers.{'9' * 5000}.x": "model.safetensors"}}, "which belong to which block"),
    ],
)
def test_a_hostile_index(index, match, home, tmp_path):
    shutil.copytree(home / "shards", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(match, tmp_path / "model")


def test_damaged_weights(home, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(home / "llama", model)
    whole = load_file(model / "model.safetensors")
    for change, match in (
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "lacks 1 of the weights"),
        (lambda w: [w.pop(name) for name in list(w) if "layers.1." in name], "no weights for block 1"),
        (lambda w: w.pop("model.embed_tokens.weight"), "lacks 1 of the weights"),
        (lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}), "could not be loaded"),
        (lambda w: w.update({f"other.{name}": w[name].clone() for name in list(w)}), "which belong to which block"),
    ):
        weights = dict(whole)
        change(weights)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        refused(match, model)
    data = (home / "llama" / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused("damaged", model)
    (model / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + data[8:])
    refused("damaged", model)


def test_weights_whose_file_is_missing(home, tmp_path):
    model = shutil.copytree(home / "shards", tmp_path / "model")
    index = json.loads((model / "model.safetensors.index.json").read_bytes())["weight_map"]
    (model / index["model.layers.1.mlp.up_proj.weight"]).unlink()
    refused(r"lacks model-.*\.safetensors, which model\.safetensors\.index\.json names", model)


def test_a_config_with_more_than_memory_holds(home, tmp_path):
    model = shutil.copytree(home / "llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 10**13}))
    refused(r"asks for a weight of shape \(10000000000000, 32\)", model)


def test_what_is_not_finite_is_read_as_it_is_whole(home, tmp_path):
    model = shutil.copytree(home / "llama", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    whole, streamed = both(model, [2], state_gb=float("inf"))
    for a, b in zip(whole.read_all(groups(1)), streamed.read_all(groups(1)), strict=True):
        a, b = a["model.layers.2"], b["model.layers.2"]
        assert a.isnan().any() and a.shape == b.shape and torch.equal(a.isnan(), b.isnan())


def test_a_disk_that_is_full(home, tmp_path, monkeypatch):
    streamed = loading.load_model(home / "llama", hooks=2, stream_layers=True, state_dir=tmp_path / "states")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="the disk is full: free some space or give a smaller --state-gb"):
        list(streamed.read_all(groups()))


def test_a_block_whose_next_one_sees_something_else_is_refused(home):
    streamed = loading.load_model(home / "llama", hooks=2, stream_layers=True)
    after = streamed._base.get_submodule("layers")[1]
    after.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    with pytest.raises(InputError, match="changes its states between its blocks"):
        list(streamed.read_all(groups()))


def test_reading_again_and_at_other_places(home):
    whole, streamed = both(home / "llama", [2])
    asked = groups()
    assert equal(streamed.read_all(asked), streamed.read_all(asked))
    other = loading.load_model(streamed, hooks=1)
    assert equal(loading.load_model(home / "llama", hooks=1).read_all(asked), other.read_all(asked))
    one = streamed.read(asked[0].ids, asked[0].mask)
    assert torch.equal(one["model.layers.2"], whole.read(asked[0].ids, asked[0].mask)["model.layers.2"])


def test_stopped_again_while_it_recovers(home, tmp_path):
    """At every group of every block of a reading that goes on from states; each time it goes on from no less."""
    asked = groups()
    whole = list(loading.load_model(home / "llama", hooks=[0, 3], stream_layers=False).read_all(asked))

    def read(place, after):
        reading = loading.load_model(home / "llama", hooks=[0, 3], stream_layers=True, state_dir=place)
        count = iter(range(1, 1000))
        reading.stop = lambda: next(count) == after
        try:
            return list(reading.read_all(asked))
        except KeyboardInterrupt:
            return None

    def block(place):
        return json.loads((place / "states.json").read_text())["block"] or 0

    for first, second in ((2, 1), (4, 1), (4, 2), (5, 3), (8, 1), (8, 2)):
        place = tmp_path / f"{first}-{second}"
        assert read(place, first) is None
        before = block(place)
        found = read(place, second)
        assert found is not None or block(place) >= before
        assert equal(whole, found or read(place, 0))


def test_files_that_are_only_called_as_states_are_stay(home, tmp_path):
    (tmp_path / "hidden-0.bin").write_text("mine")
    reading = loading.load_model(home / "llama", hooks=2, stream_layers=True, state_dir=tmp_path)
    with pytest.raises(InputError, match=r"and no states\.json that says that they are: move them away"):
        list(reading.read_all(groups()))
    hidden_states.remove(tmp_path)
    assert (tmp_path / "hidden-0.bin").read_text() == "mine"
