"""A model that two processes share (gloo, on the CPU): what they read, what is said of it, and what ends them."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import itda
from itda.cli.main import main
from itda.dictionary.build import build
from itda.errors import InputError
from itda.models import loading, processes, shared_model
from itda.models.hooked_model import HookedModel
from itda.models.loading import load_model
from itda.models.shared_model import SharedModel
from itda.reading.activations import activations
from itda.reading.own_model import model_of
from tests.tiny_models import DOCUMENTS, LAYERS, save

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="transformers would want a GPU for each process")
SIZES = {"context_length": 24, "batch_rows": 3}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4}
IDS = torch.arange(10).reshape(2, 5)
MASK = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    settings = {"gpt2": {}, "llama": {}, "mixtral": EXPERTS}
    return {family: str(save(family, tmp_path_factory.mktemp(family), **more)) for family, more in settings.items()}


@pytest.fixture
def llama(folders):
    return folders["llama"]


class Opened:
    """The model that was opened last: two at a time is one too many, and each takes seconds."""

    family: str | None = None
    model: SharedModel | None = None

    def __call__(self, family, folder):
        if self.family != family:
            self.close()
            self.model, self.family = load_model(folder, hooks=points(family), tensor_parallel=2), family
        return self.model

    def close(self):
        """By letting go of it."""
        processes = [] if self.model is None else self.model._team.processes
        self.model = self.family = None
        gc.collect()  # a test that fails keeps what it had
        assert not torch.distributed.is_initialized()
        assert all(process.returncode == 0 for process in processes)


@pytest.fixture(scope="module")
def opened():
    found = Opened()
    yield found
    found.close()


@pytest.fixture
def alone(opened):
    opened.close()


def points(family):
    inside = ["layers.1.self_attn", "layers.2.mlp"] + ["layers.2.mlp.down_proj"] * (family != "mixtral")
    return [f"layers.{layer}" for layer in range(LAYERS)] + inside


def close(x, y) -> bool:
    """Equal up to the rounding of float32."""
    return torch.allclose(x, y, rtol=1e-4, atol=1e-5 * float(x.abs().max()))


def is_running(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# -- what they read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_activations_are_those_of_the_whole_model(family, folders, opened):
    plain = activations(folders[family], DOCUMENTS, hook=points(family), **SIZES)
    both = activations(opened(family, folders[family]), DOCUMENTS, hook=list(plain.hook_points), **SIZES)
    assert type(both.model) is SharedModel and both.hook_points == plain.hook_points
    assert len(both.hook_points) == len(points(family)) and both.model.d == plain.model.d
    for x, y in zip(plain, both, strict=True):
        for hook in plain.hook_points:
            assert close(x[hook].activations, y[hook].activations), hook
            assert (x[hook].labels.pairs() == y[hook].labels.pairs()).all()
    for hook, said in plain.provenance.items():  # the fingerprint of the whole weights too
        assert both.provenance[hook] == said | {"model": said["model"] | {"tensor_parallel": 2}}


def test_the_parts_are_parts(llama, opened):
    model, whole = opened("llama", llama), load_model(llama, hooks=LAYERS - 1)
    parts = dict(model.module.named_parameters())
    for name, p in whole.module.named_parameters():
        if ".mlp." in name or ".self_attn." in name:
            assert 2 * parts[name].to_local().numel() == p.numel(), name
            assert parts[name].to_local().data_ptr() % 64 == 0, name  # wherever they begin in their file


def test_other_hook_points(llama, opened):
    model = opened("llama", llama)
    again = load_model(model, hooks=[1, "layers.0.input_layernorm"])
    assert type(again) is SharedModel and again.hook_points == ("model.layers.0.input_layernorm", "model.layers.1")
    plain = load_model(llama, hooks=1).read(IDS, MASK)["model.layers.1"]
    for reader in (again, model, again):  # in turn
        assert close(plain, reader.read(IDS, MASK)["model.layers.1"])


@pytest.mark.parametrize("hook", ["layers.1.mlp.gate_proj", "layers.1.mlp.act_fn", "layers.0.self_attn.q_proj"])
def test_what_is_inside_the_parts_has_no_hook_point(hook, llama, opened):
    model = opened("llama", llama)
    with pytest.raises(InputError, match=f"`model.{hook}` is computed in parts, of which each process has one"):
        load_model(model, hooks=hook)
    with pytest.raises(InputError, match=r"The output of `model\.rotary_emb` is not one vector per token"):
        load_model(model, hooks="rotary_emb")
    assert model.read(IDS, MASK)  # nobody was lost


def test_no_logits(llama, opened):
    model = opened("llama", llama)
    assert not model.predicts
    with pytest.raises(InputError, match=r"is shared between processes, .* load it without `tensor_parallel`"):
        model._logits(IDS, MASK, {})


# -- dictionaries -----------------------------------------------------------------------------------------------------


def test_a_dictionary_goes_on_with_as_many_processes(llama, opened, tmp_path):
    how = {"k": 4, "threshold": 0.3, "chunk_size": 16, "center": False}
    stream = activations(opened("llama", llama), DOCUMENTS, layer=2, **SIZES)
    plain = activations(llama, DOCUMENTS, layer=2, **SIZES)
    expected, whole = build(stream, **how), build(plain, **how)
    assert (expected.labels.pairs() == whole.labels.pairs()).all() and len(whole) > 20
    assert expected.cfg["model"] == whole.cfg["model"] | {"tensor_parallel": 2}
    assert (
        model_of(expected.cfg, {"model": load_model(llama, hooks=2)})[1]
        == model_of(whole.cfg, {"model": opened.model})[1]
        == "model.layers.2"
    )

    asked = iter([False, True])
    with pytest.raises(KeyboardInterrupt):
        build(stream, **how, checkpoint=tmp_path, checkpoint_seconds=0.0, stop=lambda: next(asked))
    with pytest.raises(InputError, match=r"started with model.tensor_parallel = 2, and this one has None"):
        build(plain, **how, checkpoint=tmp_path)
    resumed = build(stream, **how, checkpoint=tmp_path)
    assert torch.equal(resumed.atoms, expected.atoms)
    assert (resumed.labels.pairs() == expected.labels.pairs()).all()


@pytest.fixture
def asked(monkeypatch, llama, opened):
    """Which models were to be loaded in how many processes; what comes is the one that is open."""
    found, there = [], opened("llama", llama)

    def shared(model, tokenizer, points, size, how):
        found.append((model, size))
        return there.at(points, there.tokenizer)

    monkeypatch.setattr(loading, "shared", shared)
    return found


def test_the_flags(llama, asked, tmp_path, capfd):
    """A dictionary of the same tokens as without, directly and from activations on disk."""
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    data, outs = str(tmp_path / "text.txt"), [tmp_path / name for name in ("plain", "shared", "stored")]
    words, share = ["--layer", "1", "--json", "--out"], ["--tensor-parallel", "2"]
    train, collect = (["--k", "4", *rest] for rest in ([], ["--context-length", "24"]))
    assert main(["train", llama, data, *collect, *words, str(outs[0])]) == 0
    assert main(["train", llama, data, *collect, *words, str(outs[1]), *share]) == 0
    assert main(["collect", llama, data, *collect[2:], *words, str(tmp_path / "acts"), *share]) == 0
    assert asked == [(llama, 2)] * 2
    assert main(["train", llama, str(tmp_path / "acts"), *train, *words, str(outs[2])]) == 0
    plain, *both = (itda.ITDA.load(out) for out in outs)
    for dictionary in both:
        assert (plain.labels.pairs() == dictionary.labels.pairs()).all()
        assert dictionary.cfg["model"] == plain.cfg["model"] | {"tensor_parallel": 2}


def test_a_pass_that_is_left(llama, opened):
    """The others wait where this process never comes: they are ended, and another reading says why."""
    model = opened("llama", llama)

    def leave(*_):
        raise KeyboardInterrupt

    model.module.layers[1].mlp.register_forward_pre_hook(leave)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        model.read(IDS, MASK)
    with pytest.raises(InputError, match="was left in the middle of a forward pass: load it again"):
        model.read(IDS, MASK)
    assert time.monotonic() - began < 30
    model._team.processes.clear()  # one that is let go of must have ended well
    del model
    opened.close()


def test_a_process_that_is_killed_in_the_middle(llama, opened):
    """Nothing hangs, what is said is one sentence, and another model can be shared afterwards (as above, and below)."""
    model = opened("llama", llama)
    pid = model._team.processes[0].pid
    with pytest.raises(InputError, match=r"is in a group of torch\.distributed already"):
        load_model(llama, hooks=1, tensor_parallel=2)

    def kill(*_):
        os.kill(pid, signal.SIGKILL)

    handle = model.module.layers[1].register_forward_pre_hook(kill)
    sentence = r"Process 2 of 2 that share .* is gone \(signal 9\): .* give the same call again\."
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(InputError, match=sentence):
            model.read(IDS, MASK)
        handle.remove()
    assert time.monotonic() - began < 30
    assert not is_running(pid) and not torch.distributed.is_initialized()
    model._team.processes.clear()  # one that is let go of must have ended well
    del model
    opened.close()


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    ({"tensor_parallel": 0}, "`tensor_parallel` is 0: pass a whole number, 1 or more"),
    ({"tensor_parallel": 4}, "`tensor_parallel` is 4, and `.*` has 2 key_value_heads, .* a number that divides 2"),
    ({"tensor_parallel": 3}, "`tensor_parallel` is 3, and `.*` has 4 attention_heads"),
    ({"family": "gpt2"}, r"\(gpt2\) has no plan in transformers"),
    ({"family": "bert"}, r"\(bert\) has no plan in transformers"),
    ({"device_map": "auto"}, "`device_map` says how weights are kept, and so does `tensor_parallel`"),
    ({"tp_plan": "auto"}, "`tp_plan` says how weights are kept, and so does `tensor_parallel`"),
    ({"stream_layers": True}, "A model that is streamed is read by one process"),
    ({"backend": "nnsight"}, "nnsight reads a model in one process"),
    ({"device": "meta"}, "`device` is 'meta'"),
]


@pytest.fixture
def nobody(monkeypatch, alone):
    """No process may be started."""
    monkeypatch.setattr(shared_model, "Team", lambda *_: pytest.fail("processes were started"))


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_what_cannot_be_shared(settings, sentence, folders, tmp_path, nobody):
    settings = {"tensor_parallel": 2} | settings
    family = settings.pop("family", "llama")
    folder = folders[family] if family in folders else str(save(family, tmp_path))
    with pytest.raises(InputError, match=sentence):
        load_model(folder, hooks=1, **settings)


def test_quantised_weights_are_not_shared(folders, tmp_path, nobody):
    for file in Path(folders["llama"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is quantised, and such weights are not shared"):
        load_model(tmp_path, hooks=1, tensor_parallel=2)


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0", "cuda:1"])
def test_more_processes_than_devices(device, llama, monkeypatch, nobody):
    monkeypatch.setattr(shared_model, "checked_device", lambda given: torch.device(given or "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = "takes the first 2 CUDA devices" if device == "cuda:1" else "is 2, and CUDA devices are 1"
    with pytest.raises(InputError, match=said):
        load_model(llama, hooks=1, tensor_parallel=2, device=device)


def test_the_cpu_where_there_are_devices(llama, monkeypatch, nobody):
    """transformers puts the parts on the GPUs if there are some, whatever is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="`device` is 'cpu', and `tensor_parallel` takes the first 2 CUDA devices"):
        load_model(llama, hooks=1, tensor_parallel=2, device="cpu")


