"""Activations on disk: what was read is what is there, whatever ends a collecting, and no damage goes unseen."""

import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import itda
from itda import Batch, InputError, Labels, Store, disk, locks
from itda.cli.main import main
from itda.models import hooked_model, loading
from itda.reading import shards, store
from itda.similarity import jaccard
from itda.text.prompts import TokenStream
from itda.training import train
from tests import tiny_models
from tests.faulty_disk import Killed, Machine

collecting = import_module("itda.reading.collect")
TEXTS = [*tiny_models.DOCUMENTS, "  ", "Ahab 🐋 é\u0301 " * 9] * 2
CUT = dict(context_length=16, batch_rows=4)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(collecting, "SHARD_BYTES", 30_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="module")
def model(folder):
    return loading.load_model(folder, hooks=-1)


def collect(model, out, texts=TEXTS, **how):
    return itda.collect(model, texts, out, **{"layer": [1, 3], **CUT, **how})


def direct(model, texts=TEXTS, **how):
    return itda.activations(model, texts, **{"layer": [1, 3], **CUT, **how})


def same_batches(a, b):
    """The same bits, labels and texts in the same batches."""
    for one, two in itertools.zip_longest(a, b):
        assert list(one) == list(two)
        for x, y in ((one[hook], two[hook]) for hook in one):
            assert x.activations.dtype == y.activations.dtype
            assert torch.equal(x.activations, y.activations)
            same_labels(x.labels[:], y.labels[:])
    assert a.hash == b.hash and a.provenance == b.provenance


def test_what_no_dictionary_can_take_is_not_kept(folder, tmp_path):
    spoiled = loading.load_model(folder, hooks=-1)
    token = spoiled.tokenizer("Ahab")["input_ids"][0]
    text = [tiny_models.DOCUMENTS[0], "Ahab"]
    spoiled._base.get_input_embeddings().weight.data[token] = torch.inf
    with pytest.raises(InputError, match=r"activation at prompt \d+, position \d+ is not finite"):
        itda.collect(spoiled, text, tmp_path / "acts", layer=1, **CUT)
    with pytest.raises(InputError, match="has not finished"):
        Store(tmp_path / "acts")


