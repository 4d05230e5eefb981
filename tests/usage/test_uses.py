"""`itda.uses`: equal to a slow plain recount, the same bytes however it was read or interrupted, and bad input."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

import itda
from itda import beside
from itda.cli.main import main
from itda.errors import InputError, Interrupted
from itda.usage import bounded, neighbours, seen
from tests import tiny_models

TEXTS = [f"{text} {word}." for word in ("one", "two", "three", "four", "five") for text in tiny_models.DOCUMENTS]
HOW = dict(tokens=700, batch_rows=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "gpt2")
    itda.train(str(home / "gpt2"), TEXTS, home / "d", layer=1, k=4, n_atoms=40, tokens=500, context_length=24)
    itda.collect(str(home / "gpt2"), TEXTS, home / "acts", layer=1, context_length=24, batch_rows=2, tokens=700)
    itda.uses(home / "d", TEXTS, **HOW)
    return home


def fresh(home, path):
    """The dictionary of `home` in a folder of its own, without its uses."""
    shutil.copytree(home / "d", path, ignore=shutil.ignore_patterns(beside.USES))
    return path


def files(path):
    return {file.name: file.read_bytes() for file in sorted((path / beside.USES).iterdir())}


def refusal(function, *arguments, **settings):
    with pytest.raises(InputError) as error:
        function(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- what it says -----------------------------------------------------------------------------------------------------


def plain(home):
    """Every use, one after the other: {(atom, negative): [(size, prompt, position)]}, and the keys of every token."""
    model = itda.ITDA.load(home / "d")
    uses, tokens, spelt = defaultdict(list), {}, {}
    for batch in itda.Store(home / "acts"):
        codes = model.encode(batch.activations)
        for t, (indices, values) in enumerate(zip(codes.indices.tolist(), codes.values.tolist(), strict=True)):
            label = int(batch.labels.prompt[t]), int(batch.labels.position[t])
            spelt[label] = batch.labels.describe(t)
            tokens[label] = [(i, v < 0) for i, v in zip(indices, values, strict=True) if v]
            for i, v in zip(indices, values, strict=True):
                if v:
                    uses[i, v < 0].append((abs(v), *label))
    return uses, tokens, spelt


def number(prompt, position):
    """The number of a token, as docs/format.md says it, in Python's integers."""
    z, whole = (prompt << 24) + position, (1 << 64) - 1
    z = (z + 0x9E3779B97F4A7C15) & whole
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & whole
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & whole
    return z ^ z >> 31


