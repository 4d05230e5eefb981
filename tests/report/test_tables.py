"""Tables at every width: figures and names are whole, whatever has to give way."""

import io

import pytest
from rich.console import Console

from itda.report.hook_points import HookPoints
from itda.report.tables import LEAST, columns, room

NAMES = ["model.embed_tokens", "model.layers.N", "model.layers.N.post_feedforward_layernorm"]
FIGURES = ["0.12345", "0.123-0.125", "5,120", "99.9%"]


def drawn(thing, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(thing)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def of_figures(heads=("FVU", "95 %", "atoms", "alive")):
    table = columns(*heads, first="system", label="")
    for name in ("itda", "random tokens"):
        table.add_row(name, *FIGURES)
    return table


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_no_figure_is_cut(width):
    lines = drawn(of_figures(), width)
    said = " ".join(lines).split()
    assert all(said.count(figure) == 2 for figure in FIGURES) and all(len(line) <= width for line in lines)
    assert "…" not in " ".join(lines)


def test_a_table_that_is_too_wide_goes_on_below_with_its_names():
    assert sum("random tokens" in line for line in drawn(of_figures(), 80)) == 1
    below = drawn(of_figures(), 40)
    assert [line.split()[0] for line in below if line.strip("─")] == ["system", "itda", "random"] * 2
    assert below[1] == "─" * max(map(len, below[:4])) and below[4] == ""


@pytest.mark.parametrize("width", [44, 60, 80, 120])
def test_text_stands_below_figures_where_there_is_no_room_beside_them(width):
    table = columns("what it is", label="the same as", first="hook point", left=["what it is"])
    for name in NAMES:
        table.add_row(name, "Gemma3TextScaledWordEmbedding", "" if name.endswith("s") else "blocks.N.mlp")
    lines = drawn(table, width)
    for name in NAMES:
        assert any(line == name or line.startswith(f"{name} ") for line in lines)  # whole, and in one line
    assert sum("Gemma3TextScaledWordEmbedding" in line for line in lines) == len(NAMES)
    assert sum(line.strip() == "blocks.N.mlp" for line in lines) == 2 * (width < 100)
    assert sum("blocks.N.mlp" in line for line in lines) == 2
    assert not any(line.isspace() or not line for line in lines[:-1])  # no line for a text that is not there


def test_text_that_folds_keeps_its_column_while_there_is_room():
    table = columns("k", "fvu", label="folder", left=["k"], folds=True)
    table.add_row("10", "0.25", "a-long-folder/with-a-long-name/of-a-layer")
    beside = drawn(table, 40)
    assert len(beside) == 4 and beside[2].startswith("10   0.25   a-long-folder")
    assert drawn(table, 20)[-3].startswith("    a-long")


def test_room_is_what_is_left_or_a_line_of_its_own():
    def options(width):
        return Console(width=width).options

    assert room(options(80), 58) == 22 and room(options(58 + LEAST), 58) == LEAST
    assert room(options(60), 58) == 56 and room(options(300), 58) == 100


def test_hook_points_are_whole_at_80_columns():
    points = [
        {"name": name.replace("N", "0"), "layer": 0 if "N" in name else None, "kind": "Gemma3RMSNorm", "alias": None}
        for name in NAMES
    ]
    points[1]["alias"] = "blocks.0.hook_resid_post"
    found = HookPoints("gemma", "gemma3_text", 18, 640, points)
    for width in (60, 80):
        words = " ".join(drawn(found, width)).split()
        assert {*NAMES, "blocks.N.hook_resid_post,"} <= {*words}
