"""`itda.page`: what its files say, exactly; that it is written at once or not at all; and the pages in a browser."""

import json
import os
import re
from pathlib import Path

import pytest

import itda
from itda import report
from itda.errors import InputError
from itda.pages import data, write
from tests import tiny_models

TEXTS = [f"{text} {word}." for word in ("one", "two", "three") for text in tiny_models.DOCUMENTS]
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a\u202eb", "nul\0", "\ud800 half",
           "x" * 10_000, "\U0001f600 face"]  # fmt: skip
CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "gpt2")
    itda.train(str(home / "gpt2"), TEXTS, home / "d", layer=1, k=4, n_atoms=20, tokens=300, context_length=24)
    itda.page(home / "d", home / "bare")
    itda.uses(home / "d", TEXTS, tokens=300)
    itda.page(home / "d", home / "page")
    return home


def read(folder, name):
    found = re.fullmatch(r'itda\.data\("([a-z0-9-]+)",(.*)\);\n', (folder / "data" / f"{name}.js").read_text("ascii"))
    assert found[1] == name
    return json.loads(found[2])


def utf16(text, start, end):
    return text.encode("utf-16-le")[2 * start : 2 * end].decode("utf-16-le")


def refusal(*arguments, **settings):
    with pytest.raises(InputError) as error:
        itda.page(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_files_say_what_the_dictionary_and_its_uses_say(home):
    dictionary, uses = itda.ITDA.load(home / "d"), itda.Uses.load(home / "d")
    index, atoms, texts = (read(home / "page", name) for name in ("index", "atoms-000", "texts"))
    assert index["n_atoms"] == len(atoms) == len(dictionary) and index["uses"]["tokens"] == 300
    assert index["token"] == [dictionary.labels.token(i) for i in range(len(dictionary))]
    assert list(zip(index["positive"], index["negative"], strict=True)) == [tuple(row) for row in uses.count.tolist()]
    for i, atom in enumerate(atoms):
        assert atom["label"] == dictionary.labels.describe(i)
        assert [other for other, _ in atom["nearest"]] == uses.nearest[i][uses.nearest[i] >= 0].tolist()
        assert [token for token, _ in atom["up"]] == [token["token"] for token in uses.promoted(i)["up"]]
        for negative, sign in enumerate(atom["signs"]):
            assert sum(sign["histogram"]) == uses.count[i, negative] == sum(sign["positions"])
            for said, example in zip(sign["examples"], uses.examples(i, bool(negative)), strict=True):
                interval, coefficient, text, position, start, end = said
                assert (interval, text, position) == (
                    example["interval"],
                    example["text"],
                    example["label"]["position"],
                )
                assert coefficient == pytest.approx(example["coefficient"], rel=1e-3)
                if end > start >= 0:
                    assert utf16(texts[text], start, end) == example["label"]["token"]
    keys = {(key, text) for text, row in enumerate(read(home / "page", "contexts")) for key in row[::3]}
    said = {(2 * i + n, e[2]) for i, atom in enumerate(atoms) for n in (0, 1) for e in atom["signs"][n]["examples"]}
    assert keys == said


def test_without_uses_it_shows_labels_and_says_what_to_run(home):
    assert sorted(os.listdir(home / "bare" / "data")) == ["atoms-000.js", "index.js"]
    assert read(home / "bare", "index")["uses"] is None
    said = str(itda.page(home / "d", home / "again"))
    assert "MB" in said and "itda uses" not in said


def test_texts_of_any_kind_stay_within_their_string(tmp_path):
    file = data.script("texts", HOSTILE)
    assert json.loads(file.decode("ascii").removeprefix('itda.data("texts",').removesuffix(");\n")) == HOSTILE
    assert all(32 <= byte < 127 for byte in file[:-1])


def test_anything_else_in_the_folder_is_refused_and_left(home, tmp_path):
    assert "--overwrite" in refusal(home / "d", home / "page")
    before = (home / "page" / "data" / "index.js").read_bytes()
    assert itda.page(home / "d", home / "page", overwrite=True).size > len(before)
    assert (home / "page" / "data" / "index.js").read_bytes() == before
    (tmp_path / "mine.txt").write_text("mine")
    assert "mine.txt" in refusal(home / "d", tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["mine.txt"]
    assert "is a file" in refusal(home / "d", tmp_path / "mine.txt")
    assert "folder of the dictionary" in refusal(home / "d", home / "d" / "page")
    assert not [name for name in os.listdir(home) if ".tmp-" in name]


def test_every_asset_is_there_with_the_licence_of_the_library():
    assets = Path(write.__file__).parent / "assets"
    assert sorted(os.listdir(assets)) == sorted(write.ASSETS)
    assert "Apache License" in (assets / "preact.LICENSE").read_text("utf-8")
    assert 'pages/assets/*"' in (Path(itda.__file__).parent.parent / "pyproject.toml").read_text("utf-8")


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"there is no {CHROMIUM} to open pages in")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.said, tab.asked, tab.dialogs = [], [], []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.on("dialog", lambda dialog: (tab.dialogs.append(dialog.message), dialog.dismiss()))
    yield tab
    tab.close()
    assert tab.said == [] and tab.dialogs == []


def opened(tab, folder, hash=""):
    tab.goto((folder / "index.html").as_uri() + hash)
    tab.wait_for_selector("h1")
    return tab


def wide(tab):
    return tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_it_opens_from_disk_asks_for_nothing_else_and_never_scrolls_sideways(home, tab):
    opened(tab, home / "page").wait_for_selector("[data-ready=yes]")
    assert wide(tab) <= 0
    tab.click("[data-atom]")
    tab.wait_for_selector(".examples")
    assert wide(tab) <= 0 and "#atom=" in tab.url
    at = (home / "page").as_uri() + "/"
    assert all(url.startswith((at, "data:")) for url in tab.asked) and len(tab.asked) > 6


@pytest.mark.parametrize("word", ["mouse", "th", "e"])
def test_the_search_finds_what_show_finds(home, tab, word):
    found = report.find(home / "d", word)
    wanted = {row["atom"] for row in [*found.atoms, *found.contexts]}
    opened(tab, home / "page").fill("#search", word)
    tab.wait_for_function("word => location.hash.includes('find=' + word)", arg=word)
    tab.wait_for_selector("[data-ready=yes]")
    shown = tab.eval_on_selector_all("[data-atom]", "links => links.map(link => Number(link.dataset.atom))")
    assert len(shown) == len(set(shown)) and set(shown) == wanted


def test_the_keyboard_alone_reaches_the_search_and_an_atom(home, tab):
    opened(tab, home / "page")
    for _ in range(30):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.id") == "search":
            break
    assert tab.evaluate("document.activeElement.id") == "search"
    for _ in range(30):
        tab.keyboard.press("Tab")
        if tab.evaluate("'atom' in document.activeElement.dataset"):
            break
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".examples")
    assert tab.evaluate("document.activeElement.tagName") == "H1"


