"""What `itda show` tells of an atom where `itda uses` has kept its uses: all of it, safely, at every width."""

import io
import json
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

import itda
from itda import report
from itda.errors import InputError
from tests import tiny_models

TEXTS = [f"{text} {word}." for word in ("one", "two", "three") for text in tiny_models.DOCUMENTS]
HOSTILE = ["\x1b[31mred\x1b[0m </script> [bold]x[/]", "half a pair, \u202eevil \x00 and NUL", "[link=http://x]y[/link]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "gpt2")
    itda.train(str(home / "gpt2"), TEXTS, home / "d", layer=1, k=4, n_atoms=40, tokens=400, context_length=24)
    shutil.copytree(home / "d", home / "bare")
    shutil.copytree(home / "d", home / "hostile")
    itda.uses(home / "d", TEXTS, tokens=500, batch_rows=2)
    itda.uses(home / "hostile", HOSTILE * 8, tokens=400)
    return home


def drawn(thing, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


def test_an_atom_is_told_from_what_was_kept(home):
    uses, dictionary = itda.Uses.load(home / "d"), itda.ITDA.load(home / "d")
    for atom in range(40):
        found = report.atom_report(home / "d", atom)
        seen = found.seen
        assert seen["tokens"] == 500 and seen["no_lens"] is None and len(seen["nearest"]) == 8
        for name, negative in (("positive", False), ("negative", True)):
            part, examples = seen[name], uses.examples(atom, negative)
            assert part["count"] == uses.count[atom, int(negative)] == sum(part["histogram"]["counts"])
            assert part["largest"] + part["drawn"] == examples
            assert {"up": part["up"], "down": part["down"]} == uses.promoted(atom, negative)
            for row in part["together"]:
                key = 2 * row["atom"] + row["negative"]
                at = uses.together[atom, int(negative)].tolist().index(key)
                assert row["lift"] == uses.lift[atom, int(negative), at]
                assert row["label"] == dictionary.labels.describe(row["atom"])
        json.dumps(found.to_json(), allow_nan=False)
    assert report.atom_report(home / "bare", 3).seen is None
    assert report.atom_report(dictionary, 3).seen is None  # of no folder


@pytest.mark.parametrize("width", [40, 80, 160])
def test_it_fits_into_the_terminal_and_says_what_there_is(home, width):
    for atom in range(0, 40, 7):
        found = report.atom_report(home / "d", atom)
        said = drawn(found, width)
        assert max(map(len, said.splitlines())) <= width
        flat = " ".join(said.split())
        both = found.seen["positive"]["count"] + found.seen["negative"]["count"]
        assert f"used for {both:,} of 500 tokens" in flat
        assert "promotes:" in flat and "lowers:" in flat and "nearest atoms" in flat and "coefficients" in flat
        assert "sampled tokens" not in flat


def test_find_looks_into_contexts(home):
    found = report.find(home / "d", "carpet")
    wanted = itda.Uses.load(home / "d").find("carpet")
    assert [{n: v for n, v in row.items() if n != "massive"} for row in found.contexts] == wanted and wanted
    said = drawn(found)
    assert "near it" in said and max(map(len, said.splitlines())) <= 80
    assert report.find(home / "bare", "carpet").contexts is None


def test_no_text_commands_the_terminal(home):
    for atom in range(40):
        said = drawn(report.atom_report(home / "hostile", atom))
        assert not set("\x1b\u202e\x00\r") & set(said)
    said = drawn(report.find(home / "hostile", "</script>"))
    assert not set("\x1b\u202e\x00\r") & set(said) and "script" in said


def test_an_atom_that_is_never_used_says_so(home):
    found = report.atom_report(home / "d", 0)
    none = {"count": 0, "density": 0.0, "histogram": {"edges": [], "counts": []}, "positions": [None] * 16}
    none |= {"largest": [], "drawn": [], "together": [], "up": [], "down": []}
    seen = found.seen | {"positive": none, "negative": none, "no_lens": "there is no model", "nearest": []}
    said = drawn(replace(found, seen=seen))
    assert "used for 0 of 500 tokens" in said and "not known, since there is no model" in said


def test_uses_of_another_dictionary_are_refused(home, tmp_path):
    shutil.copytree(home / "bare", tmp_path / "d")
    shutil.copytree(home / "d" / "uses", tmp_path / "d" / "uses")
    dictionary = itda.ITDA.load(tmp_path / "d")
    assert report.atom_report(tmp_path / "d", 0).seen is not None
    shutil.copytree(tmp_path / "d" / "uses", tmp_path / "uses")
    replace(dictionary, atoms=-dictionary.atoms).save(tmp_path / "d")
    shutil.copytree(tmp_path / "uses", tmp_path / "d" / "uses")
    for ask in (lambda: report.atom_report(tmp_path / "d", 0), lambda: report.find(tmp_path / "d", "a")):
        with pytest.raises(InputError, match="another dictionary"):
            ask()