def test_a_loaded_model_is_used_as_it_is(llama, nobody):
    with pytest.raises(InputError, match="is loaded already and used as it is: drop `tensor_parallel`"):
        load_model(load_model(llama, hooks=1), hooks=1, tensor_parallel=2)


def test_an_older_transformers(llama, monkeypatch, nobody):
    import transformers.distributed

    monkeypatch.setattr(transformers.distributed, "DistributedConfig", lambda: None)
    with pytest.raises(InputError, match="`tensor_parallel` needs a newer transformers than"):
        load_model(llama, hooks=1, tensor_parallel=2)


def test_under_torchrun(llama, monkeypatch, nobody):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"is in a group of torch.distributed already: close the other model"):
        load_model(llama, hooks=1, tensor_parallel=2)


def test_with_workers(llama, tmp_path, nobody):
    for call in (
        lambda: itda.train(llama, DOCUMENTS, tmp_path / "a", layer=1, workers=2, tensor_parallel=2),
        lambda: itda.train(llama, DOCUMENTS, tmp_path / "a", layer=1, ray=True, tensor_parallel=2),
        lambda: itda.sweep(
            {"model": llama, "data": "x.txt", "layer": 1, "tensor_parallel": 2}, tmp_path / "b", workers=2
        ),
    ):
        with pytest.raises(
            InputError, match="`workers` have a model each, and `tensor_parallel` has one in parts: drop one"
        ):
            call()


