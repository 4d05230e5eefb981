"""Settings: declared once, checked by name, type and range, and shown wherever they are taken."""

import copy
import inspect
import pickle
from functools import partial

import numpy as np
import pytest

import itda
from itda.errors import InputError
from itda.settings import groups, kept, names, verbs
from itda.settings.declare import declarations

VERBS = {name: verb for name, verb in vars(verbs).items() if isinstance(verb, verbs.Verb)}
FUNCTIONS = {
    itda.activations: verbs.ACTIVATIONS,
    itda.build: verbs.BUILD,
    itda.collect: verbs.COLLECT,
    itda.compare: verbs.COMPARE,
    itda.decompose: verbs.DECOMPOSE,
    itda.decompose_all: verbs.DECOMPOSE,
    itda.diff: verbs.DIFF,
    itda.evaluate: verbs.EVALUATE,
    itda.load_model: verbs.LOAD,
    itda.sweep: verbs.SWEEP,
    itda.train: verbs.TRAIN,
    itda.uses: verbs.USES,
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_signature_has_every_setting_with_its_type_and_default(function):
    signature, verb = inspect.signature(function), FUNCTIONS[function]
    for name, declared in verb.settings.items():
        assert signature.parameters[name].default is declared.default
        assert signature.parameters[name].annotation == declared.kind
        assert f" {name} " in function.__doc__ and declared.setting.help in function.__doc__
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("verb", VERBS)
def test_every_default_passes_its_own_check_and_is_explained(verb):
    given = VERBS[verb].complete(verb, {})
    for name, declared in VERBS[verb].settings.items():
        assert given[name] == declared.default or [given[name], declared.default] == [[], ()]
        assert (declared.setting.help and declared.setting.help[0].isalnum()) or declared.setting.help[0] == "|"
        assert not declared.setting.help.endswith(".") and len(declared.heading) < 40


def test_a_setting_of_one_name_has_one_declaration_but_for_what_differs():
    """Each name stands in one group, except where it has another meaning there."""
    homes = {}
    for group in vars(groups).values():
        if isinstance(group, type) and hasattr(group, "__required_keys__") and group.__module__ == groups.__name__:
            for name in declarations(group):
                homes.setdefault(name, []).append(group.__name__)
    again = {name: found for name, found in homes.items() if len(found) > 1}
    assert set(again) <= {"controls", "device", "dtype", "k", "n_atoms", "nonneg", "seed", "tokenizer", "tokens",
                          "trust_remote_code"}, again  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"context_lenght": 64}, "`train` has no setting `context_lenght`: perhaps `context_length` was meant"),
        ({"k": "3"}, "`k` is '3': pass a whole number, 1 or more"),
        ({"k": True}, "`k` is True: pass a whole number, 1 or more"),
        ({"k": 0}, "`k` is 0: pass a whole number, 1 or more"),
        ({"k": None}, "`k` is None: pass a whole number, 1 or more"),
        ({"k": 2.5}, "`k` is 2.5: pass a whole number, 1 or more"),
        ({"threshold": float("nan")}, "`threshold` is nan"),
        ({"threshold": 10**400}, "`threshold` is 1000000"),
        ({"truncate": 1}, "`truncate` is 1: pass True or False"),
        ({"loss": "huber"}, "`loss` is 'huber'; choose one of 'relative', 'cosine', 'squared'"),
        ({"column": 3}, "`column` is 3: pass a text"),
        ({"stop": None}, "`stop` is None: pass a function"),
        ({"progress": "x"}, "`progress` is 'x': pass True or False or a function"),
        ({"hook": 3}, "`hook` is 3: pass a text"),
        ({"checkpoint_seconds": -1}, "`checkpoint_seconds` is -1"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(settings, says):
    with pytest.raises(InputError) as found:
        verbs.TRAIN.complete("train", settings)
    assert says in str(found.value) and str(found.value).endswith(".") and len(str(found.value)) < 300


def test_numbers_of_numpy_are_numbers():
    given = verbs.TRAIN.complete("train", {"k": np.int64(3), "threshold": np.float32(0.5), "pack": np.bool_(True)})
    assert (given["k"], given["threshold"], given["pack"]) == (3, 0.5, True)
    assert [type(given[name]) for name in ("k", "threshold", "pack")] == [int, float, bool]


def test_a_preset_leaves_alone_what_is_given():
    paper = verbs.TRAIN.complete("train", {"preset": "paper"})
    assert {name: paper[name] for name in verbs.PRESETS["paper"]} == verbs.PRESETS["paper"]
    given = {"preset": "paper", "loss": "relative", "truncate": False, "batch_rows": 32}
    assert {name: verbs.TRAIN.complete("train", given)[name] for name in given} == given
    with pytest.raises(InputError, match="`preset` is 'papers'; choose one of 'paper'"):
        verbs.TRAIN.complete("train", {"preset": "papers"})


def test_what_would_have_no_effect_is_refused():
    settings = verbs.COMPARE.complete("compare", {"k": 9})
    with pytest.raises(InputError, match="`k` has no effect here, since it rains: leave it out"):
        verbs.COMPARE.refuse(settings, ["tokens", "k"], "it rains")
    verbs.COMPARE.refuse(settings, ["tokens"], "it rains")


def test_functions_with_settings_travel():
    """To Ray's workers, and into partial functions."""
    for function in FUNCTIONS:
        assert pickle.loads(pickle.dumps(function)) is function and copy.deepcopy(function) is function
        assert "tokens" in inspect.signature(partial(itda.train, k=3)).parameters


def test_what_dictionaries_keep():
    assert set(kept(verbs.Text)) == set(names(verbs.Text))
    assert not set(kept(verbs.Loading))
