"""SAEs of other libraries, each from a small file in its format, against the library's formulas written out."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAEConfig
from safetensors.torch import save_file

import itda
from itda.cli.main import main
from itda.errors import InputError
from itda.interop import saelens_hub
from itda.interop.saelens import load_sae
from itda.progress import telling
from tests import tiny_models
from tests.hub_server import serving

D, N, K = 32, 48, 5
X = torch.randn(40, D, generator=torch.Generator().manual_seed(7))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def weights():
    """W_enc (d, n), b_enc, W_dec (n, d), b_dec."""
    return noise(D, N, seed=1), noise(N, seed=2), noise(N, D, seed=3), noise(D, seed=4)


def largest(pre, k):
    """The k largest of each row where they are positive, the rest zero."""
    out = torch.zeros_like(pre)
    for t, row in enumerate(pre):
        some = sorted(range(len(row)), key=lambda i: -float(row[i]))[:k]
        out[t, some] = row[some].clamp_min(0)
    return out


def gemma_scope(folder: Path) -> torch.Tensor:
    """acts = ReLU(x W_enc + b_enc) where the pre-activation is above the threshold; no bias from the input."""
    folder.mkdir(parents=True)
    w, b, v, c = weights()
    threshold = noise(N, seed=5).abs()
    named = {"W_enc": w, "b_enc": b, "W_dec": v, "b_dec": c, "threshold": threshold}
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in named.items()})
    pre = X @ w + b
    return pre.relu() * (pre > threshold)


def sparsify(folder: Path, extra=None, **cfg) -> torch.Tensor:
    """The k largest of ReLU((x - b_dec) W^T + b)."""
    folder.mkdir(parents=True)
    w, b, v, c = weights()
    said = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K, "multi_topk": False, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(said | {"skip_connection": False, "activation": "topk"} | cfg))
    named = {"encoder.weight": w.T.contiguous(), "encoder.bias": b, "W_dec": v, "b_dec": c} | (extra or {})
    save_file(named, folder / "sae.safetensors")
    return largest((X - c) @ w + b, K)


def learned(folder: Path, kind: str, metadata=None) -> torch.Tensor:
    """dictionary_learning's classes, by the names of their `state_dict`."""
    folder.mkdir(parents=True)
    w, b, v, c = weights()
    named = {"encoder.weight": w.T, "encoder.bias": b, "decoder.weight": v.T}
    k, threshold = torch.tensor(K, dtype=torch.int), torch.tensor(0.4)
    pre = (X - c) @ w + b
    if kind == "AutoEncoder":
        named, codes = named | {"bias": c}, pre.relu()
    elif kind == "AutoEncoderNew":
        named, codes = named | {"decoder.bias": c}, (X @ w + b).relu()
    elif kind == "AutoEncoderTopK":
        named, codes = named | {"b_dec": c, "k": k, "threshold": threshold}, largest(pre, K)
    elif kind == "BatchTopKSAE":
        named, codes = named | {"b_dec": c, "k": k, "threshold": threshold}, pre.relu() * (pre.relu() > 0.4)
    elif kind == "JumpReluAutoEncoder":
        threshold = noise(N, seed=5)  # of either sign
        named = {"W_enc": w, "b_enc": b, "W_dec": v, "b_dec": c, "threshold": threshold}
        pre = X @ w + b
        codes = (pre * (pre > threshold)).relu()
    else:
        named, codes = named | {"decoder_bias": c, "r_mag": b, "gate_bias": b, "mag_bias": b}, pre
    torch.save(named, folder / "ae.pt")
    said = {"dict_class": kind, "lm_name": "EleutherAI/pythia-70m", "layer": 3, "submodule_name": "resid_post_layer_3"}
    (folder / "config.json").write_text(json.dumps({"trainer": said | (metadata or {}), "buffer": {}}))
    return codes


