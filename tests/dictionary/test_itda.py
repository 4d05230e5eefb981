"""The dictionary and its folder: the format's bytes, round trips, damage, kills, a full disk, the hub."""

import base64
import errno
import hashlib
import inspect
import itertools
import json
import os
import re
import shutil
import struct
import tempfile
import threading
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import itda
from itda import disk
from itda.codes import Codes
from itda.dictionary import folder, tables
from itda.dictionary import itda as dictionaries
from itda.dictionary.itda import ITDA, Sample
from itda.errors import InputError
from itda.labels import Labels
from itda.pursuit import normalize
from tests.faulty_disk import Killed, Machine

GOLDEN = Path(__file__).parent / "golden" / "tiny"
ALL = (folder.MANIFEST, folder.ATOMS, folder.LABELS, folder.SAMPLE)


def golden() -> ITDA:
    """What `tests/dictionary/golden/tiny` holds; `golden().save(GOLDEN)` wrote it."""
    text = "Der Käse 🧀\twar gut."
    integers = ([0, 0, 7], [3, 5, 9], [17, 40, 2], [0, 0, -1], [4, 9, -1], [8, 10, -1], [0, 0, -1])
    labels = Labels(*(np.array(column) for column in integers), texts=(text,), text_start=np.array([0]))
    atoms = torch.tensor([[0.6, 0.8, 0, 0], [0, 0, 1, 0], [0.5, -0.5, 0.5, -0.5]])
    codes = Codes(torch.tensor([[1, 0], [2, 1]]), torch.tensor([[1.5, 0.0], [-0.25, 3.0]]), 3)
    cfg = {"k": 2, "loss": "relative", "threshold": 0.2, "model": {"id": "org/tiny", "hook_point": "layers.1"}}
    losses = torch.tensor([float("nan"), 0.5, 0.25])
    sample = Sample(labels[1:], codes, torch.tensor([0.125, 0.75]))
    return ITDA(atoms, labels, 2, torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6, 7]), losses, cfg, sample)


def random_itda(n: int, d: int, seed: int, texts=("The quick brown fox",), centred=True, sampled=True) -> ITDA:
    rng = np.random.default_rng(seed)

    def labels(n):
        row = rng.integers(-1, len(texts), n)
        lengths = np.array([len(texts[r]) if r >= 0 else 0 for r in row], int)
        origin = rng.integers(0, 9, len(texts))
        a, b = (rng.integers(0, lengths + 1) for _ in range(2))
        start, end = (np.where(row < 0, -1, f(a, b) + np.append(origin, 0)[row]) for f in (np.minimum, np.maximum))
        prompt, position = rng.integers(0, 2**40, n), rng.permutation(n)
        return Labels(prompt, position, rng.integers(0, 9, n), row, start, end, row, tuple(texts), origin)

    def vector(*shape):
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    losses = vector(n)
    losses[:1] = float("nan")
    sample = Sample(labels(5), Codes(torch.from_numpy(rng.integers(0, max(n, 1), (5, 3))), vector(5, 3), n), vector(5))
    atoms, mean = normalize(vector(n, d)), vector(d) if centred else None
    return ITDA(atoms, labels(n), 3, mean, vector(n), losses, {"k": 3, "tokens": 7}, sample if sampled else None)


def same(a: ITDA, b: ITDA) -> bool:
    """Whether two dictionaries are the same bit for bit, and render the same."""

    def values(m):
        tensors = [m.atoms, m.norms, m.losses] + ([] if m.mean is None else [m.mean])
        labels = [m.labels]
        if m.sample is not None:
            tensors += [m.sample.codes.indices, m.sample.codes.values, m.sample.losses]
            labels.append(m.sample.labels)
        arrays = [getattr(x, name) for x in labels for name in tables.COLUMNS]
        texts = [x.context(i) for x in labels for i in range(len(x))]
        return [(x.dtype, *x.shape, x.numpy().tobytes()) for x in tensors], [x.tolist() for x in arrays], texts

    return values(a) == values(b) and (a.k, a.cfg) == (b.k, b.cfg)


