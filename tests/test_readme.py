"""The README is true: its Python runs, its commands exist, its file map is the package."""

import re
import subprocess
import sys
from pathlib import Path

import itda
from itda import demo
from itda.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
GUIDE = (ROOT / "docs" / "commands.md").read_text("utf-8")


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


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """As printed, with the packaged model in the place of both models, at two of its layers, and a shorter text."""
    text = (ROOT / "docs" / "notebook.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("\n".join(demo.corpus()[:30])[:6_000], "utf-8")
    code = re.sub(
        '"(distil)?gpt2"', repr(str(demo.model_path())), "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    )
    code = code.replace("layer=8", "layer=2").replace("layer=4", "layer=1").replace("threshold=0.2", "threshold=0.05")
    names = {}
    exec(code, names)  # the page's own text
    model, codes, x = (names[name] for name in ("model", "codes", "x"))
    assert names["dense"].shape == (len(codes.values), len(model)) and 0 < names["taken"] <= model.k
    assert {"the"} <= {row["label"]["token"].strip().lower() for row in names["every"]}
    assert len(names["table"]) == len(names["found"].atoms) and len(names["some"]) == 3 and len(names["both"]) > 0
    again = itda.pursue(x - model.mean, model.atoms, k=model.k)
    assert (again.indices == model.encode(x).indices).all()
    errors = [itda.metrics.fvu(x, names[name].reconstruct(x)) for name in ("best", "moved")]
    assert errors[1] < errors[0] and len(names["best"]) == len(model) // 2
    assert "⟦" in capsys.readouterr().out


def test_the_commands_exist():
    named = set(re.findall(r"`itda ([a-z]+)", TEXT))
    assert named == set(COMMANDS) == set(re.findall(r"`itda ([a-z]+)", GUIDE)) | {"demo"}
    assert set(re.findall(r"itda\.(train|decompose|build|pursue|activations|ITDA)\b", TEXT)) <= set(itda.__all__)


def test_what_is_named_is_there_once_itda_is_imported():
    """In a process of its own, where no test has imported a module yet."""
    named = sorted(set(re.findall(r"\b(itda(?:\.\w+)+)\(", TEXT + GUIDE)))
    assert {"itda.train", "itda.hook_points", "itda.interop.saelens.export"} <= set(named)
    subprocess.run([sys.executable, "-c", "\n".join(["import itda", *named])], check=True)


def test_the_file_map_is_the_package():
    guide = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Where something new goes")[0]
    named = set(re.findall(r"\b(\w+\.py)\b", guide)) - {"test_architecture.py"}
    there = {path.name for path in (ROOT / "itda").rglob("*.py")} - {"__init__.py", "__main__.py", "_version.py"}
    assert named == there


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"^(EXAMPLE|COSTS|TODO)", TEXT, re.MULTILINE)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_fits_on_two_screens():
    assert len(TEXT.splitlines()) <= 130