def test_one_process_is_as_without(llama, nobody):
    assert type(load_model(llama, hooks=1, tensor_parallel=1)) is HookedModel


# -- how they begin and end -------------------------------------------------------------------------------------------

GONE = "import sys; sys.exit(3)"
SAYS = "import pickle, sys; pickle.dump(('failed', 'MemoryError: no room'), sys.stdout.buffer)"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(GONE, r"is gone \(exit status 3\): see that there is memory"), (SAYS, r"has failed \(MemoryError: no room\)")],
)
def test_a_process_that_does_not_load(code, sentence, llama, monkeypatch, alone):
    monkeypatch.setattr(processes, "FOLLOWER", code)
    with pytest.raises(InputError, match=f"Process 2 of 2 that share `{llama}` {sentence}"):
        load_model(llama, hooks=1, tensor_parallel=2)
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="how processes are is looked up in /proc")
@pytest.mark.parametrize("busy", ["sys.stdin.read()", "x = torch.ones(2, 5).long()\nwhile True: m.read(x, x)"])
def test_they_end_when_the_first_is_killed(busy, llama, tmp_path):
    code = "import itda, sys, torch; m = itda.load_model(sys.argv[1], hooks=1, tensor_parallel=2); "
    code += f"print(m._team.processes[0].pid, flush=True); {busy}"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(itda.__file__).parents[1]), "TMPDIR": str(temporary)}
    first = subprocess.Popen(
        [sys.executable, "-c", code, llama], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    with first:
        pid = int(first.stdout.readline())
        assert is_running(pid) and any(temporary.iterdir())
        for harmless in (signal.SIGINT, signal.SIGTERM):  # a terminal or a scheduler sends these to all
            os.kill(pid, harmless)
        time.sleep(0.2)
        assert is_running(pid)
        first.kill()
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)
    assert not any(path.name.startswith("itda-") for path in temporary.iterdir())


def test_nothing_is_left_of_a_first_that_was_killed_at_once(tmp_path):
    (tmp_path / "group").mkdir()
    code = processes.FOLLOWER.format(path=[str(Path(itda.__file__).parents[1]), *sys.path])
    words = [sys.executable, "-c", code, str(tmp_path / "group")]
    assert subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0
    assert not (tmp_path / "group").exists()