def test_it_is_what_a_slow_plain_recount_says(home):
    uses, tokens, spelt = plain(home)
    found = itda.Uses.load(home / "d")
    assert found.tokens == len(tokens) == 700 and len(found) == 40
    assert found.about["l0"] == sum(map(len, tokens.values())) / 700
    assert found.position_tokens.tolist()[:6] == [
        sum(p == 0 or (p and p.bit_length() == i) for _, p in tokens) if i else 0 for i in range(6)
    ]
    for atom in range(40):
        for negative in (False, True):
            own, at = sorted(uses[atom, negative], key=lambda use: (-use[0], use[1:])), (atom, int(negative))
            assert found.count[at] == len(own) and found.density[at] == len(own) / 700
            wanted, _ = np.histogram([size for size, *_ in own], found.edges)
            assert found.histogram[at].tolist() == wanted.tolist()
            places = [sum(p.bit_length() == i for *_, p in own) for i in range(16)]
            assert found.positions[at].tolist() == places
            shown = found.examples(atom, negative)
            told = [(e["interval"], abs(e["coefficient"]), e["label"]["prompt"], e["label"]["position"]) for e in shown]
            assert [one[1:] for one in told if one[0] == 5] == own[:12]
            drawn = sorted(own, key=lambda use: number(*use[1:]))[:40]
            ranked = sorted(drawn)
            fifths = [
                (part, *use)
                for part in range(5)
                for use in [u for u in drawn if 5 * ranked.index(u) // len(ranked) == part][:4]
            ]
            assert sorted(fifths) == sorted(one for one in told if one[0] < 5)
            for example in shown:
                label = example["label"]
                was = spelt[label["prompt"], label["position"]]
                assert label == was and (example["coefficient"] < 0) == negative


def test_what_is_used_together_is_what_a_slow_plain_recount_says(home):
    _, tokens, _ = plain(home)
    found, counts, pairs = itda.Uses.load(home / "d"), defaultdict(int), defaultdict(int)
    for keys in tokens.values():
        for one in keys:
            counts[one] += 1
            for other in keys:
                pairs[one, other] += one != other
    beyond = 0
    for atom in range(40):
        for negative in (False, True):
            one, rows = (atom, negative), []
            for (first, other), count in pairs.items():
                if first == one and count >= neighbours.LEAST:
                    lift = count * 700 / (counts[one] * counts[other])
                    if lift > 1:
                        rows.append((-np.log(lift) / np.log(700 / count), 2 * other[0] + other[1], count, lift))
            rows = sorted(rows)[: neighbours.TOGETHER]
            kept = found.together[atom, int(negative)]
            assert kept[kept >= 0].tolist() == [row[1] for row in rows]
            assert found.together_tokens[atom, int(negative)][: len(rows)].tolist() == [row[2] for row in rows]
            assert found.lift[atom, int(negative)][: len(rows)].tolist() == pytest.approx([row[3] for row in rows])
            beyond += len(rows)
    assert beyond > 40


def test_neighbours_point_the_same_way_and_atoms_promote_what_the_model_would_say(home):
    found, dictionary = itda.Uses.load(home / "d"), itda.ITDA.load(home / "d")
    cosines = (dictionary.atoms.double() @ dictionary.atoms.double().T).fill_diagonal_(0)
    best = cosines.abs().topk(8, dim=1).indices
    assert found.nearest.tolist() == best.tolist()
    assert torch.from_numpy(found.cosine).double().allclose(cosines.gather(1, best), atol=1e-6)
    module = tiny_models.module("gpt2", len(tiny_models.tokenizer()))
    with torch.no_grad():
        norm = module.transformer.ln_f.double()
        inner = norm(dictionary.norms[:, None].double() * dictionary.atoms.double()) - norm.bias
        logits = inner @ module.lm_head.weight.double().T
    allowed = [token for token in range(logits.shape[1]) if token != 0]  # <s> is special
    logits = logits[:, allowed] - logits[:, allowed].mean(1, keepdim=True)
    for name, values in (("up", logits), ("down", -logits)):
        top = values.topk(10, dim=1)
        assert getattr(found, name).tolist() == [[allowed[i] for i in row] for row in top.indices.tolist()]
        own = torch.from_numpy(getattr(found, f"{name}_logit")).double()
        assert own.allclose(top.values if name == "up" else -top.values, atol=1e-3)
    above, below = found.promoted(7), found.promoted(7, negative=True)
    assert [row["token_id"] for row in above["up"]] == [row["token_id"] for row in below["down"]]
    assert [row["logit"] for row in above["up"]] == [-row["logit"] for row in below["down"]]
    words = tiny_models.tokenizer()
    assert above["up"][0]["token"] == words.decode([above["up"][0]["token_id"]])


def test_find_looks_at_tokens_and_their_contexts(home):
    found = itda.Uses.load(home / "d")
    rows = found.find("  MOUSE ")
    assert rows and {row["match"] for row in rows} == {"used on it", "near it"}
    for row in rows:
        label = row["example"]["label"]
        around = label["before"][-60:] + label["token"] + label["after"][:30]
        assert "mouse" in around
        on_it = [e for e in found.examples(row["atom"], row["negative"]) if touches(e["label"], "mouse")]
        assert (row["match"] == "used on it") == bool(on_it)
        if on_it:
            assert row["examples"] == len({(e["text"], e["label"]["position"]) for e in on_it})
    assert [row["match"] for row in rows] == sorted((row["match"] for row in rows), reverse=True)
    assert found.find("no such words") == []
    assert "characters" in refusal(found.find, "  ")


def touches(label, word):
    """Whether an occurrence of `word` and the token have a character in common."""
    text, start = label["before"] + label["token"] + label["after"], len(label["before"])
    end = start + len(label["token"])
    return any(text[i : i + len(word)] == word and i < end and start < i + len(word) for i in range(len(text)))


# -- the same however it came -----------------------------------------------------------------------------------------


def test_no_order_and_no_batches_matter():
    generator = np.random.default_rng(0)
    n, k, tokens = 30, 5, 400
    indices = np.stack([generator.permutation(n)[:k] for _ in range(tokens)])
    values = generator.integers(-3, 4, (tokens, k)).astype(np.float32)  # with many ties, and zeros
    labels = itda.Labels.counted(0, tokens)
    labels = replace(labels, prompt=np.arange(tokens) // 20, position=np.arange(tokens) % 20)
    states = []
    for size, order in [(400, "as they are"), (1, "as they are"), (7, "mixed"), (64, "reversed")]:
        every = {"as they are": np.arange(tokens), "reversed": np.arange(tokens)[::-1]}.get(order)
        every = generator.permutation(tokens) if every is None else every
        one = seen.Seen(n, k, -8)
        for start in range(0, tokens, size):
            some = every[start : start + size].copy()
            one.add(itda.Codes(torch.from_numpy(indices[some]), torch.from_numpy(values[some]), n), labels[some])
        two = seen.Seen(n, k, -8)
        two.restore(one.tensors())
        two.add(itda.Codes(torch.from_numpy(indices[:0]), torch.from_numpy(values[:0]), n), labels[:0])
        for part in (one.largest, two.drawn):
            assert [a.tolist() for a in part.all()] == [a.tolist() for a in getattr(one, _name(one, two, part)).all()]
        states.append({name: tensor.tolist() for name, tensor in two.tensors().items()} | {"all": two.largest.all()})
    for state in states[1:]:
        for name in ("histogram", "places", "token_places", "counts", "sample.order", "sample.keys"):
            assert state[name] == states[0][name], name
        assert [a.tolist() for a in state["all"]] == [a.tolist() for a in states[0]["all"]]


def _name(one, two, part):
    return "largest" if part in (one.largest, two.largest) else "drawn"


def test_more_tokens_than_are_sampled_are_a_sample(monkeypatch):
    monkeypatch.setattr(seen, "TOKENS", 50)
    prompt, position = np.arange(300) // 10, np.arange(300) % 10
    wanted = sorted(range(300), key=lambda t: number(int(prompt[t]), int(position[t])))[:50]
    for size in (1, 13, 300):
        one = seen.Sample(2)
        for start in range(0, 300, size):
            some = slice(start, start + size)
            one.add(np.arange(300)[some, None] * [1, 1], prompt[some], position[some])
        assert one.all()[:, 0].tolist() == wanted


def test_numbers_of_tokens_are_those_of_the_format():
    prompt, position = np.array([0, 1, 5, 2**30]), np.array([0, 3, 127, 2**20])
    assert bounded.mixed(prompt, position).tolist() == [number(*map(int, pair)) for pair in zip(prompt, position)]  # noqa: B905


def test_activations_on_disk_give_the_same(home, tmp_path):
    """All but where they are from, which the manifest says; and with the model what atoms promote too."""
    whole = files(home / "d")
    bare, full = fresh(home, tmp_path / "bare"), fresh(home, tmp_path / "full")
    found = itda.uses(bare, home / "acts", tokens=700)
    assert "without the model" in found.about["no_lens"] and found.up.shape == (40, 0)
    assert itda.uses(full, home / "acts", tokens=700, model=str(home / "gpt2")).about["no_lens"] is None
    for name in beside.USES_TABLES:
        assert files(full)[name] == whole[name], name
        assert (files(bare)[name] == whole[name]) == (name not in ("atoms.parquet", "tokens.parquet"))
    assert found.nearest.tolist() == itda.Uses.load(home / "d").nearest.tolist()


@pytest.mark.parametrize("data", ["texts", "acts"])
def test_an_interrupted_pass_gives_the_same_bytes(data, home, tmp_path):
    source, how = (TEXTS, HOW) if data == "texts" else (home / "acts", {"tokens": 700})
    whole, parts = fresh(home, tmp_path / "whole"), fresh(home, tmp_path / "parts")
    itda.uses(whole, source, **how)
    stops, before = 0, 0
    while True:
        asked = iter([False] * (stops % 3))
        try:
            itda.uses(parts, source, stop=lambda: next(asked, True), **how)  # noqa: B023
            break
        except Interrupted as error:
            reached = error.tokens
        assert reached >= before and (parts / "uses" / beside.USES_STATE).is_file() and stops < 200
        before, stops = reached, stops + 1
        if before == 700:  # what comes after the last token is begun anew
            itda.uses(parts, source, **how)
            break
    assert stops > 8
    assert files(parts) == files(whole)


def test_one_killed_at_any_writing_goes_on_to_the_same_bytes(home, tmp_path, monkeypatch):
    from itda.usage import texts, writing

    whole, parts = files(home / "d"), fresh(home, tmp_path / "parts")
    written = []
    for module in (texts, writing, beside_unfinished()):
        original = module.write_file

        def killing(path, *rest, _original=original):
            if len(written) == limit[0]:
                raise RuntimeError("killed")
            written.append(path)
            _original(path, *rest)

        monkeypatch.setattr(module, "write_file", killing)
    for kill in (*range(1, 13), 25, 26):
        limit = [kill]
        written.clear()
        shutil.rmtree(parts / "uses", ignore_errors=True)
        try:
            itda.uses(parts, TEXTS, checkpoint_seconds=0.0 if kill % 2 else 30.0, **HOW)
        except RuntimeError:
            itda.ITDA.load(parts).save(tmp_path / "elsewhere")  # the dictionary is untouched
            limit = [10**6]
            itda.uses(parts, TEXTS, **HOW)
        assert files(parts) == whole, kill
        if kill % 2 == 0 and len(written) < kill:
            break


def beside_unfinished():
    from itda.dictionary import unfinished

    return unfinished


# -- the folder -------------------------------------------------------------------------------------------------------


def test_uses_go_when_the_dictionary_is_replaced(home, tmp_path):
    path = fresh(home, tmp_path / "d")
    itda.uses(path, TEXTS, **HOW)
    assert itda.Uses.exist(path)
    itda.ITDA.load(path).save(path)
    assert not (path / "uses").exists()
    (path / "uses").mkdir()
    (path / "uses" / "atoms.parquet").write_text("somebody's own")
    assert "not part of an ITDA" in refusal(itda.ITDA.load(path).save, path)
    assert "no folder of uses" in refusal(itda.uses, path, TEXTS)


def test_the_same_call_again_reads_nothing(home, monkeypatch):
    monkeypatch.setattr(seen.Seen, "add", lambda *_: pytest.fail("it was read again"))
    assert itda.uses(home / "d", TEXTS, **HOW).to_json() == itda.Uses.load(home / "d").to_json()


def test_other_settings_want_overwrite(home, tmp_path):
    path = fresh(home, tmp_path / "d")
    first = itda.uses(path, TEXTS, tokens=200)
    assert "tokens = 200, and now it is 300" in refusal(itda.uses, path, TEXTS, tokens=300)
    assert itda.Uses.load(path).tokens == first.tokens == 200
    assert itda.uses(path, TEXTS, tokens=300, overwrite=True).tokens == 300
    with pytest.raises(Interrupted):
        itda.uses(path, TEXTS, tokens=400, overwrite=True, stop=lambda: True)
    assert itda.Uses.load(path).tokens == 300  # what was there stays until the other is whole
    assert "unfinished" in refusal(itda.uses, path, TEXTS, tokens=400, k=3)
    assert itda.uses(path, TEXTS, tokens=500, overwrite=True).tokens == 500


def test_a_pass_may_get_another_end_before_it_has_reached_one(home, tmp_path):
    whole, path = fresh(home, tmp_path / "whole"), fresh(home, tmp_path / "d")
    itda.uses(whole, TEXTS, tokens=301, batch_rows=2)
    asked = iter([False] * 3)
    with pytest.raises(Interrupted) as stopped:
        itda.uses(path, TEXTS, batch_rows=2, stop=lambda: next(asked, True), tokens=700)
    assert 100 < stopped.value.tokens < 301
    assert f"has read {stopped.value.tokens}" in refusal(itda.uses, path, TEXTS, batch_rows=2, tokens=100)
    itda.uses(path, TEXTS, batch_rows=2, tokens=301)
    assert files(path) == files(whole)
    path = fresh(home, tmp_path / "cut")
    with pytest.raises(Interrupted) as stopped:
        itda.uses(path, TEXTS, tokens=10, stop=lambda: True)
    assert stopped.value.tokens == 10  # in the midst of a row
    assert "has read 10 tokens of 10, and 20" in refusal(itda.uses, path, TEXTS, tokens=20)


def test_bad_input_is_said_in_one_sentence(home, tmp_path):
    path = fresh(home, tmp_path / "d")
    assert "no folder" in refusal(itda.uses, tmp_path / "nowhere", TEXTS)
    assert "has no uses" in refusal(itda.Uses.load, path)
    assert "no valid token" in refusal(itda.uses, path, ["", "x"], context_length=1 + 1, bos="never", batch_rows=1)
    tiny_models.save("gpt2", tmp_path / "other", seed=1)
    assert "weights" in refusal(itda.uses, path, TEXTS, model=str(tmp_path / "other"))
    itda.collect(str(tmp_path / "other"), TEXTS, tmp_path / "acts", layer=1, tokens=100, context_length=24)
    assert "weights" in refusal(itda.uses, path, tmp_path / "acts")
    assert "`k` is" in refusal(itda.uses, path, TEXTS, k=0)
    assert "no.txt" in refusal(itda.uses, path, str(tmp_path / "no.txt"))


def test_damaged_uses_and_those_of_another_dictionary_are_refused(home, tmp_path):
    path = fresh(home, tmp_path / "d")
    itda.uses(path, TEXTS, **HOW)
    for name in (*beside.USES_TABLES, beside.USES_MANIFEST):
        file = path / "uses" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        good = file.read_bytes()
        file.write_bytes(data)
        assert "itda uses" in refusal(itda.Uses.load, path), name
        file.write_bytes(good)
    kept = tmp_path / "kept"
    shutil.copytree(path / "uses", kept)
    dictionary = itda.ITDA.load(path)
    atoms = dictionary.atoms.clone()
    atoms[[0, 1]] = atoms[[1, 0]]
    replace(dictionary, atoms=atoms).save(path)
    shutil.copytree(kept, path / "uses")
    assert "another dictionary" in refusal(itda.Uses.load, path)
    assert "another dictionary" in refusal(itda.uses, path, TEXTS, **HOW)


def test_a_place_that_cannot_be_written_is_said(home, tmp_path, monkeypatch):
    path = fresh(home, tmp_path / "d")

    def denied(self, *rest, **more):
        if self.name == "uses":
            raise PermissionError(13, "Permission denied", str(self))
        return made(self, *rest, **more)

    made = type(path).mkdir
    monkeypatch.setattr(type(path), "mkdir", denied)
    assert "Permission denied" in refusal(itda.uses, path, TEXTS)


HOSTILE = ["\x1b[31mred\x1b[0m </script>", "[bold red]loud[/] \u202eevil", "half \ud83d of a pair, NUL \x00 in it"]


def test_hostile_text_is_kept_and_shown_as_text(home, tmp_path, capsys):
    path = fresh(home, tmp_path / "d")
    found = itda.uses(path, HOSTILE * 3, tokens=300)
    texts = {found.row_of(i)["text"] for i in range(len(found._texts))}
    assert any("</script>" in text for text in texts) and any("\x00" in text for text in texts)
    assert found.find("</script>") or found.find("script")
    json.dumps(found.examples(0) + found.examples(0, True))
    assert main(["show", str(path), "--atom", "0"]) == 0
    assert not set("\x1b\u202e\x00") & set(capsys.readouterr().out)


def test_the_command(home, tmp_path, capsys):
    path = fresh(home, tmp_path / "d")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS))
    assert main(["uses", str(path), str(text), "--tokens", "300", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == 300 and said["no_lens"] is None and said["settings"]["tokens"] == 300
    assert main(["uses", str(path), str(text), "--tokens", "300"]) == 0
    out = capsys.readouterr().out
    assert "300 tokens" in out and "promotes" in out