def test_hostile_labels_stay_text(home, tab, tmp_path):
    itda.page(home / "d", tmp_path / "p")
    index, atoms = read(tmp_path / "p", "index"), read(tmp_path / "p", "atoms-000")
    for i, text in enumerate(HOSTILE):
        for name in ("token", "before", "after"):
            index[name][i] = atoms[i]["label"][name] = text
        atoms[i]["up"] = [[text, 1.0]]
    (tmp_path / "p" / "data" / "index.js").write_bytes(data.script("index", index))
    (tmp_path / "p" / "data" / "atoms-000.js").write_bytes(data.script("atoms-000", atoms))
    opened(tab, tmp_path / "p")
    assert wide(tab) <= 0 and tab.query_selector("img") is None
    for i in range(len(HOSTILE)):
        opened(tab, tmp_path / "p", f"#atom={i}").wait_for_selector(".facts")
        assert wide(tab) <= 0 and tab.query_selector("img, #page script") is None
        assert not re.search("[\u202e\0\ud800]", tab.text_content("main"))
    tab.goto((tmp_path / "p" / "index.html").as_uri() + "#find=%3Cimg%20src=x%20onerror=alert(1)%3E&atom=../x")
    tab.wait_for_selector("[data-ready=yes]")
    assert tab.query_selector("img") is None