LEARNED = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder")
FORMATS = {"gemma scope": gemma_scope, "sparsify": sparsify} | {
    kind: lambda folder, kind=kind: learned(folder, kind) for kind in LEARNED
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("given", ["folder", "file"])
def test_codes_are_those_of_the_library(name, given, tmp_path):
    folder = tmp_path / "x"
    expected = FORMATS[name](folder)
    file = next(file for file in folder.iterdir() if file.suffix in (".npz", ".safetensors", ".pt"))
    system = load_sae(folder if given == "folder" else file)
    x_hat, codes = system.run(X)
    _, _, v, c = weights()
    torch.testing.assert_close(codes.dense(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_hat, expected @ v + c, rtol=1e-4, atol=1e-4)
    assert system.name == "x" and 0 < codes.l0().double().mean() < N
    torch.testing.assert_close(system.atoms, v / v.norm(dim=1, keepdim=True))
    assert (system.k == K) == (name in ("sparsify", "AutoEncoderTopK", "BatchTopKSAE"))


PLACES = [
    (gemma_scope, "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "blocks.20.hook_resid_post", "gemma-2-2b"),
    (gemma_scope, "gemma-scope-9b-it-mlp/layer_3/width_16k/canonical", "blocks.3.hook_mlp_out", "gemma-2-9b-it"),
    (gemma_scope, "layer_20", None, None),
    (sparsify, "layers.3", "blocks.3.hook_resid_post", None),
    (sparsify, "h.11.mlp", "blocks.11.hook_mlp_out", None),
    (sparsify, "something", None, None),
    (lambda f: learned(f, "AutoEncoderTopK"), "x", "blocks.3.hook_resid_post", "EleutherAI/pythia-70m"),
    (lambda f: learned(f, "AutoEncoderTopK", {"submodule_name": "mlp"}), "x", None, "EleutherAI/pythia-70m"),
]


@pytest.mark.parametrize(("write", "folder", "hook", "model"), PLACES)
def test_what_is_known_of_its_place(write, folder, hook, model, tmp_path):
    write(tmp_path / folder)
    told: list[str] = []
    with telling(told.append):
        system = load_sae(tmp_path / folder)
    assert (system.hook_point, system.made_for) == (hook, model)
    unknown = [line for line in told if "does not say at which hook point it was made" in line]
    assert len(unknown) == (hook is None)


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        load_sae(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Harmful:
    """What no loader of weights may make."""

    def __reduce__(self):
        return (Path("made").touch, ())


def test_what_is_no_sae_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predicts = "is a transcoder, which predicts other activations than it reads, so its error here would say nothing"
    sparsify(tmp_path / "skip", extra={"W_skip": noise(D, D)})
    sparsify(tmp_path / "transcode", transcode=True)
    gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3")
    for path in ("skip", "transcode", "gemma-scope-2b-pt-transcoders/layer_3"):
        assert predicts in refusal(tmp_path / path)
    sparsify(tmp_path / "groups", activation="groupmax")
    assert "has the activation 'groupmax', which is not read: give one of 'topk'" in refusal(tmp_path / "groups")
    learned(tmp_path / "gated", "GatedAutoEncoder")
    assert "is of the kind 'GatedAutoEncoder', which is not read: AutoEncoder, TopK" in refusal(tmp_path / "gated")
    learned(tmp_path / "bare", "AutoEncoderTopK")
    (tmp_path / "bare" / "config.json").unlink()
    assert "is of a kind that config.json does not say" in refusal(tmp_path / "bare")
    sparsify(tmp_path / "several" / "layers.1")
    sparsify(tmp_path / "several" / "layers.2")
    assert "is a folder of 2 SAEs: give one of them, such as layers.1" in refusal(tmp_path / "several")
    (tmp_path / "harmful.pt").write_bytes(pickle.dumps(Harmful()))
    torch.save({"encoder.weight": Harmful()}, tmp_path / "harmful-too.pt")
    for name in ("harmful.pt", "harmful-too.pt"):
        assert "could not be read as a pickle of weights alone (another could run any code" in refusal(tmp_path / name)
    np.savez(tmp_path / "params.npz", W_enc=np.array([Harmful()], dtype=object))
    assert "could not be read as an .npz file of numbers" in refusal(tmp_path / "params.npz")
    assert not (tmp_path / "made").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no weights by name, so it is no SAE" in refusal(tmp_path / "list.pt")
    (tmp_path / "x.pth").write_bytes(b"")
    assert "is a pickle, which could run any code and is not read" in refusal(tmp_path / "x.pth")


def changed_npz(folder: Path, **changes) -> Path:
    gemma_scope(folder)
    with np.load(folder / "params.npz") as data:
        named = {name: data[name] for name in data.files} | changes
    np.savez(folder / "params.npz", **{name: value for name, value in named.items() if value is not None})
    return folder


def test_what_is_damaged_is_refused(tmp_path):
    infinite = np.full(N, np.inf, np.float32)
    for changes, sentence in (
        ({"threshold": None}, "has no threshold, so it is no SAE"),
        ({"b_dec": np.zeros(D + 1)}, r"has b_dec of shape (33,), and (32,) was wanted"),
        ({"b_enc": infinite}, "has numbers in b_enc that are not finite"),
    ):
        assert sentence in refusal(changed_npz(tmp_path / next(iter(changes)), **changes))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "b_dec" / "params.npz").read_bytes()[:500])
    assert "could not be read as an .npz file of numbers" in refusal(tmp_path / "cut.npz")
    sparsify(tmp_path / "many", k=N + 1)
    assert f"is of {N} latents and has k = {N + 1}" in refusal(tmp_path / "many")
    sparsify(tmp_path / "nothing", k=None)
    assert "does not say `k`, the latents of a token" in refusal(tmp_path / "nothing")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, a dictionary of it, and new text."""
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "gpt2")
    documents = [f"{text} {word}." for word in ("one", "two", "three") for text in tiny_models.DOCUMENTS]
    itda.train(str(home / "gpt2"), documents, home / "d", k=4, tokens=500, layer=1, context_length=24, batch_rows=2)
    (home / "new.jsonl").write_text("\n".join(json.dumps({"text": text.upper()}) for text in tiny_models.DOCUMENTS))
    return home


def test_they_stand_in_the_table(home, tmp_path, capfd):
    sparsify(tmp_path / "h.1")
    gemma_scope(tmp_path / "gemma")
    words = ["eval", str(home / "d"), str(home / "new.jsonl"), "--tokens", "200", "--ce-tokens", "0", "--no-controls"]
    words += ["--out", str(tmp_path / "out.json")]
    assert main([*words, "--sae", str(tmp_path / "h.1"), str(tmp_path / "gemma")]) == 0
    said = capfd.readouterr()
    assert "h.1" in said.out and "gemma does not say at which hook point it was made" in said.err
    found = json.loads((tmp_path / "out.json").read_text())["systems"]
    assert found["h.1"]["k"] == K and found["h.1"]["afa"]["centred"]["ratio"] > 0
    sparsify(tmp_path / "h.2")
    assert main([*words, "--sae", str(tmp_path / "h.2")]) == 2
    assert "h.2 was made for blocks.2.hook_resid_post, and the dictionary for transformer.h.1" in capfd.readouterr().err


def test_an_sae_of_the_hub(monkeypatch, tmp_path, home):
    cfg = StandardSAEConfig(d_in=D, d_sae=N, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post"))
    sae = sae_lens.SAE.get_sae_class_for_architecture("standard")(cfg)
    for i, p in enumerate(sae.parameters()):
        p.data = noise(*p.shape, seed=i)
    sae.save_model(tmp_path / "sae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(monkeypatch) as hub:
        hub.files = {f.name: f.read_bytes() for f in (tmp_path / "sae").iterdir()}
        system = load_sae("org/tiny/blocks.1")
        torch.testing.assert_close(system.run(X)[0], load_sae(tmp_path / "sae").run(X)[0])
        assert system.name == "org/tiny/blocks.1" and system.hook_point == "blocks.1.hook_resid_post"
        hub.commit = "../outside"
        with pytest.raises(InputError, match=r"it calls its commit '[.]{2}.outside'"):
            load_sae("org/tiny/blocks.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refusal("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert "is neither a local folder nor in the local cache, and the Hugging Face hub was not reached" in said


def test_names_of_the_hub():
    assert saelens_hub.parted("gpt2-small-res-jb/blocks.8.hook_resid_pre") == (
        "gpt2-small-res-jb",
        "blocks.8.hook_resid_pre",
    )
    assert saelens_hub.parted("org/name/layer_1/x") == ("org/name", "layer_1/x")
    near = refusal("gpt2-small-res-jb/blocks.8.hook_resid_pr")
    assert "has no 'blocks.8.hook_resid_pr' in its release" in near and "such as gpt2-small-res-jb/blocks.8.hoo" in near
    assert "is no folder here, and SAELens has no release 'gpt2-small-res-j' (but gpt2-small-res-jb)" in refusal(
        "gpt2-small-res-j/x"
    )
    assert "is no folder here, and SAELens has no release 'nothing-here'" in refusal("nothing-here")
    for path in ("/nothing/here/x", "./nothing", "~/x"):
        assert f"{path} is not there: give the folder of an SAE, or its name on the hub" in refusal(path)