def read(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def write(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def sign(path: Path, **changes) -> None:
    """Make the manifest of a folder that was tampered with agree with its files (docs/format.md)."""
    manifest = json.loads((path / "cfg.json").read_bytes()) | changes
    for name in ALL[1:]:
        if name in manifest["files"] and (path / name).exists():
            data = (path / name).read_bytes()
            manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    blank = json.dumps(manifest | {"sha256": "0" * 64}).encode()
    (path / "cfg.json").write_bytes(blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1))


# -- the format -------------------------------------------------------------------------------------------------------


def test_golden_bytes(tmp_path):
    """The bytes of version 1, from the object that was saved and from the one loaded back."""
    import pyarrow as pa
    from pyarrow import parquet

    assert same(ITDA.load(GOLDEN), golden())
    for i, model in enumerate((golden(), ITDA.load(GOLDEN))):
        model.save(tmp_path / str(i))
        new, old = read(tmp_path / str(i)), read(GOLDEN)
        assert set(new) == set(old) == set(ALL)
        assert new[folder.ATOMS] == old[folder.ATOMS]
        for name in (folder.LABELS, folder.SAMPLE):
            a, b = (parquet.read_table(p / name) for p in (tmp_path / str(i), GOLDEN))
            assert a.schema.equals(b.schema, check_metadata=True)
            assert a.equals(b)
            assert a.schema.metadata is None  # nothing of pandas or Arrow in it
        # A parquet footer names the pyarrow that wrote it, so these bytes, and their digests in the manifest, can
        # only be the same with the same pyarrow; with another one they are left out of the comparison.
        if parquet.read_metadata(GOLDEN / folder.LABELS).created_by.endswith(f"version {pa.__version__}"):
            assert new == old
        manifests = [json.loads(files["cfg.json"]) for files in (new, old)]
        for manifest in manifests:
            del manifest["sha256"], manifest["files"][folder.LABELS], manifest["files"][folder.SAMPLE]
        assert list(manifests[0].items()) == list(manifests[1].items())


def test_independent_reader():
    """docs/format.md is enough to read a dictionary with the standard library."""
    cfg_bytes = (GOLDEN / "cfg.json").read_bytes()
    cfg = json.loads(cfg_bytes)
    assert (cfg["format"], cfg["version"]) == ("itda", 1)
    blank = cfg_bytes.replace(cfg["sha256"].encode(), b"0" * 64, 1)
    assert hashlib.sha256(blank).hexdigest() == cfg["sha256"]
    data = (GOLDEN / "atoms.safetensors").read_bytes()
    assert cfg["files"]["atoms.safetensors"] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (length,) = struct.unpack_from("<Q", data)
    header, tensors = json.loads(data[8 : 8 + length]), {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        assert entry["dtype"] == "F32"
        tensors[name] = np.frombuffer(data[start:end], "<f4").reshape(entry["shape"])
    assert tensors["atoms"].shape == (cfg["n_atoms"], cfg["d"]) == (3, 4)
    assert tensors["atoms"].tolist() == golden().atoms.tolist()
    assert tensors["mean"].tolist() == [1, 2, 3, 4]
    assert np.isnan(tensors["losses"][0])


def test_safetensors_bytes_are_those_of_the_library():
    tensors = {
        "é": torch.zeros(0, 3), "b": torch.tensor(3), "c": torch.arange(3, dtype=torch.uint8),
        "h": torch.ones(3, dtype=torch.bfloat16), "t": torch.randn(3, 4).t(), "f": torch.tensor([True]),
    }  # fmt: skip
    for some in ({}, golden_tensors(), {k: v.contiguous() for k, v in tensors.items()}):
        assert b"".join(map(bytes, disk.safetensors_chunks(some, {"a": "1"}))) == safetensors.torch.save(
            some, {"a": "1"}
        )
    back = safetensors.torch.load(b"".join(map(bytes, disk.safetensors_chunks(tensors))))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def golden_tensors() -> dict[str, torch.Tensor]:
    return {name: getattr(golden(), name).clone() for name in ("atoms", "norms", "losses", "mean")}


@settings(max_examples=60, deadline=None)
@example(n=0, d=1, seed=0, texts=[""], centred=True, sampled=True)
@given(
    n=st.integers(0, 50),
    d=st.integers(1, 16),
    seed=st.integers(0, 2**32),
    texts=st.lists(st.builds(lambda t, long: t * (300 if long else 1), st.text(), st.booleans()), min_size=1),
    centred=st.booleans(),
    sampled=st.booleans(),
)
def test_round_trip(n, d, seed, texts, centred, sampled):
    model = random_itda(n, d, seed, texts, centred, sampled)
    with tempfile.TemporaryDirectory() as temporary:
        one, two = Path(temporary, "one"), Path(temporary, "two", "deep")
        model.save(one)
        loaded = ITDA.load(one)
        assert same(loaded, model)
        loaded.save(two)
        assert read(two) == read(one)


def test_texts_that_utf8_cannot_hold_keep_their_length(tmp_path):
    model = random_itda(9, 2, 0, ("half \ud83e a pair",))
    model.save(tmp_path / "x")
    labels = ITDA.load(tmp_path / "x").labels
    for i in range(9):
        assert "".join(labels.context(i)) == "".join(model.labels.context(i)).replace("\ud83e", "�")


def test_equal_texts_are_shared(tmp_path):
    model = golden()
    model.save(tmp_path / "x")
    labels = ITDA.load(tmp_path / "x").labels
    assert labels.row.tolist() == [0, 0, -1]
    assert len(labels.texts) == 1


def test_cfg_is_saved_as_json(tmp_path):
    model = replace(golden(), cfg={"a": (1, np.int64(2)), "fvu": float("nan"), "t": np.float32(0.5), "k": 99})
    model.save(tmp_path / "x")
    assert ITDA.load(tmp_path / "x").cfg == {"k": 2, "a": [1, 2], "fvu": None, "t": 0.5}  # the object's own k counts
    for cfg, words in (
        ({"a": {"b": [torch.ones(1)]}}, "`cfg['a']['b'][0]` is a Tensor"),
        ({"tokens": -1}, "its `cfg` says `tokens` = -1, but a count was wanted: mend that entry"),
        ({"files": 1}, "may not have the keys format, version"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            replace(golden(), cfg=cfg).save(tmp_path / "y")
    assert os.listdir(tmp_path) == ["x"]


# -- the object -------------------------------------------------------------------------------------------------------


def test_decode_wants_codes():
    model = itda.build(torch.randn(50, 6), k=3)
    codes = model.encode(torch.randn(4, 6))
    with pytest.raises(InputError, match="`codes` is of type Tensor: pass what `encode` or `pursue` gave"):
        inspect.unwrap(itda.ITDA.decode)(model, codes.dense())
    assert repr(codes) == f"Codes(4 activations, k=3, {len(model)} atoms)"
    assert repr(model.encode(torch.randn(6))) == f"Codes(one activation, k=3, {len(model)} atoms)"


def test_encode_and_decode():
    model = random_itda(6, 4, 1)
    x = model.atoms * model.norms.abs()[:, None] + model.mean  # the activations that the atoms were made from
    codes = model.encode(x, k=1)
    assert codes.indices[:, 0].tolist() == list(range(6))
    torch.testing.assert_close(codes.values[:, 0], model.norms.abs())
    torch.testing.assert_close(model.decode(codes), x)
    torch.testing.assert_close(model.reconstruct(x, k=1), x)
    assert model.encode(x.numpy()).values.shape == (6, 3)  # k of the dictionary
    assert model.encode(x.bfloat16()).values.dtype == torch.float32
    assert model.reconstruct(x.double().reshape(2, 3, 4)).dtype == torch.float64
    x = x + torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert (model.encode(x).values < 0).any()
    assert (model.encode(x, nonneg=True).values >= 0).all()
    assert (replace(model, cfg={"nonneg": True}).encode(x).values >= 0).all()
    omp = replace(model, cfg={"method": "omp"}).encode(x).values
    assert torch.equal(omp, model.encode(x, method="omp").values)
    assert not torch.equal(omp, model.encode(x).values)
    plain = replace(model, mean=None)
    torch.testing.assert_close(plain.decode(plain.encode(x)) + model.mean, model.decode(plain.encode(x)))
    said = r"`x` has shape \(2, 5\): pass activations \(\.\.\., 4\), as ITDA\(6 atoms, d=4, k=3, centred\) encodes"
    with pytest.raises(InputError, match=said):
        model.encode(torch.zeros(2, 5))


def test_small_things():
    model = golden()
    assert (len(model), model.n_atoms, model.d) == (3, 3, 4)
    assert repr(model) == "ITDA(3 atoms, d=4, k=2, centred, org/tiny, layers.1)"
    moved = model.to("meta")
    assert {t.device.type for t in (moved.atoms, moved.norms, moved.losses, moved.mean)} == {"meta"}
    assert model.atoms.device.type == "cpu"
    assert replace(model, mean=None).to("cpu").mean is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("k", -1, "k = -1 is not a count"),
        ("atoms", torch.eye(4)[0], "`atoms` has shape (4,)"),
        ("atoms", torch.eye(4)[:3].double(), "`atoms` is torch.float64 (3, 4), but torch.float32 (3, 4) was wanted"),
        ("atoms", 2 * torch.eye(4)[:3], "`atoms` must have rows of unit norm, and row 0 has norm 2: mend that, or"),
        ("norms", torch.ones(2), "`norms` is torch.float32 (2,)"),
        ("norms", torch.tensor([1.0, 2, float("inf")]), "`norms` must be finite, and entry 2 is not"),
        ("mean", torch.tensor([1.0, float("nan"), 0, 0]), "`mean` must be finite, and entry 1 is not"),
        ("labels", Labels.counted(0, 2), "2 labels came for 3 atoms"),
        ("sample", replace(golden().sample, losses=torch.ones(3)), "2 labels, codes (2, 2) and 3 losses"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(tmp_path, field, value, words):
    model = golden()
    setattr(model, field, value)
    with pytest.raises(InputError, match=re.escape(words)):
        model.save(tmp_path / "x")
    assert not os.listdir(tmp_path)


# -- bad folders ------------------------------------------------------------------------------------------------------


def tensors(**changes):
    """Tampering: other tensors in a file that the manifest vouches for; None takes one out."""

    def tamper(path):
        some = {name: t for name, t in (golden_tensors() | changes).items() if t is not None}
        (path / folder.ATOMS).write_bytes(safetensors.torch.save(some))
        sign(path)

    return tamper


def table(name, change):
    """Tampering: another table in a file that the manifest vouches for."""

    def tamper(path):
        from pyarrow import parquet

        parquet.write_table(change(parquet.read_table(path / name)), path / name, store_schema=False)
        sign(path)

    return tamper


def column(name, change):
    def tamper(t):
        import pyarrow as pa

        i = t.schema.get_field_index(name)
        return t.set_column(i, t.schema.field(name), pa.array(change(t[name].to_pylist()), t.schema.field(name).type))

    return tamper


def data(name, change, signed=True):
    def tamper(path):
        (path / name).write_bytes(change((path / name).read_bytes()))
        if signed:
            sign(path)

    return tamper


def header(change):
    def replaced(file):
        (length,) = struct.unpack_from("<Q", file)
        new = change(file[8 : 8 + length])
        return struct.pack("<Q", len(new)) + new + file[8 + length :]

    return data(folder.ATOMS, replaced)


def manifest(**changes):
    return lambda path: sign(path, **changes)


def entries(**changes):
    def tamper(path):
        files = json.loads((path / "cfg.json").read_bytes())["files"] | changes
        sign(path, files={name: entry for name, entry in files.items() if entry})

    return tamper


def only_a_checkpoint(path):
    for name in ALL:
        (path / name).unlink()
    (path / folder.CHECKPOINT).touch()


def several(path):
    for name in ("layer.1", "layer.2"):
        shutil.copytree(path, path / name)
    (path / "cfg.json").unlink()


A, L, S, E = folder.ATOMS, folder.LABELS, folder.SAMPLE, {"size": 1, "sha256": "0" * 64}
BAD = {
    "no folder": (shutil.rmtree, "There is no folder .*: give the folder of a saved ITDA"),
    "a file": (lambda p: (shutil.rmtree(p), p.touch()), "is not a folder, and an ITDA is one"),
    "no manifest": (lambda p: (p / "cfg.json").unlink(), "has no cfg.json: .* or one whose training did not finish"),
    "of models": (lambda p: (p / "cfg.json").rename(p / "config.json"), "is a model: give the folder of a dictionary"),
    "of several": (several, r"holds the ITDAs layer\.1, layer\.2: give the folder of one, .*layer\.1"),
    "unfinished": (only_a_checkpoint, "training of .* has not finished: the same `itda train` command goes on"),
    "not JSON": (data("cfg.json", lambda b: b[:-9], False), "cfg.json is not JSON: copy the whole folder"),
    "deep JSON": (data("cfg.json", lambda b: b"[" * 10**6, False), "cfg.json is not JSON"),
    "not UTF-8": (data("cfg.json", lambda b: b"\xff" + b, False), "cfg.json is not JSON"),
    "a list": (data("cfg.json", lambda b: b"[1]", False), "is not the manifest of an ITDA"),
    "an SAE": (data("cfg.json", lambda b: b'{"d_in": 4}', False), "is not the manifest of an ITDA"),
    "newer": (manifest(version=2), "has format version 2, and this itda reads version 1: upgrade itda"),
    "odd version": (manifest(version="1"), "has format version '1', but 1 was wanted"),
    "edited": (data("cfg.json", lambda b: b.replace(b"0.2", b"0.3"), False), "cfg.json was changed after it"),
    "no digest": (data("cfg.json", lambda b: b.replace(b'"sha256"', b'"sha255"', 1), False), "cfg.json was changed"),
    "n_atoms": (manifest(n_atoms=-3), "says n_atoms = -3, but a count was wanted"),
    "k": (manifest(k=-1), "says k = -1, but a count was wanted"),
    "no k": (manifest(k=None), "says k = None, but a count was wanted"),
    "k a boolean": (manifest(k=True), "says k = True, but a count was wanted"),
    "d": (manifest(d=4.0), "says d = 4.0, but a count was wanted"),
    "tokens": (manifest(tokens=2**60), "says `tokens` = 1152921504606846976, but a count was wanted: copy"),
    "few tokens": (manifest(tokens=-1), "says `tokens` = -1, but a count was wanted"),
    "tokens a word": (manifest(tokens="\x1b[31m"), r"says `tokens` = '\\x1b\[31m', but a count was wanted"),
    "tokens nan": (manifest(tokens=float("nan")), "says `tokens` = nan, but a count was wanted"),
    "batch_rows": (manifest(batch_rows=[1]), r"says `batch_rows` = \[1\], but a count was wanted"),
    "threshold": (manifest(threshold=10**400), r"says `threshold` = 10{76}\.\.\., but a number was wanted"),
    "fvu": (manifest(fvu=float("inf")), "says `fvu` = inf, but a number was wanted"),
    "nonneg": (manifest(nonneg="no"), "says `nonneg` = 'no', but true or false was wanted"),
    "model": (manifest(model=["gpt2"]), r"says `model` = \['gpt2'\], but an object was wanted"),
    "layer": (manifest(model={"layer": "8"}), "says model: `layer` = '8', but a whole number was wanted"),
    "id": (manifest(model={"id": {}}), "says model: `id` = {}, but a text was wanted"),
    "stream": (manifest(stream={"hash": [1]}), r"says stream: `hash` = \[1\], but a text was wanted"),
    "context": (manifest(stream={"context_length": 1e3}), "says stream: `context_length` = 1000.0, but a count was"),
    "files": (manifest(files=[]), r"names the files \[\], but atoms.safetensors, labels.parquet and perhaps"),
    "a path": (entries(**{"../secret": E}), r"names the files .*'../secret', but atoms.safetensors"),
    "few files": (entries(**{A: None}), "names the files 'labels.parquet', 'sample.parquet', but"),
    "odd entry": (lambda p: ((p / A).unlink(), entries(**{A: {"size": 1}})(p)), "must give the size and the sha256 of"),
    "missing": (lambda p: (p / L).unlink(), "labels.parquet is missing: copy the whole folder"),
    "a folder": (lambda p: ((p / L).unlink(), (p / L).mkdir()), "labels.parquet is missing"),
    "short": (data(A, lambda b: b[:-4], False), r"has 332 bytes where cfg.json says 336, so it was cut short"),
    "changed": (data(A, lambda b: b[:-1] + b"x", False), r"is damaged or was changed \(its sha256 differs\)"),
    "absurd": (manifest(n_atoms=10**18), r"has `atoms` as F32 \[3, 4\], but cfg.json wants F32 \[10{18}, 4"),
    "absurd header": (
        header(lambda h: h.replace(b"[3,4]", b"[4000000000000,4]")),
        "not a readable safetensors file .*: copy",
    ),
    "length": (data(A, lambda b: b"\xff" * 8 + b[8:]), "is not a readable safetensors file"),
    "empty": (data(A, lambda b: b""), "is not a readable safetensors file"),
    "dtype": (tensors(atoms=golden().atoms.half()), r"has `atoms` as F16 \[3, 4\], but cfg.json wants F32 \[3, 4\]"),
    "shape": (tensors(norms=torch.ones(4)), r"has `norms` as F32 \[4\], but cfg.json wants F32 \[3\]"),
    "no tensor": (tensors(losses=None), r"holds the tensors \['atoms', 'mean', 'norms'\], but"),
    "more tensors": (tensors(more=torch.ones(1)), r"holds the tensors .*'more'"),
    "norm": (tensors(atoms=golden().atoms * 1.00002), "must have rows of unit norm, and row 0 has norm 1.00002"),
    "finite": (tensors(atoms=golden().atoms / 0), r"safetensors is damaged, .* rows of finite entries, and row 0"),
    "rows": (table(L, lambda t: t.slice(1)), "labels.parquet has 2 rows where cfg.json says n_atoms = 3"),
    "columns": (table(L, lambda t: t.drop_columns("end")), "has the columns prompt: int64, .*none nullable, were"),
    "nulls": (table(L, lambda t: t.cast(nullable(t.schema))), "none nullable, were wanted"),
    "twice": (
        table(L, column("position", lambda v: [3, 3, 9])),
        r"labels.parquet is damaged, because labels must be unique, and \(prompt 0, position 3\) stands 2 times",
    ),
    "not parquet": (data(L, lambda b: b"PAR1" * 9), "labels.parquet is not a readable parquet file"),
    "no parquet": (data(L, lambda b: b""), "labels.parquet is not a readable parquet file"),
    "atom 3": (table(S, column("indices", lambda v: [[1, 0], [3, 1]])), "row 1 of the sample uses atom 3 of 3"),
    "ragged": (table(S, column("indices", lambda v: [[1], [2, 1]])), "as many `indices` in every row"),
    "lengths": (table(S, column("values", lambda v: [[1.0], [2.0]])), "as many `values` in every row"),
    "nan": (table(S, column("values", lambda v: [[1.0, 1], [2.0, float("nan")]])), "must be finite"),
}  # fmt: skip


def packed(path, text, rows, **how):
    """A parquet file of labels that have one `text` for a token: little in the file, and much in memory."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {name: np.zeros(rows, np.int64) for name in tables.COLUMNS} | {"before": pa.array([""] * rows)}
    columns |= {"token": pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [text]), "after": columns["before"]}
    kinds = {name: pa.array(column).type for name, column in columns.items()}
    schema = pa.schema([pa.field(f.name, kinds[f.name], nullable=False) for f in tables._schema(False)])
    parquet.write_table(pa.table(columns, schema=schema), path, store_schema=False, **how)


@pytest.mark.parametrize(
    "how", [{"compression": "zstd"}, {"compression": "none"}, {"compression": "zstd", "use_dictionary": False}]
)
def test_text_that_unpacks_to_more_than_labels_have_is_refused_before_memory_is_taken(tmp_path, how):
    import pyarrow as pa

    packed(path := tmp_path / "labels.parquet", "x" * (1 << 20), 400 if "use_dictionary" in how else 4000, **how)
    assert path.stat().st_size < 1 << 21
    pool = pa.default_memory_pool()
    most = max(pool.max_memory(), pool.bytes_allocated() + (1 << 28))
    for n in (None, 400 if "use_dictionary" in how else 4000):
        with pytest.raises(InputError, match=r"labels\.parquet unpacks to more text than labels have: copy"):
            tables.read_labels(path, n)
    assert pool.max_memory() <= most
    packed(path, "y" * 100_000, 3, **how)
    assert len(tables.read_labels(path, 3)[0].texts[0]) == 100_000


def test_rows_that_unpack_to_more_than_is_free_are_refused(tmp_path, monkeypatch):
    packed(tmp_path / "x.parquet", "", 1 << 20, compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 1 << 17
    monkeypatch.setattr(tables, "free_bytes", lambda device: 4e7, raising=False)
    with pytest.raises(InputError, match=r"x\.parquet unpacks to 0\.1 GB, more than is free: "):
        tables.read_labels(tmp_path / "x.parquet")


def nullable(schema):
    import pyarrow as pa

    return pa.schema([pa.field(f.name, f.type) for f in schema])


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_in_one_sentence(tmp_path, case):
    tamper, words = BAD[case]
    path = write(tmp_path / "x", read(GOLDEN))
    tamper(path)
    with pytest.raises(InputError, match=words) as error:
        ITDA.load(path)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")
    assert str(path) in str(error.value)


DAMAGE = st.tuples(st.sampled_from(("flip", "cut", "insert", "zero")), st.floats(0, 1), st.integers(0, 7))


def damaged(data: bytes, kind: str, where: float, bit: int) -> bytes:
    at = int(where * (len(data) - 1))
    return {
        "flip": data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :],
        "cut": data[:at],
        "insert": data[:at] + bytes([32 + bit]) + data[at:],
        "zero": data[:at] + bytes(len(data) - at - 1) + b"\1",
    }[kind]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(name=st.sampled_from(ALL), damage=DAMAGE)
def test_damage_is_always_noticed(name, damage):
    with tempfile.TemporaryDirectory() as temporary:
        files = read(GOLDEN)
        path = write(Path(temporary), files | {name: damaged(files[name], *damage)})
        with pytest.raises(InputError):
            ITDA.load(path)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(name=st.sampled_from(ALL[1:]), damage=DAMAGE)
def test_damage_that_the_manifest_vouches_for_raises_nothing_else(name, damage):
    """Whatever the readers of safetensors and parquet make of it, it is an ITDA or an `InputError`."""
    with tempfile.TemporaryDirectory() as temporary:
        files = read(GOLDEN)
        path = write(Path(temporary), files | {name: damaged(files[name], *damage)})
        sign(path)
        with suppress(InputError):
            assert len(ITDA.load(path)) == 3


# -- writing over things, kills, a full disk --------------------------------------------------------------------------


def test_links_are_followed(tmp_path):
    golden().save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    random_itda(2, 2, 0).save(tmp_path / "link")
    assert len(ITDA.load(tmp_path / "real")) == len(ITDA.load(tmp_path / "link")) == 2
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    golden().save(tmp_path / "dangling")
    assert len(ITDA.load(tmp_path / "later")) == 3
    assert (tmp_path / "dangling").is_symlink()
    (tmp_path / "dangling").unlink()
    shutil.rmtree(tmp_path / "later")
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_new_folder_has_ordinary_permissions(tmp_path):
    golden().save(tmp_path / "x")
    (tmp_path / "y").mkdir()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


@pytest.mark.parametrize("old", ["nothing", "an empty folder", "an ITDA", "a checkpoint", "leftovers"])
def test_saving_over_what_is_ours(tmp_path, old):
    path = tmp_path / "x"
    if old != "nothing":
        path.mkdir()
    if old == "an ITDA":
        random_itda(9, 2, 0).save(path)
    if old == "a checkpoint":
        disk.write_file(path / folder.CHECKPOINT, [b"state"])
    if old == "leftovers":
        write(path / (".itda.tmp-" + "0" * 16), {A: b"", "cfg.json": b'{"format": "itda"}'})
        write(path, {L: b"", f".{folder.CHECKPOINT}.tmp-" + "f" * 16: b""})
    assert folder.check_writable_target(path) == path
    model = replace(golden(), sample=None)
    model.save(path)
    assert same(ITDA.load(path), model)
    # The checkpoint is removed by the training that wrote it, when it knows that all is well.
    assert sorted(os.listdir(path)) == sorted([*ALL[:3]] + [folder.CHECKPOINT] * (old == "a checkpoint"))
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "names", [{"notes.txt": b""}, {"labels.parquet": b""}, {"cfg.json": b"{}"}, {".x.tmp-1": b""}, {"sub/a": b""}]
)
@pytest.mark.parametrize("ours", [False, True])
def test_what_is_not_ours_is_not_touched(tmp_path, names, ours):
    path = write(tmp_path / "x", read(GOLDEN) if ours and not set(names) & set(ALL) else {})
    for name, content in names.items():
        write((path / name).parent, {Path(name).name: content})
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    name = next(iter(names)).split("/")[0]
    with pytest.raises(InputError, match=rf"holds '{re.escape(name)}', which is not part of an ITDA, so nothing was"):
        golden().save(path)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for path, words in (
        (tmp_path / "file", "is a file, and an ITDA is saved as a folder: choose another path"),
        (tmp_path / "file" / "x", "file is a file: choose another path"),
        (tmp_path / ("n" * 300), r"could not be used \(File name too long\): choose another place"),
    ):
        for action in (golden().save, folder.check_writable_target):
            with pytest.raises(InputError, match=words):
                action(path)
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="No permission to write into"):
        folder.check_writable_target(tmp_path / "new" / "x")
    with pytest.raises(InputError, match=r"gone.x could not be written \(No such file or directory\): choose another"):
        disk.write_file(tmp_path / "gone" / "x", [b""])


def test_a_path_that_safetensors_cannot_open_is_refused(tmp_path):
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    (tmp_path / "link").symlink_to(tmp_path / "\udcff")
    for path in ("\udcff/d", "link/d", "\ud800"):
        for action in (golden().save, folder.check_writable_target):
            with pytest.raises(InputError, match=r"' is not UTF-8.*: choose another path\.$") as refused:
                action(tmp_path / path)
            assert str(refused.value).isascii()  # it can be printed
    assert os.listdir(tmp_path / "\udcff") == []


OLD = {"nothing": None, "an ITDA": golden, "a checkpoint": None, "a killed save": None}


@pytest.mark.parametrize("old", OLD)
def test_a_kill_at_any_step_leaves_the_old_the_new_or_none(tmp_path, monkeypatch, old):
    new, outcomes = random_itda(4, 3, 5, sampled=False), []
    for i in itertools.count():
        path = tmp_path / str(i) / "x"
        if old == "an ITDA":
            golden().save(path)
        if old == "a checkpoint":
            write(path, {folder.CHECKPOINT: b"state"})
        if old == "a killed save":
            golden().save(path)
            with monkeypatch.context() as patch:
                Machine(patch, 18)
                with pytest.raises(Killed):
                    new.save(path)
            assert not (path / "cfg.json").exists()
        with monkeypatch.context() as patch:
            machine = Machine(patch, i)
            with suppress(Killed):
                new.save(path)
        try:
            loaded = ITDA.load(path)
            outcomes.append("new" if same(loaded, new) else "old")
            assert outcomes[-1] == "new" or same(loaded, golden())
        except InputError as error:
            refused = re.search("There is no folder|has no cfg.json|has not finished", str(error))
            outcomes.append("none" if refused else str(error))
        if old == "a checkpoint":
            assert (path / folder.CHECKPOINT).read_bytes() == b"state"
        new.save(path)  # whatever a kill leaves can be saved over
        assert same(ITDA.load(path), new)
        assert len(os.listdir(path)) == 3 + (old == "a checkpoint")
        if not machine.failed:
            break
    order = [key for key, _ in itertools.groupby(outcomes)]
    assert order == (["old", "none", "new"] if old == "an ITDA" else ["none", "new"])
    assert len(outcomes) > 15


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("old", [None, golden])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, code, old):
    path, new, said = tmp_path / "x", random_itda(4, 3, 5), []
    for i in itertools.count():
        if old:
            golden().save(path)
        with monkeypatch.context() as patch:
            machine = Machine(patch, i, OSError(code, os.strerror(code)))
            try:
                new.save(path)
            except InputError as error:
                said.append(str(error))
                assert os.listdir(tmp_path) == (["x"] if old else [])
                assert not old or (same(ITDA.load(path), golden()) and len(os.listdir(path)) == 4)
                continue
        assert same(ITDA.load(path), new)  # a parent that is there already need not be made
        shutil.rmtree(path)
        if not machine.failed:
            break
    words = "could not be written, because the disk is full: free some space or choose another place."
    assert set(said) == {f"{path} {words}"}
    assert len(said) > 12


def test_write_file_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    disk.write_file(path, [b"old ", np.arange(3, dtype=np.uint8)])
    assert path.read_bytes() == b"old \0\1\2"
    for error in (
        OSError(errno.ENOSPC, ""),
        KeyboardInterrupt(),
        None,
    ):  # None: killed, which leaves its temporary file
        for i in itertools.count():
            with monkeypatch.context() as patch:
                machine = Machine(patch, i, error)
                with suppress(Killed, KeyboardInterrupt, InputError):
                    disk.write_file(path, [b"new ", b"state"])
            done = not machine.failed or (error is None and i > 4)  # only the folder's fsync is missing
            assert path.read_bytes() == (b"new state" if done else b"old \0\1\2")
            assert error is None or os.listdir(tmp_path) == [path.name]
            if not machine.failed:
                break
        assert i > 1
        disk.write_file(path, [b"old \0\1\2"])


# -- the hub ----------------------------------------------------------------------------------------------------------


def hub_cache(root: Path, files: dict[str, bytes], sha="a" * 40) -> Path:
    """The cache layout of huggingface_hub: blobs, snapshots of links into them, refs."""
    repo = root / "models--org--tiny"
    snapshot = write(repo / "snapshots" / sha, {})
    for name, content in files.items():
        write(repo / "blobs", {hashlib.sha256(content).hexdigest(): content})
        (snapshot / name).symlink_to(Path("../../blobs", hashlib.sha256(content).hexdigest()))
    write(repo / "refs", {"main": sha.encode()})
    return root


def test_from_pretrained_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = hub_cache(tmp_path / "cache", read(GOLDEN))
    assert same(ITDA.from_pretrained("org/tiny", cache_dir=cache), golden())
    assert same(ITDA.from_pretrained("org/tiny", revision="a" * 40, cache_dir=cache, local_files_only=True), golden())
    assert same(ITDA.from_pretrained(GOLDEN), golden())
    monkeypatch.chdir(GOLDEN.parent)
    assert same(ITDA.from_pretrained("tiny", cache_dir=cache), golden())  # a folder goes before a hub name
    with pytest.raises(InputError, match=r"no folder org/other, .* \(the hub cannot be reached and the cache does not"):
        ITDA.from_pretrained("org/other", cache_dir=cache)
    with pytest.raises(InputError, match="There is no folder org/tiny: give the folder"):
        ITDA.from_pretrained("./org/tiny", cache_dir=cache)
    (cache / "models--org--tiny" / "snapshots" / ("a" * 40) / "cfg.json").unlink()
    with pytest.raises(InputError, match=r"has no cfg\.json: it is not an ITDA"):
        ITDA.from_pretrained("org/tiny", cache_dir=cache)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one repository needs: create, upload in one commit, list, download."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    created: list[dict] = []  # noqa: RUF012
    status = 200
    sha = "b" * 40

    def log_message(self, *args):
        pass

    def reply(self, body: bytes, **headers):
        self.send_response(self.status)
        if self.status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": self.sha, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://{self.headers['Host']}/org/tiny"
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
        answer = {"url": url, "commitUrl": f"{url}/commit/{self.sha}", "commitOid": self.sha}
        if self.status == 200 and "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        if self.status == 200 and "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.reply(json.dumps(answer).encode())

    def do_GET(self):
        if "/tree/" in self.path:
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in self.files.items()]
            return self.reply(json.dumps(tree).encode())
        if self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            return self.reply(json.dumps({"id": "org/tiny", "sha": self.sha, "siblings": siblings}).encode())
        name = self.path.split("/")[-1]
        return self.reply(self.files[name], ETag=f'"{hashlib.sha256(self.files[name]).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "created", [])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_push_and_pull(tmp_path, hub, monkeypatch):
    model = golden()
    model.cfg["data"] = "a|b\nc"
    assert model.push_to_hub("org/tiny", private=True, token="hf_x").endswith("/org/tiny")
    assert hub.created[0]["name"] == "tiny"
    assert "private" in json.dumps(hub.created[0])
    assert set(hub.files) == {*ALL, "README.md"}
    card = hub.files["README.md"].decode()
    for line in (
        "library_name: itda",
        'base_model: "org/tiny"',
        "| n_atoms | 3 |",
        "| threshold | 0.2 |",
        "| data | a&#124;b c |",
        "| model.hook_point | layers.1 |",
        'model = itda.ITDA.from_pretrained("org/tiny")',
    ):
        assert line in card.splitlines()
    assert same(ITDA.from_pretrained("org/tiny", cache_dir=tmp_path, token=False), model)
    assert not list(tmp_path.rglob("README.md"))  # only what a dictionary consists of is fetched
    del hub.files[folder.LABELS]
    with pytest.raises(InputError, match=r"labels\.parquet is missing"):
        ITDA.from_pretrained("org/tiny", cache_dir=tmp_path / "other", token=False)
    monkeypatch.setattr(hub, "status", 404)
    with pytest.raises(InputError, match=r"hub gave no such ITDA \(HTTP 404: check the name `org/name`, and your"):
        ITDA.from_pretrained("org/none", cache_dir=tmp_path, token=False)
    monkeypatch.setattr(hub, "status", 403)
    with pytest.raises(InputError, match=r"org/tiny could not be pushed to the hub \(HTTP 403: check the name"):
        model.push_to_hub("org/tiny", token="hf_x")


def test_a_local_model_is_no_base_model(tmp_path, hub, monkeypatch):
    model = golden()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    for name in (str(tmp_path), "local", "a\nb: c", None):
        model.cfg["model"] = {"id": name}
        model.push_to_hub("org/tiny", token="hf_x")
        assert "base_model" not in hub.files["README.md"].decode()


def test_what_arrays_a_dictionary_takes():
    x = torch.randn(100, 8)
    model = itda.build(x, k=3, threshold=0.2)
    want = model.encode(x)
    for array in (x.flip(0).numpy()[::-1], x.numpy().astype(">f4")):
        assert torch.equal(model.encode(array).values, want.values)
    atoms = model.atoms.numpy()
    assert torch.equal(want.decode(atoms), want.decode(model.atoms))
    assert torch.equal(itda.normalize(atoms), itda.normalize(model.atoms))
    assert [len(model.labels[i]) for i in (3, -1, np.int64(2))] == [1, 1, 1]
    assert model.labels[3].token(0) == model.labels.token(3)
    for function, *arguments in (
        (ITDA.encode, model, "text"),
        (Codes.decode, want, [1.0]),
        (itda.normalize, torch.ones(2, 2).int()),
    ):
        with pytest.raises(itda.InputError, match="was wanted"):
            inspect.unwrap(function)(*arguments)  # past the type checker of the tests


# -- what is anybody's, and what only readers of some kind take ------------------------------------------------------


def twice(path):
    text = (path / "cfg.json").read_text()
    blank = text.replace('"k": 2', '"k": 3,\n  "k": 2', 1)
    digest = json.loads(text)["sha256"]
    blank = blank.replace(digest, "0" * 64, 1).encode()
    (path / "cfg.json").write_bytes(blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1))


def metadata(path):
    from pyarrow import parquet

    t = parquet.read_table(path / L)
    with parquet.ParquetWriter(path / L, t.schema, store_schema=False) as file:
        file.write_table(t)
        file.add_key_value_metadata({"pandas": "{}"})
    sign(path)


LOOSE = {
    "a key twice": (twice, "cfg.json has the key 'k' twice in one object: copy"),
    "a tensor twice": (header(lambda h: b"{" + h[1:-1].rstrip(b" }") + b"}," + h[1:]), "not a readable safetensors"),
    "metadata": (header(lambda h: b'{"__metadata__":{"a":"b"},' + h[1:]), "it has metadata, and none was wanted"),
    "of a table": (metadata, "labels.parquet has metadata, and none was wanted"),
    "NaN": (manifest(more={"deep": [1, float("nan")]}), "has a number in 'more.deep.1' that JSON has no word for"),
    "infinite": (manifest(more=float("-inf")), "has a number in 'more' that JSON has no word for"),
    "position": (table(L, column("position", lambda v: [-3, 5, 9])), "`position` of row 0 is -3, and 0 is the least"),
    "prompt": (table(L, column("prompt", lambda v: [0, 0, -1])), "`prompt` of row 2 is -1, and 0 is the least"),
    "start": (table(L, column("start", lambda v: [0, -2, -1])), "`start` of row 1 is -2, and -1 is the least"),
    "of the sample": (table(S, column("document", lambda v: [0, -9])), "`document` of row 1 is -9, and -1 is the"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOSE)
def test_what_the_format_does_not_have_is_refused(tmp_path, case):
    tamper, words = LOOSE[case]
    path = write(tmp_path / "x", read(GOLDEN))
    tamper(path)
    with pytest.raises(InputError, match=words) as error:
        ITDA.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["eval.json", ".thesis.tmp-0123456789abcdef", ".itda.tmp-0123456789abcdef", ".notes.txt.tmp-" + "0" * 16],
)
@pytest.mark.parametrize("ours", [False, True])
def test_a_name_like_one_of_ours_proves_nothing(tmp_path, name, ours):
    path = write(tmp_path / "x", read(GOLDEN) if ours else {})
    (path / name).write_bytes(b'{"results": "of two years"}')
    before = read(path)
    with pytest.raises(InputError, match=rf"holds '{re.escape(name)}', which is not part of an ITDA"):
        golden().save(path)
    assert read(path) == before


def test_folders_like_those_of_killed_writers(tmp_path):
    path = write(tmp_path / "x", read(GOLDEN))
    write(path / ".itda.tmp-0123456789abcdef", {"diary.txt": b"mine"})
    with pytest.raises(InputError, match="-0123456789abcdef', which is not part of an ITDA"):
        golden().save(path)
    (tmp_path / "others").mkdir()
    write(tmp_path / "others", {"atoms.safetensors": b"mine"})
    shutil.rmtree(path / ".itda.tmp-0123456789abcdef")
    (path / ".itda.tmp-0123456789abcdef").symlink_to(tmp_path / "others")
    with pytest.raises(InputError, match="which is not part of an ITDA"):
        golden().save(path)
    assert read(tmp_path / "others") == {"atoms.safetensors": b"mine"}


def test_keys_that_become_one_are_refused(tmp_path):
    for cfg, name in (({5: 1, "5": 2}, "cfg"), ({"a": {True: 1, "True": 2}}, r"cfg\['a'\]")):
        with pytest.raises(InputError, match=rf"`{name}` has two keys that are '\w+' in JSON, where keys are text"):
            replace(golden(), cfg=golden().cfg | cfg).save(tmp_path / "x")
    model = replace(golden(), cfg=golden().cfg | {5: 1})
    model.save(tmp_path / "x")
    assert ITDA.load(tmp_path / "x").cfg["5"] == 1


def test_settings_that_json_cannot_hold_are_refused(tmp_path):
    itself = {}
    itself["x"] = itself
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value, says in (
        ({"x": 10**5000}, r"`cfg\['x'\]` is an integer of more than 1023 bits"),
        ({10**5000: 1}, "`cfg` is an integer of more than 1023 bits"),
        ({"x": itself}, "`cfg` is nested more than 100 deep, or holds itself"),
        ({"x": deep}, "`cfg` is nested more than 100 deep, or holds itself"),
        ({"y" * 10_000: object()}, r"^`cfg\['y{50}.{0,60}` is a object"),
    ):
        with pytest.raises(itda.InputError, match=says):
            replace(golden(), cfg=golden().cfg | value).save(tmp_path / "x")
        assert not (tmp_path / "x").exists()
    model = replace(golden(), cfg=golden().cfg | {"x": -(2**1023) + 1, "y": [[[1]]], True: 2})
    model.save(tmp_path / "x")
    found = ITDA.load(tmp_path / "x").cfg
    assert (found["x"], found["y"], found["True"]) == (-(2**1023) + 1, [[[1]]], 2)


def test_the_card_says_whether_atoms_are_activations():
    x = torch.randn(600, 8)
    assert "A dictionary of real activations:" in dictionaries._model_card(
        itda.build(x, k=2, threshold=0.3), "org/tiny"
    )
    moved = itda.build(x, k=2, n_atoms=20, admission="online")
    card = dictionaries._model_card(moved, "org/tiny")
    assert "A dictionary of real activations" not in card
    assert f"were moved to fit; an atom has the label of the nearest (median cosine {moved.moved.median():.2f})" in card


def test_settings_from_anywhere_are_inert_in_the_card(tmp_path):
    odd = "<script>alert(1)</script> \x1b[31m ![x](http://y) | `a` *b* \ud800"
    model = replace(golden(), cfg=golden().cfg | {"note": odd, "<b>": 1, "\ud801": 2})
    card = dictionaries._model_card(model, "org/tiny")
    card.encode()
    (row,) = (line for line in card.splitlines() if line.startswith("| note"))
    assert not set("<>`*[]()!\x1b\ud800") & set(row) and row.count("|") == 3
    assert "&#60;script&#62;alert&#40;1&#41;&#60;/script&#62;" in row and "�" in row
    model.save(tmp_path / "x")  # JSON has an escape for half a surrogate
    assert ITDA.load(tmp_path / "x").cfg["note"] == odd


def test_the_bytes_that_were_checked_are_those_that_are_used(tmp_path, monkeypatch):
    """However often the dictionary is replaced between any two openings of files, one of them is read, never two."""
    two = [golden(), replace(golden(), atoms=golden().atoms[[1, 0, 2]], labels=golden().labels[[2, 1, 0]])]
    path, opened = tmp_path / "x", folder._checked_file
    for step in range(5):
        two[0].save(path)
        count = iter(range(99))

        def replaced(*args, step=step, count=count):
            if next(count) == step:
                two[1].save(path)
            return opened(*args)

        with monkeypatch.context() as patch:
            patch.setattr(folder, "_checked_file", replaced)
            found = ITDA.load(path)
        assert any(same(found, one) for one in two)
    two[1].save(path)
    calls = []
    monkeypatch.setattr(tables, "holds_text", lambda *args: (calls.append(args), two[0].save(path), True)[-1])
    assert same(ITDA.load(path), two[1])  # replaced after it was checked
    assert calls
