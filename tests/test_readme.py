"""The README is true: its Python runs, its commands exist, its file map is the package."""

import re
from pathlib import Path

import itda
from itda import demo
from itda.cli import COMMANDS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    """As printed, with the packaged model in the place of gpt2 and a shorter text."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("\n".join(demo.corpus()[:30])[:15_000], "utf-8")
    code = code.replace('"gpt2"', repr(str(demo.model_path()))).replace("layer=8", "layer=2")
    code = code.replace("threshold=0.2", "threshold=0.05")
    assert len([line for line in code.splitlines() if line.strip()]) <= 9
    names = {}
    exec(code, names)  # the README's own text
    assert len(names["model"]) > 17
    assert names["x_hat"].shape[1] == names["model"].d
    printed = capsys.readouterr().out
    assert "coefficient" in printed
    assert "⟦" in printed


def test_the_commands_exist():
    named = set(re.findall(r"`itda (\w+)", TEXT))
    assert named == set(COMMANDS)
    assert set(re.findall(r"itda\.(train|decompose|build|pursue|activations|ITDA)\b", TEXT)) <= set(itda.__all__)


def test_the_file_map_is_the_package():
    (tree,) = re.findall(r"```\nitda/\n(.*?)```", TEXT, re.DOTALL)
    named = set(re.findall(r"\b(\w+\.py)\b", tree)) - {"__init__.py"}
    there = {path.name for path in (ROOT / "itda").rglob("*.py")} - {"__init__.py", "__main__.py", "_version.py"}
    assert named == there


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"^(EXAMPLE|COSTS|TODO)", TEXT, re.MULTILINE)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / link).exists(), link
