"""Whatever is passed to a public function in place of what it wants, the answer is one sentence."""

import contextlib
import inspect
import io
from pathlib import Path

import numpy as np
import pytest
import torch

import itda
from itda import interop, locks, metrics, report, similarity
from tests import tiny_models
from tests.untyped import untyped

WRONG = {
    "none": None,
    "whole": 5,
    "number": 1.5,
    "text": "no such thing",
    "bytes": b"x",
    "list": [],
    "dict": {},
    "object": object(),
    "flag": True,
    "array": np.zeros((2, 3)),
    "tensor": torch.zeros(2),
    "function": len,
    "nested": [[None]],
    "nan": float("nan"),
}
SKIPPED = {"progress", "stop", "token", "private", "cache_dir", "local_files_only", "max_gram_bytes"}  # of no type, hub


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What a function would want, by the name of its argument, and the functions by name."""
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "model")
    (home / "text.txt").write_text("some words here " * 30, "utf-8")
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    model = itda.build([x], k=2, threshold=0.2)
    model.save(home / "itda")
    codes = model.encode(x)
    values = {
        "x": x,
        "atoms": model.atoms,
        "k": 2,
        "stream": [x],
        "dictionary": model,
        "text": "some words",
        "texts": ["some words"],
    }
    values |= {"model": "model", "data": "text.txt", "out": "out", "path": "saved", "candidates": model, "n_atoms": 3}
    values |= {"atom": 0, "a": model.labels, "b": model.labels, "X": x, "Y": x, "models": [model, model]}
    values |= {"base": "model", "tuned": "model", "repo_id": "a/b", "repo_or_path": "itda", "codes": codes, "hooks": 0}
    values |= {"similarities": {("a", "b"): np.eye(3)}, "anchors": [1, 2], "size_a": 3, "size_b": 3, "n": 10}
    values |= {"a_in_b": model.atoms, "b_in_a": model.atoms, "x_hat": x, "device": "cpu", "labels": model.labels}
    values["settings"] = {"model": "model", "data": "text.txt", "layer": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield model, values


def functions(model):
    """Every public function, by its name."""
    found = {name: getattr(itda, name) for name in itda.__all__}
    found |= {f"report.{name}": getattr(report, name) for name in report.__all__}
    found |= {f"similarity.{name}": getattr(similarity, name) for name in similarity.__all__}
    found |= {"refine.select": itda.refine.select, "refine.refine": itda.refine.refine, "metrics.fvu": metrics.fvu}
    found |= {"saelens.export": interop.saelens.export, "saelens.load_sae": interop.saelens.load_sae}
    found = {name: f for name, f in found.items() if inspect.isfunction(f)}
    found |= {f"ITDA.{name}": getattr(itda.ITDA, name) for name in ("load", "of", "from_pretrained")}
    for name in ("save", "encode", "decode", "reconstruct", "to", "push_to_hub"):
        found[f"model.{name}"] = getattr(model, name)
    return found | {"Store": itda.Store}


NAMES = sorted(functions(itda.ITDA))


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_type_is_told_in_one_sentence(name, good):
    model, values = good
    function, raw = functions(model)[name], []
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    wanted = {p.name: values[p.name] for p in parameters if p.default is p.empty and p.name != "self"}
    if name.startswith("similarity.") and {"codes", "support"} & set(name.replace(".", "_").split("_")):
        wanted |= {part: values["codes"] for part in ("a", "b") if part in wanted}
    for p in parameters:
        if p.name in SKIPPED or (p.name == "data" and name not in ("collect", "activations")):
            continue  # of what is read, one function stands for all
        declared = getattr(function, "verb", None) and function.verb.settings.get(p.name)
        if declared and set(declared.kinds) <= {bool, int, float, str} | {
            k for k in declared.kinds if "Literal" in str(k)
        }:
            continue  # a setting that is checked by its type, as tests of `settings` show
        for kind, value in WRONG.items():
            if value is None and p.default is None:
                continue
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    function(**wanted | {p.name: value})
            except itda.InputError:
                continue
            except Exception as error:
                if "TypeCheckError" not in type(error).__name__:
                    raw.append(f"{p.name}={kind}: {type(error).__name__}: {str(error)[:80]}")
    assert not raw, "\n".join(raw)


def test_each_argument_is_named_with_what_is_wanted(good):
    for call, said in (
        (lambda: itda.ITDA.load(None), "`path` is None: pass a path or a name, as text."),
        (lambda: itda.train("model", "text.txt", 5, layer=0), "`out` is 5: pass a path or a name, as text."),
        (
            lambda: untyped(itda.evaluate)("itda", "text.txt", controls=5),
            "`controls` is 5: pass True or False or a list",
        ),
        (lambda: itda.evaluate("itda", "text.txt", systems=5), "`systems` is 5: pass a list."),
        (lambda: interop.saelens.export(None, "out"), "`dictionary` is None: pass an ITDA"),
        (lambda: itda.compare(["model"] * 2, "text.txt", names=5), "`names` is 5: pass a list of texts."),
    ):
        with pytest.raises(itda.InputError) as error:
            call()
        assert said in str(error.value)


def test_arrays_in_place_of_tensors_are_called_arrays(tmp_path):
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    model = itda.build([x], k=2, threshold=0.2)
    model.atoms = model.atoms.numpy()
    with pytest.raises(itda.InputError, match=r"`atoms` is of type ndarray, and a torch tensor .*`torch.from_numpy`"):
        model.save(tmp_path / "d")
    model.atoms, model.labels = torch.from_numpy(model.atoms), None
    with pytest.raises(itda.InputError, match="`labels` is of type NoneType, and Labels was wanted"):
        model.save(tmp_path / "d")


@pytest.mark.parametrize("path", [None, 5, [], object()], ids=lambda path: type(path).__name__)
def test_a_store_of_what_is_no_path(path):
    with pytest.raises(itda.InputError, match=r"`path` is .*: pass a path or a name, as text"):
        itda.Store(path)


SURROGATE = "\ud800"


@pytest.mark.parametrize(
    "call",
    [
        lambda: itda.Store(SURROGATE),
        lambda: itda.ITDA.load(SURROGATE),
        lambda: itda.ITDA.of(SURROGATE),
        lambda: itda.ITDA.from_pretrained(SURROGATE),
        lambda: itda.evaluate(SURROGATE, ["some words"]),
        lambda: itda.sweep({"model": "model", "data": "text.txt", "layer": 1}, out=SURROGATE),
    ],
)
def test_a_path_with_a_lone_surrogate(call):
    with pytest.raises(itda.InputError, match=r"The path '\\ud800' is not UTF-8 \(a lone surrogate is in it\): choose"):
        call()
    assert locks.stamp_of(Path(SURROGATE)) is None


def test_names_and_tensors_that_are_none(good):
    model, _ = good
    with pytest.raises(itda.InputError, match=r"is a dictionary and .* is not: compare dictionaries only"):
        itda.compare([model, "a" * 5000])
    with pytest.raises(itda.InputError, match="stream is of type Tensor of a single number: pass an iterable"):
        itda.build(torch.tensor(3))
    with pytest.raises(itda.InputError, match="`data` is of type Tensor, but texts in an order were wanted"):
        itda.activations("model", torch.tensor(3), layer=1)
    for call in (itda.ITDA.standardised, itda.ITDA.restored):
        for wrong, came in ((None, "is None"), (5, "is 5"), (torch.zeros(3), r"has shape \(3,\)")):
            with pytest.raises(itda.InputError, match=rf"`x` {came}: pass a tensor of activations \(\.\.\., 8\)"):
                untyped(call)(model, wrong)