def same_labels(a, b):
    for name in (*store.shards.LABEL_ARRAYS, "text_start"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
        assert getattr(a, name).dtype == getattr(b, name).dtype == np.int64
    assert a.texts == b.texts


def contents(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


# -- round trips ------------------------------------------------------------------------------------------------------

KINDS = [("gpt2", {}, {}), ("llama", {}, {"dtype": torch.bfloat16}), ("qwen3", {}, {"dtype": torch.float16}),
         ("bert", {"special_tokens": True}, {}), ("gpt_neox", {"padding": True}, {})]  # fmt: skip


@pytest.mark.parametrize(("family", "how", "saved"), KINDS, ids=[kind[0] for kind in KINDS])
def test_what_was_read_is_what_is_there(tmp_path, family, how, saved):
    path = tiny_models.save(family, tmp_path / "model", **saved)
    read = {**how, "dtype": str(saved.get("dtype", "auto")).removeprefix("torch.")}
    result = collect(path, tmp_path / "acts", **read)
    there, stream = Store(tmp_path / "acts"), direct(path, **read)
    same_batches(stream, there)
    assert there.hook_points == stream.hook_points and result.hash == stream.hash
    assert result.tokens == there.tokens == stream.count_tokens() == there.count_tokens()
    assert result.shards > 2 and result.bytes == sum(x.activations.nbytes for item in there for x in item.values())
    for how in ({"layer": 1}, {"hook": there.hook_points[1]}):
        one = itda.activations(path, tmp_path / "acts", **how)
        batches = list(zip(direct(path, **read, **{"layer": None, **how}), one, strict=True))
        assert all(torch.equal(a.activations, b.activations) for a, b in batches)


def test_parts_of_it(model, tmp_path):
    collect(model, tmp_path)
    every = Labels.concat([item["transformer.h.1"].labels for item in Store(tmp_path)])
    for tokens, skipped in [(1, 0), (100, 0), (250, 100), (10_000, 0), (250, 250), (10_000, len(every)), (None, 37)]:
        stream, there = direct(model, tokens=tokens), Store(tmp_path, tokens=tokens)
        same_batches(stream.skip(skipped), there.skip(skipped))
        assert there.skip(skipped).tokens == stream.skip(skipped).count_tokens()
        assert there.skip(skipped).count_tokens(7) == min(7, there.skip(skipped).tokens)
        rest = stream.skip(skipped)
        list(rest)
        assert not skipped or rest.skipped_hash == there.skip(skipped).skipped_hash
    with pytest.raises(
        InputError, match=r"tokens cannot be skipped, because .*: pass the activations that were read before"
    ):
        list(Store(tmp_path).skip(len(every) + 1))


def test_hook_points_by_every_name(model, tmp_path):
    names = ["transformer.h.1.mlp", "transformer.h.1", "transformer.h.3"]
    collect(model, tmp_path, layer=None, hook=names)
    order = Store(tmp_path).hook_points
    for how, want in [
        (dict(layer=1), "transformer.h.1"),
        (dict(layer=-1), "transformer.h.3"),
        (dict(hook="transformer.h.1.mlp"), "transformer.h.1.mlp"),
        (dict(hook="h.1.mlp"), "transformer.h.1.mlp"),
        (dict(hook="blocks.1.hook_resid_post"), "transformer.h.1"),
        (dict(hook="blocks.2.hook_resid_pre"), "transformer.h.1"),
    ]:
        chosen = Store(tmp_path, **how)
        assert chosen.single and chosen.hook_points == (want,)
        assert isinstance(next(iter(chosen)), Batch)
    assert Store(tmp_path, layer=[3, 1]).hook_points == tuple(n for n in order if not n.endswith("mlp"))
    for how in (dict(layer=2), dict(layer=-2), dict(layer=-9), dict(hook="mlp.x"), dict(layer=[])):
        with pytest.raises(InputError, match="choose of those"):
            Store(tmp_path, **how)
    with pytest.raises(InputError, match="`layer` is True: pass a whole number or a list of whole numbers"):
        Store(tmp_path, layer=True)


def test_labels_without_text_and_odd_texts(tmp_path):
    texts = ("", "a\r\n\0b", "🐋" * 500)
    row = np.array([0, -1, 2, 1, 1])
    columns = [np.arange(5) * 2**40, np.arange(5), *np.arange(15).reshape(3, 5) - 1, np.arange(5) + 9]
    labels = Labels(*columns, row, texts, np.array([0, 5, 2**40]))
    x = torch.randn(5, 3, dtype=torch.float64)
    places = {"h": (torch.float64, 3)}
    shard = shards.write(tmp_path, 7, [({"h": Batch(x, labels)}, "0" * 64)], places, "advice")
    found, back = shards.read(tmp_path, 7, shard, places, ["h"])
    assert torch.equal(found["h"], x)
    same_labels(back, labels)
    # Any reader of both formats finds the same.
    import safetensors.torch
    from pyarrow import parquet

    assert torch.equal(safetensors.torch.load_file(tmp_path / "shard-00007.safetensors")["h"], x)
    assert parquet.read_table(tmp_path / "shard-00007.parquet")["text"].to_pylist() == [
        texts[0],
        None,
        texts[2],
        texts[1],
        None,
    ]


# -- dictionaries from it ---------------------------------------------------------------------------------------------

BUILDS = [{"n_atoms": 60, "center": True, "tokens": 433}, {"admission": "batch", "threshold": 0.3},
          {"loss": "cosine", "admission": "paper", "threshold": 0.02}]  # fmt: skip


@pytest.mark.parametrize("how", BUILDS, ids=str)
def test_the_dictionary_is_the_same_to_the_byte(folder, tmp_path, how):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": one}) for one in TEXTS), "utf-8")
    for tokens in (31, 91, 331, 10_000):  # in parts, which end inside of batches
        itda.collect(folder, text, tmp_path / "acts", layer=[1, 3], tokens=tokens, **CUT)
    read = dict(layer=[1, 3], k=4, **how)
    itda.train(folder, text, tmp_path / "direct", **CUT, **read)
    itda.train(folder, tmp_path / "acts", tmp_path / "stored", **read)
    for name in ("transformer.h.1", "transformer.h.3"):
        assert contents(tmp_path / "stored" / name) == contents(tmp_path / "direct" / name)
    itda.train(None, tmp_path / "acts", tmp_path / "one", **{**read, "layer": 3})
    assert contents(tmp_path / "one") == contents(tmp_path / "direct" / "transformer.h.3")


def test_a_training_goes_on_from_either(model, tmp_path):
    collect(model, tmp_path / "acts")
    want = itda.build(Store(tmp_path / "acts", layer=1), k=4)
    for first, then in itertools.product([Store(tmp_path / "acts", layer=1), direct(model, layer=1)], repeat=2):
        out, asked = tmp_path / "out", iter(range(99))
        with pytest.raises(KeyboardInterrupt):
            itda.build(first, k=4, checkpoint=out, stop=lambda asked=asked: next(asked) == 3)
        found = itda.build(then, k=4, checkpoint=out)
        assert torch.equal(found.atoms, want.atoms) and jaccard(found, want) == 1 and found.cfg == want.cfg
        shutil.rmtree(out)


def test_all_hook_points_are_trained_unless_some_are_chosen(model, tmp_path):
    collect(model, tmp_path / "acts")
    with suppress(train.Interrupted):
        itda.train(None, tmp_path / "acts", tmp_path / "out", k=4, checkpoint_seconds=0.0, stop=lambda: True)
    assert len(itda.train(None, tmp_path / "acts", tmp_path / "out", k=4)) == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["transformer.h.1", "transformer.h.3"]
    collect(model, tmp_path / "single", layer=2)
    (trained,) = itda.train(None, tmp_path / "single", tmp_path / "d", k=4)
    assert trained.hook_point == "transformer.h.2"


def test_another_model_or_other_settings_are_refused(folder, model, tmp_path):
    collect(folder, tmp_path / "acts", seed=3)
    for name in (folder, str(folder), os.path.relpath(folder), model, None):
        itda.activations(name, tmp_path / "acts")
    itda.activations(folder, tmp_path / "acts", context_length=16, batch_rows=4, seed=3, dtype=torch.float32)
    with pytest.raises(InputError, match=r"holds activations of '.*gpt2', and 'gpt2' was named"):
        itda.activations("gpt2", tmp_path / "acts")
    for how in ({"context_length": 64}, {"batch_rows": 8}, {"seed": 1}, {"padding": True}, {"dtype": "bfloat16"}):
        with pytest.raises(InputError, match=f"was collected with `{next(iter(how))}` = .* leave it out"):
            itda.activations(folder, tmp_path / "acts", **how)
    with pytest.raises(InputError, match="`model` is None"):
        itda.activations(None, TEXTS, layer=1)


# -- kills, full disks, appending -------------------------------------------------------------------------------------


def usable(out):
    """How many tokens a reader finds, all of them checked; None if it is told that there is no store yet."""
    try:
        return sum(len(item["transformer.h.1"].labels) for item in Store(out, layer=[1]))
    except InputError as error:
        if not re.search(r"has not finished|has no activations\.json", str(error)):
            raise


def tried(i, work, error=None):
    """Whether a disk that fails at step `i` failed before the work was done."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, i, error)
        with suppress(Killed):
            work()
    return machine.failed


@pytest.fixture
def few(model, monkeypatch):
    """A function that collects what takes two shards or three, and few steps."""
    monkeypatch.setattr(collecting, "SHARD_BYTES", 7_000)
    texts = {name: TokenStream(TEXTS[part], model.tokenizer, context_length=16)
             for name, part in (("", slice(2)), ("other", slice(5, 7)))}  # fmt: skip

    def few(out, text="", **how):
        return itda.collect(model, texts[text], out, layer=1, batch_rows=4, **how)

    return few


def test_killed_at_any_step(few, tmp_path):
    total = few(tmp_path / "whole").tokens
    want = contents(tmp_path / "whole")
    assert len(want) in (5, 7)
    for i in itertools.count():
        out = tmp_path / str(i)
        failed = tried(i, lambda out=out: few(out))
        assert usable(out) == (None if failed and not (out / "activations.json").exists() else total)
        few(out)
        assert contents(out) == want
        if not failed:
            break
    assert i > 20


def test_killed_at_any_step_of_adding(few, tmp_path):
    few(tmp_path / "old", tokens=50)
    shutil.copytree(tmp_path / "old", tmp_path / "whole")
    total = few(tmp_path / "whole").tokens
    few(tmp_path / "at once")
    same_batches(Store(tmp_path / "at once", layer=[1]), Store(tmp_path / "whole", layer=[1]))
    for i in itertools.count(0, 3):
        out = shutil.copytree(tmp_path / "old", tmp_path / str(i))
        failed = tried(i, lambda out=out: few(out))
        assert usable(out) in ((50, total) if failed else (total,))  # what was there is there
        few(out)
        assert contents(out) == contents(tmp_path / "whole")
        if not failed:
            break
    assert i > 20


def test_killed_while_replacing(few, tmp_path):
    old, total = few(tmp_path / "old", "other").tokens, few(tmp_path / "whole").tokens
    with pytest.raises(InputError, match="text has changed"):
        few(tmp_path / "old")
    for i in itertools.count(0, 3):
        out = shutil.copytree(tmp_path / "old", tmp_path / str(i))
        failed = tried(i, lambda out=out: few(out, overwrite=True))
        assert usable(out) in ((old, None, total) if failed else (total,))
        few(out, overwrite=True)
        assert contents(out) == contents(tmp_path / "whole")
        if not failed:
            break
    assert i > 20


def test_a_full_disk_stops_with_a_sentence_and_goes_on(few, tmp_path):
    few(tmp_path / "whole")
    said = set()

    def work(out):
        try:
            few(out)
        except InputError as error:
            said.add(str(error).replace(str(out), ""))
            raise Killed from error

    for i in itertools.count():
        out = tmp_path / str(i)
        failed = tried(i, lambda out=out: work(out), OSError(errno.ENOSPC, "no space"))
        assert not out.exists() or not any(name.startswith(".") for name in os.listdir(out))
        few(out)
        assert contents(out) == contents(tmp_path / "whole")
        if not failed:
            break
    full = "could not be written, because the disk is full: free some space or choose another place; the same command"
    assert any(re.fullmatch(rf"/shard-00001\.safetensors {full} goes on after [1-9]\d* tokens\.", s) for s in said), (
        said
    )


def test_a_full_file_system(model, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        with pytest.raises(InputError, match="because the disk is full: free some space"):
            collect(model, place / "acts")
        subprocess.run(["mount", "-o", "remount,size=9m", str(place)], check=True)
        collect(model, place / "acts")
        same_batches(direct(model), Store(place / "acts"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


CHILD = """
import sys
from importlib import import_module
from tests import tiny_models
module = import_module("itda.reading.collect")
module.SHARD_BYTES = 60_000
module.collect(sys.argv[1], tiny_models.DOCUMENTS * 40, sys.argv[2], layer=[1, 3], batch_rows=4, context_length=16)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of POSIX")
def test_really_killed(folder, model, tmp_path, monkeypatch):
    out = tmp_path / "acts"
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(out.glob("shard-*.safetensors"))) > 2:
            process.kill()
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    assert usable(out) is None
    kept = store.read_contents(out / store.JOURNAL)
    monkeypatch.setattr(collecting, "SHARD_BYTES", 60_000)
    for target in (out, tmp_path / "whole"):
        result = collect(model, target, tiny_models.DOCUMENTS * 40)
    assert contents(out) == contents(tmp_path / "whole") and 2 <= len(kept.shards) < result.shards


def test_stopped(model, tmp_path):
    asked = iter(range(99))
    with pytest.raises(train.Interrupted) as stopped:
        collect(model, tmp_path / "acts", stop=lambda: next(asked) == 3)
    assert stopped.value.tokens == store.read_contents(tmp_path / "acts" / store.JOURNAL).tokens > 0
    with pytest.raises(InputError, match="has not finished: the same `itda collect` goes on"):
        Store(tmp_path / "acts")
    seen = []
    collect(model, tmp_path / "acts", progress=seen.append)
    assert seen[-1] is None and seen[0].tokens > stopped.value.tokens and "collecting" in str(seen[0])
    same_batches(direct(model), Store(tmp_path / "acts"))


def test_what_changed_meanwhile_is_refused(model, tmp_path):
    collect(model, tmp_path / "a", tokens=300)
    collect(model, tmp_path / "a", tokens=300)  # nothing to do
    with pytest.raises(InputError, match=r"text has changed in its first 300 tokens since this collecting began"):
        collect(model, tmp_path / "a", ["Another beginning.", *TEXTS[1:]], tokens=400)
    with pytest.raises(InputError, match=r"collected with stream\.context_length = 16, and now it is 20: give the f"):
        collect(model, tmp_path / "a", context_length=20)
    with pytest.raises(InputError, match="hook points"):
        collect(model, tmp_path / "a", layer=2)
    with pytest.raises(InputError, match="has 300 tokens already, more than the `tokens` = 200 given"):
        collect(model, tmp_path / "a", tokens=200)
    assert collect(model, tmp_path / "a", layer=2, overwrite=True, batch_rows=500).tokens > 300
    assert Store(tmp_path / "a").hook_points == ("transformer.h.2",)
    assert Store(tmp_path / "a").contents.ended
    with pytest.raises(InputError, match="text has changed"):  # at its end it had no more
        collect(model, tmp_path / "a", [*TEXTS, "One more document."], layer=2, batch_rows=500)
    (tmp_path / "a" / "shard-00000.parquet").unlink()
    with pytest.raises(InputError, match=r"shard-00000\.parquet is missing"):
        collect(model, tmp_path / "a", layer=2, batch_rows=500)
    collect(model, tmp_path / "a", layer=2, overwrite=True)
    same_batches(direct(model, layer=[2]), Store(tmp_path / "a", layer=[2]))


def test_a_store_is_not_collected_onto_itself(model, tmp_path):
    collect(model, tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = contents(tmp_path / "a")
    for data, out in (("a", "a"), ("a", "link"), ("link", "a")):
        with pytest.raises(InputError, match="is what would be read"):
            itda.collect(None, tmp_path / data, tmp_path / out, layer=1, overwrite=True)
    assert contents(tmp_path / "a") == before


def test_a_hook_point_that_a_store_cannot_name_is_refused_before_reading(folder, tmp_path):
    module = loading.language_model(folder, hooks=1).module
    mlp = module.base_model.h[1].mlp
    mlp.add_module("a-b", torch.nn.Identity())
    mlp.register_forward_hook(lambda own, args, output: getattr(own, "a-b")(output))
    words = tiny_models.tokenizer()
    with pytest.raises(InputError, match=r"no place for 'transformer\.h\.1\.mlp\.a-b'"):
        collect(module, tmp_path / "a", layer=None, hook="h.1.mlp.a-b", tokenizer=words)
    assert not (tmp_path / "a").exists()


def test_one_process_at_a_time(model, tmp_path):
    with locks.locked(tmp_path / "a", "collecting into"), pytest.raises(InputError, match="Another process is collect"):
        collect(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_folders_that_are_not_ours(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds 'thesis\.tex', which is no part"):
        collect(model, tmp_path, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        collect(model, tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(InputError, match="no valid token"):
        collect(model, tmp_path / "new", ["<s>"])
    assert "unfinished.json" in os.listdir(tmp_path / "new") or not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="holds no tokens"):
        collect(model, tmp_path / "none", ["", ""])
    with pytest.raises(InputError, match=r"has no activations\.json"):
        Store(tmp_path)


# -- damage and hostility ---------------------------------------------------------------------------------------------


def read_all(out):
    for _ in Store(out):
        pass


def test_every_flipped_bit_is_found_and_named(model, tmp_path):
    collect(model, tmp_path, TEXTS[:3], layer=[1])
    rng = np.random.default_rng(0)
    for path in sorted(tmp_path.iterdir()):
        data = path.read_bytes()
        for at in {0, 7, 8, 30, len(data) - 1, *rng.integers(len(data), size=60).tolist()}:
            flipped = bytearray(data)
            flipped[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(InputError) as error:
                read_all(tmp_path)
            assert path.name in str(error.value)
        path.write_bytes(data)
    read_all(tmp_path)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.parquet", "activations.json"])
def test_files_cut_short_longer_missing_or_links(model, tmp_path, name):
    collect(model, tmp_path / "acts")
    path = tmp_path / "acts" / name
    data = path.read_bytes()
    for damage in (data[:-1], data[: len(data) // 2], b"", data + b" "):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=name):
            read_all(tmp_path / "acts")
    path.unlink()
    with pytest.raises(InputError, match=name):
        read_all(tmp_path / "acts")
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{name} is a link"):
        read_all(tmp_path / "acts")
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=name):
        read_all(tmp_path / "acts")


def test_what_is_not_asked_for_is_not_read(model, tmp_path):
    collect(model, tmp_path, TEXTS[:5])
    path = tmp_path / "shard-00000.safetensors"
    _, where = disk.safetensors_head(
        {hook: (torch.float32, (store.read_contents(tmp_path / "activations.json").shards[0].tokens, 32))
         for hook in ("transformer.h.1", "transformer.h.3")}
    )  # fmt: skip
    data = bytearray(path.read_bytes())
    data[where["transformer.h.3"][0]] ^= 1
    path.write_bytes(data)
    list(Store(tmp_path, layer=1))
    list(Store(tmp_path).skip(store.read_contents(tmp_path / "activations.json").shards[0].tokens))
    with pytest.raises(InputError, match=r"the checksum of transformer\.h\.3 differs"):
        list(Store(tmp_path, layer=3))


HUGE = 1 << 62
HOSTILE = [
    (("hook_points",), {}),
    (("hook_points",), {"../../evil": {"dtype": "F32", "d": 32}}),
    (("hook_points",), {"/etc/passwd": {"dtype": "F32", "d": 32}}),
    (("hook_points", "transformer.h.1", "dtype"), "I64"),
    (("hook_points", "transformer.h.1", "dtype"), ["F32"]),
    (("hook_points", "transformer.h.1", "dtype"), "BF16"),
    (("hook_points", "transformer.h.1", "d"), HUGE),
    (("hook_points", "transformer.h.1", "d"), -1),
    (("hook_points", "transformer.h.1", "d"), 31.5),
    (("hook_points", "transformer.h.1", "d"), True),
    (("shards",), {}),
    (("shards",), [None]),
    (("shards", 0, "tokens"), HUGE),
    (("shards", 0, "batches"), [[HUGE, "0" * 64]]),
    (("shards", 0, "batches", 0), [1]),
    (("shards", 0, "batches", 0, 1), "../x"),
    (("shards", 0, "labels", "size"), HUGE),
    (("shards", 0, "labels", "sha256"), None),
    (("shards", 0, "xxh64"), {}),
    (("shards", 0, "xxh64", "transformer.h.1"), 7),
    (("tokens",), HUGE),
    (("n_layers",), "12"),
    (("hash",), "zz"),
    (("provenance",), {}),
    (("provenance", "transformer.h.1"), {"model": 1, "stream": {}}),
    (("format",), "itda"),
    (("version",), 2),
    (("version",), "1"),
]


@pytest.mark.parametrize(("where", "what"), HOSTILE, ids=str)
def test_hostile_manifests(model, tmp_path, where, what):
    collect(model, tmp_path, TEXTS[:3], layer=[1])
    document = json.loads((tmp_path / "activations.json").read_bytes())
    place = document
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = what
    if where == ("shards", 0, "tokens"):  # consistent with itself
        document["tokens"], document["shards"][0]["batches"] = what, [[what, "0" * 64]]
    if where == ("hook_points",) and what:
        name = next(iter(what))
        document["provenance"][name] = document["provenance"]["transformer.h.1"]
        document["shards"][0]["xxh64"][name] = "0" * 8
    (tmp_path / "activations.json").write_bytes(disk.sealed_json(document, None))
    with pytest.raises(InputError) as error:
        read_all(tmp_path)
    assert "\n" not in str(error.value)
    if where == ("hook_points",) and what:  # which could become the names of folders
        assert "is no hook point" in str(error.value)
    for nonsense in (b"", b"[]", b"{", b"[" * 10**5, b"\xff"):
        (tmp_path / "activations.json").write_bytes(nonsense)
        with pytest.raises(InputError, match=r"activations\.json"):
            Store(tmp_path)


def test_manifests_that_are_no_files_or_endless(tmp_path):
    path = tmp_path / "activations.json"
    os.mkfifo(path)
    for _ in range(2):
        with pytest.raises(InputError, match=r"activations\.json could not be read .*at most"):
            Store(tmp_path)
        path.unlink()
        with open(path, "wb") as file:
            file.truncate(1 << 40)


def test_devices_that_are_not_there(cache, model, tmp_path):
    collect(model, tmp_path, TEXTS[:3])
    for data in (tmp_path, cache[0]):
        with pytest.raises(InputError, match="`device` is 'tpu', which cannot be used here"):
            itda.activations(None, data, device="tpu")


def test_the_file_that_cannot_be_read_is_named(model, tmp_path, monkeypatch):
    collect(model, tmp_path, TEXTS[:3])
    manifest = (tmp_path / "activations.json").read_bytes()

    def read_bytes(path):
        if path.suffix == ".parquet":
            raise OSError(errno.EACCES, "Permission denied")
        return manifest

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(InputError, match=r"shard-00000\.parquet cannot be read \(Permission denied\)"):
        read_all(tmp_path)


def test_hostile_labels(model, tmp_path):
    """A parquet file that the manifest vouches for, and that is not what it should be."""
    import pyarrow as pa
    from pyarrow import parquet

    collect(model, tmp_path, TEXTS[:3], layer=[1])
    contents = store.read_contents(tmp_path / "activations.json")
    table = parquet.read_table(path := tmp_path / "shard-00000.parquet")
    n = len(table)
    rows = table.schema.get_field_index("row")
    for other in (
        table.drop_columns(["text"]),
        table.slice(1),
        table.set_column(rows, "row", pa.array(np.full(n, 5))),
        table.set_column(rows, "row", pa.array(np.full(n, -2))),
        table.set_column(table.schema.get_field_index("text"), "text", pa.array([None] * n, pa.string())),
        table.set_column(0, "prompt", pa.array([None] * n, pa.int64())),
        table.set_column(0, "prompt", pa.array(np.zeros(n))),
        table,
        None,
    ):
        if other is table:
            parquet.write_table(other, path, store_schema=False, compression="zstd")
        elif other is None:
            path.write_bytes(b"PAR1 and no more PAR1")
        else:
            parquet.write_table(other, path, store_schema=False, compression="none")
        labels = {"size": path.stat().st_size, "sha256": disk.hashlib.sha256(path.read_bytes()).hexdigest()}
        changed = replace(contents, shards=[replace(contents.shards[0], labels=labels), *contents.shards[1:]])
        (tmp_path / "activations.json").write_bytes(changed.to_bytes())
        with pytest.raises(InputError, match=r"shard-00000\.parquet"):
            read_all(tmp_path)


def test_text_of_labels_that_is_larger_than_its_file_is_refused(model, tmp_path):
    """One text that all rows share, as a dictionary or by its beginning: every row would have it anew."""
    import pyarrow as pa
    from pyarrow import parquet

    collect(model, tmp_path, TEXTS[:3], layer=[1])
    contents = store.read_contents(tmp_path / "activations.json")
    table = parquet.read_table(path := tmp_path / "shard-00000.parquet")
    n, at = len(table), table.schema.get_field_index("text")
    rows = table.set_column(table.schema.get_field_index("row"), "row", pa.array(np.arange(n)))
    shared = pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), ["x" * (1 << 24)])
    for text, said, how in (
        (shared, "unpacks to more text than is in it: copy", {}),
        (
            pa.array(["x" * (1 << 20)] * n),
            "is not a readable",
            {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        ),
    ):
        parquet.write_table(rows.set_column(at, "text", text), path, store_schema=False, compression="none", **how)
        labels = {"size": path.stat().st_size, "sha256": disk.hashlib.sha256(path.read_bytes()).hexdigest()}
        changed = replace(contents, shards=[replace(contents.shards[0], labels=labels), *contents.shards[1:]])
        (tmp_path / "activations.json").write_bytes(changed.to_bytes())
        pool = pa.default_memory_pool()
        most = max(pool.max_memory(), pool.bytes_allocated() + (1 << 28))
        with pytest.raises(InputError, match=rf"shard-00000\.parquet {said}"):
            read_all(tmp_path)
        assert pool.max_memory() <= most


# -- caches of SAELens ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache by the functions of SAELens' own writer, with what is in it: two shards of rows, BOS inside of one."""
    runner = pytest.importorskip("sae_lens.cache_activations_runner").CacheActivationsRunner
    from datasets import Array2D, Dataset, Features, Sequence, Value

    root = tmp_path_factory.mktemp("caches")
    x = np.random.default_rng(0).normal(size=(50, 7, 5)).astype(np.float32)
    ids = np.random.default_rng(1).integers(1, 99, (50, 7)).astype(np.int32)
    ids[:, 0] = ids[3, 4] = 50
    kinds = {"blocks.2.hook_resid_post": Array2D((7, 5), "float32"), "token_ids": Sequence(Value("int32"), length=7)}
    for i, rows in enumerate((slice(30), slice(30, 50))):
        part = Dataset.from_dict({"blocks.2.hook_resid_post": x[rows], "token_ids": ids[rows]}, Features(kinds))
        part.save_to_disk(root / "shards" / f"shard_{i:05d}", num_shards=1)
    (root / "cache").mkdir()
    runner._consolidate_shards(root / "shards", root / "cache", copy_files=True)
    return root / "cache", x, ids


def test_a_cache_of_saelens(cache, tmp_path):
    path, x, ids = cache
    every = itda.activations("any/model", path, special_tokens=True)
    assert every.single and every.hook_points == ("blocks.2.hook_resid_post",)
    batches = list(every)
    assert torch.equal(torch.cat([b.activations for b in batches]), torch.from_numpy(x.reshape(-1, 5)))
    labels = Labels.concat([b.labels for b in batches])
    assert labels.token_id.tolist() == ids.reshape(-1).tolist() and len(batches) == 2
    assert labels.prompt.tolist() == np.repeat(np.arange(50), 7).tolist()
    assert labels.position.tolist() == np.tile(np.arange(7), 50).tolist()
    valid = itda.activations(None, path, layer=2, batch_rows=8)
    kept = ids.reshape(-1) != ids[0, 0]
    assert kept.sum() < 300
    found = torch.cat([b.activations for b in valid])
    assert torch.equal(found, torch.from_numpy(x.reshape(-1, 5)[kept])) and valid.count_tokens() == kept.sum()
    some = itda.activations(None, path, layer=2, batch_rows=8, tokens=200)
    assert torch.equal(torch.cat([b.activations for b in some.skip(70)]), found[70:200])
    (trained,) = itda.train("any/model", path, tmp_path / "d", layer=2, k=2)
    cfg = itda.ITDA.load(tmp_path / "d").cfg
    assert cfg["model"]["id"] == "any/model" and cfg["stream"]["hash"] == valid.hash and trained.tokens == kept.sum()
    for how in (dict(layer=1), dict(hook="blocks.1.hook_resid_post")):
        with pytest.raises(InputError, match="choose of those"):
            itda.activations(None, path, **how)


def test_a_cache_or_a_part_of_a_store_becomes_a_store(cache, model, tmp_path):
    itda.collect("any/model", cache[0], tmp_path / "acts", batch_rows=4)
    stream, there = itda.activations("any/model", cache[0], batch_rows=4), Store(tmp_path / "acts")
    for one, two in itertools.zip_longest(stream, there):
        assert torch.equal(one.activations, two.activations)
        same_labels(one.labels, two.labels)
    assert stream.hash == there.hash and stream.provenance == there.provenance
    collect(model, tmp_path / "both")
    itda.collect(None, tmp_path / "both", tmp_path / "one", layer=3)
    same_batches(direct(model, layer=[3]), Store(tmp_path / "one", layer=[3]))


def test_a_training_from_a_cache_goes_on(cache, tmp_path):
    stream = itda.activations(None, cache[0], batch_rows=4)
    want, asked = itda.build(stream, k=2), iter(range(99))
    with pytest.raises(KeyboardInterrupt):
        itda.build(stream, k=2, checkpoint=tmp_path, stop=lambda: next(asked) == 5)
    assert itda.build(stream, k=2, checkpoint=tmp_path).cfg == want.cfg


def test_rows_without_ids_are_held_out_by_their_place(cache, tmp_path):
    import datasets

    datasets.load_from_disk(str(cache[0])).remove_columns("token_ids").save_to_disk(str(tmp_path / "bare"))
    itda.train("any/model", tmp_path / "bare", tmp_path / "d", layer=2, k=2, tokens=128, center=False)
    found = itda.evaluate(tmp_path / "d", tmp_path / "bare", controls=False)
    assert found.held_out["read_in_training"] and found.held_out["documents"] == 50 - 32  # a batch


def test_hostile_caches(cache, tmp_path):
    path = shutil.copytree(cache[0], tmp_path / "cache")
    names = sorted(p.name for p in path.glob("*.arrow"))
    state = json.loads((path / "state.json").read_text())
    for other in ("../x.arrow", "/etc/passwd", "missing.arrow", 7, "state.json"):
        state["_data_files"] = [{"filename": other}]
        (path / "state.json").write_text(json.dumps(state))
        with pytest.raises(InputError, match=r"state\.json|missing\.arrow"):
            itda.activations(None, path)
    state["_data_files"] = [{"filename": name} for name in names]
    (path / "state.json").write_text(json.dumps(state))
    data = (path / names[1]).read_bytes()
    for damage in (data[: len(data) // 2], b"", b"nonsense" * 99):
        (path / names[1]).write_bytes(damage)
        with pytest.raises(InputError, match=names[1]):
            list(itda.activations(None, path))
    with pytest.raises(InputError, match="choose of those"):
        store.chosen([f"h.{'9' * 5000}"], 1, None, 4, "x")
    with pytest.raises(InputError, match="no fewer than 0"):
        itda.activations(None, cache[0]).skip(-1)
    (path / names[1]).unlink()
    (path / names[1]).symlink_to(cache[0] / names[1])
    with pytest.raises(InputError, match="is a link"):
        itda.activations(None, path)


def test_caches_with_odd_rows_and_names(tmp_path):
    import pyarrow as pa

    def cache(folder, name, rows):
        folder.mkdir()
        table = pa.table({name: pa.array(rows, pa.list_(pa.list_(pa.float32())))})
        with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        (folder / "dataset_info.json").write_text("{}")
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
        return itda.activations(None, folder)

    rows = [[[1.0, 2.0], [3.0, 4.0]], [], [[5.0, 6.0], [7.0, 8.0]]]
    (batch,) = cache(tmp_path / "rows", "blocks.1.hook_resid_post", rows)
    assert batch.activations.tolist() == [rows[0][1], rows[2][1]] and batch.labels.prompt.tolist() == [0, 2]
    assert cache(tmp_path / "names", f"blocks.{'9' * 5000}.x", rows).provenance["model"]["layer"] is None


# -- measuring and comparing ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    """A dictionary of the first half of some documents, and activations of all, of the half, and of others."""
    root = tmp_path_factory.mktemp("measured")
    words, draw = " ".join(tiny_models.DOCUMENTS).split(), random.Random(0)
    texts = [" ".join(draw.sample(words, 40)) for _ in range(24)]  # no two with a row in common
    for name, own in (("half", texts[:12]), ("all", texts), ("others", texts[12:]), ("shuffled", texts[::-1])):
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in own), "utf-8")
        itda.collect(folder, root / f"{name}.jsonl", root / name, layer=[1, 2], context_length=16, batch_rows=1)
    itda.train(folder, root / "half.jsonl", root / "d", layer=1, k=4, n_atoms=60, context_length=16, batch_rows=1)
    return root


def test_evaluation_without_a_model(measured, folder):
    found = itda.evaluate(measured / "d", measured / "all")
    assert found.held_out["by"] == "document" and found.held_out["read_in_training"]
    assert list(found.systems) == ["itda", "random tokens", "gaussian"]
    assert "no model" in found.no_ce and "untrained model" in found.held_out["left_out"]
    # The same documents, read by the model.
    want = itda.evaluate(measured / "d", measured / "all.jsonl", controls=False, ce_tokens=0)
    assert found.tokens == want.tokens and found.held_out["documents"] == want.held_out["documents"] == 12
    assert found.fvu == pytest.approx(want.fvu, rel=1e-6) and found.l0 == want.l0
    json.dumps(found.to_json())
    others = itda.evaluate(measured / "d", measured / "others", controls=["gaussian"])
    assert not others.held_out["read_in_training"] and others.fvu == pytest.approx(want.fvu, rel=1e-6)
    # Another order, where hashes say nothing, rows are told by their ids.
    assert itda.evaluate(measured / "d", measured / "shuffled", controls=False).tokens == want.tokens
    assert itda.evaluate(measured / "d", measured / "all", controls=False, in_sample=True).tokens > 1.5 * want.tokens


def test_what_was_read_is_told_by_hash_where_the_text_is_gone(measured):
    how = dict(controls=False, tokens=100)
    want = itda.evaluate(measured / "d", measured / "all", **how)
    (measured / "half.jsonl").rename(measured / "gone")
    try:
        found = itda.evaluate(measured / "d", measured / "all", **how)
        assert found.held_out == want.held_out and found.fvu == want.fvu
        other = itda.evaluate(measured / "d", measured / "shuffled", **how)
        assert "was not there to compare with" in other.held_out["by"]
    finally:
        (measured / "gone").rename(measured / "half.jsonl")


def test_text_that_was_read_is_not_held_out_where_it_is_collected_once_more(measured, folder, tmp_path):
    texts = [(measured / f"{name}.jsonl").read_text("utf-8") for name in ("half", "others", "half")]
    (tmp_path / "again.jsonl").write_text("\n".join(texts), "utf-8")
    itda.collect(folder, tmp_path / "again.jsonl", tmp_path / "again", layer=1, context_length=16, batch_rows=1)
    want = itda.evaluate(measured / "d", measured / "all", controls=False)
    assert itda.evaluate(measured / "d", tmp_path / "again", controls=False).use == want.use


def test_evaluation_of_what_was_not_collected_so(measured, tmp_path):
    with pytest.raises(InputError, match="'elsewhere' was named"):
        itda.evaluate(measured / "d", measured / "all", model="elsewhere")
    for key, value in dict(special_tokens=True, context_length=20, column="body", dtype="float16").items():
        with pytest.raises(InputError, match=f"was collected with `{key}`"):
            itda.evaluate(measured / "d", measured / "all", **{key: value})


def test_evaluation_that_would_not_be_honest(measured, folder, tmp_path):
    with pytest.raises(InputError, match="All documents of these activations were read"):
        itda.evaluate(measured / "d", measured / "half")
    itda.collect(folder, measured / "shuffled.jsonl", tmp_path / "cut", layer=1, context_length=20)
    with pytest.raises(InputError, match="cut into other rows than the dictionary's"):
        itda.evaluate(measured / "d", tmp_path / "cut")
    tiny_models.save("gpt2", tmp_path / "other", seed=1)
    itda.collect(tmp_path / "other", measured / "others.jsonl", tmp_path / "acts", layer=1, context_length=16)
    with pytest.raises(InputError, match="differs from the dictionary's in its weights"):
        itda.evaluate(measured / "d", tmp_path / "acts")
    assert itda.evaluate(measured / "d", tmp_path / "acts", controls=False, force=True).fvu > 0
    itda.collect(folder, measured / "others.jsonl", tmp_path / "elsewhere", layer=3, context_length=16)
    with pytest.raises(InputError, match="choose of those"):
        itda.evaluate(measured / "d", tmp_path / "elsewhere")
    with pytest.raises(InputError, match="A probe reads texts"):
        itda.evaluate(measured / "d", measured / "all", probe=[{"text": "a", "label": 1}, {"text": "b", "label": 2}])


def test_comparing_without_models(measured, folder, tmp_path):
    other = tiny_models.save("gpt2", tmp_path / "other", seed=1)
    bert = tiny_models.save("bert", tmp_path / "bert")
    for name, model in (("x", other), ("y", bert)):
        itda.collect(model, measured / "all.jsonl", tmp_path / name, layer=[1, 2], context_length=16, batch_rows=1)
    how = dict(measures=["cka", "jaccard"], tokens=400, k=2)
    found = itda.compare([measured / "all", tmp_path / "x"], **how)
    want = itda.compare([folder, other], measured / "all.jsonl", layer=[1, 2], context_length=16, batch_rows=1, **how)
    for name in ("cka", "jaccard"):
        matrix, wanted = (c.measures[name].pairs[tuple(m["name"] for m in c.models)] for c in (found, want))
        assert np.allclose(matrix, wanted, atol=1e-6)
        assert set(want.measures[name].controls) - set(found.measures[name].controls) == {"untrained"}
    aligned = itda.compare([measured / "all", tmp_path / "y"], **how)
    assert aligned.aligned and aligned.tokens > 20
    with pytest.raises(InputError, match="are of different texts"):
        itda.compare([measured / "others", tmp_path / "y"], **how)
    with pytest.raises(InputError, match="have different rows"):
        itda.compare([measured / "others", tmp_path / "y"], align=False, **how)
    with pytest.raises(InputError, match="holds activations and"):
        itda.compare([measured / "all", folder], measured / "all.jsonl")


# -- the command ------------------------------------------------------------------------------------------------------


def run(capfd, *words):
    code = main([str(word) for word in words])
    out, err = capfd.readouterr()
    return code, out, err


def test_the_command(capfd, folder, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": one}) for one in TEXTS), "utf-8")
    words = ["collect", folder, text, "--layer", 1, 3, "--context-length", 16, "--batch-rows", 4]
    words += ["--out", tmp_path / "acts"]
    code, out, err = run(capfd, *words, "--json")
    said = json.loads(out)
    assert code == 0 and said["tokens"] == said["new"] > 400 and f"itda train {folder} {tmp_path / 'acts'}" in err
    code, out, _ = run(capfd, *words)
    assert code == 0 and f"{said['tokens']:,} tokens (0 of them new)" in out
    code, out, err = run(capfd, *words, "--seed", 1)
    assert code == 2 and err.count("itda: error") == 1 and "stream.seed = None, and now it is 1" in err.splitlines()[-1]
    train = ["train", folder, tmp_path / "acts", "--layer", 1, "--k", 4, "--out", tmp_path / "d", "--json"]
    code, out, err = run(capfd, *train)
    assert code == 0 and json.loads(out)["tokens"] == said["tokens"]
    assert f"{tmp_path / 'acts'} holds no more tokens: itda collect with more --tokens adds to it" in err
    for enough in (("--tokens", said["tokens"]), ("--max-atoms", 3)):
        code, _, err = run(capfd, *train, *enough, "--overwrite")
        assert code == 0 and "holds no more tokens" not in err


STREAMED = CHILD.replace("layer=[1, 3]", "stream_layers=True, state_gb=1e-4, layer=[1, 3]")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of POSIX")
def test_a_streamed_model_is_collected_to_the_same_bytes(capfd, tmp_path):
    """Whole, block by block in several lots of rows, and killed in one of them and begun again."""
    name, text = tiny_models.save("llama", tmp_path / "llama"), tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": one}) for one in tiny_models.DOCUMENTS * 12), "utf-8")
    words = ["collect", name, text, "--layer", 1, 3, "--context-length", 16, "--batch-rows", 4]
    assert run(capfd, *words, "--no-stream-layers", "--out", tmp_path / "whole")[0] == 0
    streamed = [*words, "--stream-layers", "--state-gb", 1e-4]
    assert run(capfd, *streamed, "--out", tmp_path / "streamed")[0] == 0
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "streamed") == whole and len(whole) > 9
    code = STREAMED.replace("tiny_models.DOCUMENTS * 40", repr(str(text))).replace("60_000", "30_000")
    process = subprocess.Popen([sys.executable, "-c", code, str(name), str(tmp_path / "killed")])
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(list((tmp_path / "killed").glob("shard-*.safetensors"))) > 1:
            process.kill()
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL and usable(tmp_path / "killed") is None
    kept = store.read_contents(tmp_path / "killed" / store.JOURNAL)
    assert 1 <= len(kept.shards) < (len(whole) - 1) // 2
    assert run(capfd, *streamed, "--out", tmp_path / "killed")[0] == 0
    assert contents(tmp_path / "killed") == whole


def test_an_interrupted_command(capfd, folder, tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": one}) for one in TEXTS), "utf-8")
    words = ["collect", folder, text, "--layer", 1, 3, "--context-length", 16, "--batch-rows", 4]
    reports = []

    def signalled(progress):
        def report(step):
            reports.append(step)
            if len(reports) == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        return report

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "reporter", signalled)
        code, _, err = run(capfd, *words, "--out", tmp_path / "acts")
    assert code == 143 and "the same command goes on from there" in err and len(reports) < 9
    assert run(capfd, *words, "--out", tmp_path / "acts")[0] == 0
    assert run(capfd, *words, "--out", tmp_path / "whole")[0] == 0
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


# -- interrupted again, while it recovers -----------------------------------------------------------------------------


def test_killed_again_while_it_recovers(few, tmp_path):
    """A collecting that was killed is killed again, at steps all over its recovery, and ends as if undisturbed."""
    few(tmp_path / "whole")
    want = contents(tmp_path / "whole")
    for first in (9, 20):
        for second in itertools.count(0, 6):
            out = tmp_path / f"{first}-{second}"
            assert tried(first, lambda out=out: few(out))
            failed = tried(second, lambda out=out: few(out))
            few(out)
            assert contents(out) == want
            if not failed:
                break
        assert second > 6


def test_stopped_again_while_it_recovers(few, tmp_path):
    few(tmp_path / "whole")
    want = contents(tmp_path / "whole")
    for first, second in ((1, 1), (2, 1), (2, 2), (3, 1)):
        out = tmp_path / f"{first}-{second}"
        for after in (first, second):
            asked = itertools.count(1)
            with suppress(KeyboardInterrupt):
                few(out, stop=lambda asked=asked, after=after: next(asked) == after)
        few(out)
        assert contents(out) == want


def test_what_other_versions_read_is_not_added_to(few, tmp_path, monkeypatch):
    few(tmp_path / "x", tokens=50)
    before = contents(tmp_path / "x")
    monkeypatch.setattr(import_module("itda.reading.activations"), "_versions", lambda: {"torch": "1.0"})
    with pytest.raises(
        InputError, match=r"was collected with torch \S+, and this is torch 1\.0, whose activations may"
    ):
        few(tmp_path / "x")
    assert contents(tmp_path / "x") == before


def test_what_another_processor_read_is_not_added_to(few, tmp_path, monkeypatch):
    few(tmp_path / "x", tokens=50)
    before = contents(tmp_path / "x")
    monkeypatch.setattr(hooked_model, "processor", lambda device: "another AVX3")
    with pytest.raises(InputError, match=r"collected with processor .*, and this is processor another AVX3, whose"):
        few(tmp_path / "x")
    assert contents(tmp_path / "x") == before
    monkeypatch.undo()
    few(tmp_path / "x")


def test_instructions_tell_processors_apart():
    code = "import torch; from itda.devices import processor; print(processor(torch.device('cpu')))"
    found = {
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        for env in (dict(os.environ), {**os.environ, "ATEN_CPU_CAPABILITY": "default"})
    }
    assert len(found) == 2 and len({kind.split()[0] for kind in found}) == 1


@pytest.mark.parametrize("name", [".thesis.tmp-0123456789abcdef", ".shard-1.parquet.tmp-" + "0" * 16])
def test_what_is_called_like_a_leftover_stays(few, tmp_path, name):
    few(tmp_path / "x", tokens=50)
    (tmp_path / "x" / name).write_text("mine")
    with pytest.raises(InputError, match=re.escape(f"holds {name!r}, which is no part of activations on disk")):
        few(tmp_path / "x")
    assert (tmp_path / "x" / name).read_text() == "mine"


def test_a_manifest_of_something_else_stays(few, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "activations.json").write_text('{"format": "another"}')
    with pytest.raises(InputError, match=r"holds 'activations\.json', which is no part of activations on disk"):
        few(tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "activations.json").read_text() == '{"format": "another"}'


def test_numbers_of_labels_that_are_none(few, tmp_path, monkeypatch):
    """A position below 0 is refused, whoever vouches for the file."""
    few(tmp_path / "x", tokens=50)
    labels = shards._labels_bytes

    def negative(found):
        return labels(replace(found, position=found.position - 99))

    monkeypatch.setattr(shards, "_labels_bytes", negative)
    few(tmp_path / "bad", tokens=50)
    with pytest.raises(InputError, match=r"shard-00000\.parquet has a `position` of -9\d, and 0 is the least"):
        read_all(tmp_path / "bad")
