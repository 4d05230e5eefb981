"""Whatever is done to a file that comes from elsewhere, its reader says what is wrong in one line, or reads it.

Nothing is run, nothing outside is written, and no more memory is taken than files of these sizes can need. Damage is
vouched for where a reader compares checksums first, so that the code behind the comparison is reached. The seeds that
once failed are kept as examples.
"""

import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

import itda
from itda.dictionary import checkpoint, folder
from itda.dictionary.builder import Builder
from itda.errors import InputError
from itda.evaluation import probing
from itda.labels import Labels
from itda.models.hidden_states import States
from itda.models.hooked_model import Group
from itda.models.weights import Weights
from itda.reading import shards
from itda.reading.saelens_cache import Cache
from itda.text.prompts import TokenStream
from itda.training import grid
from tests import tiny_models

MEMORY = 1 << 30  # bytes beyond what is taken before: arenas and stacks of threads; no file here is over 100 kB
DEEP = b"[" * 100_000

# -- damage -----------------------------------------------------------------------------------------------------------

# A place is a number, counted around; or the name of a key, a tensor or a column.
PLACES = st.integers(0, 1 << 20)
ODD = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**60,
    2**64,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a\nb",
    "\ud800",
]
ODD += ["../outside.txt", "/etc/hostname", "a\0b", "F64", "bfloat16", "load", [], {}, [[]], [-1], {"a": 1}, "gone"]
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
EDITS = ("flip", "cut", "insert", "delete", "size")
BYTES = st.tuples(st.sampled_from(EDITS), PLACES, st.integers(0, 255))
TENSORS = st.sampled_from(["gone", "empty", "flat", "double", "int64", "bool", "nan", "large", "minus", "wide"])
COLUMNS = TENSORS | st.sampled_from(["null", "text", "list", "time", "decimal", "nested", "ragged"])
KINDS = {
    ".json": st.tuples(st.just("value"), PLACES, VALUES) | st.tuples(st.just("deep"), PLACES, st.none()),
    ".safetensors": st.tuples(st.just("value"), PLACES, VALUES) | st.tuples(st.just("tensor"), PLACES, TENSORS),
    ".parquet": st.tuples(st.just("column"), PLACES, COLUMNS),
    ".arrow": st.tuples(st.just("column"), PLACES, COLUMNS),
    ".jsonl": st.tuples(st.just("value"), PLACES, VALUES),
    ".toml": st.tuples(st.just("line"), PLACES, VALUES),
}


def damages(*names):
    """One or two of (file, kind, place, what)."""

    def of(name):
        kind = KINDS.get(Path(name).suffix)
        how = BYTES if kind is None else st.one_of(kind, kind, BYTES)
        return st.tuples(st.just(name), how).map(lambda one: (one[0], *one[1]))

    return st.lists(st.sampled_from(names).flatmap(of), min_size=1, max_size=2)


def damaged(name: str, data: bytes, kind: str, place, what) -> bytes:
    """A file with one thing done to it; as it is where that cannot be done."""
    if kind in ("value", "tensor", "column", "line"):
        suffix = Path(name).suffix[1:]
        with suppress(Exception):  # after damage before this, what else is there to change may not be found
            return globals()[f"_{kind}_of_{suffix}"](data, place, what)
        return data
    at = place % max(1, len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (what or 1)]) + data[at + 1 :] if data else data
    after = {"cut": b"", "size": (2**60).to_bytes(8, "little") + data[at + 8 :], "deep": DEEP + data[at:]}
    if kind in ("insert", "delete"):
        after = {"insert": bytes([what]) + data[at:], "delete": data[at + 1 + what % 16 :]}
    return data[:at] + after[kind]


def _placed(places: list, place):
    """One of (name, ...)."""
    return next(p for p in places if p[0] == place) if isinstance(place, str) else places[place % len(places)]


def _nodes(document) -> Iterator[tuple]:
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        yield key, document
        if isinstance(value, dict | list):
            yield from _nodes(value)


def _changed(document, place, what):
    key, holder = _placed(list(_nodes(document)), place)
    if what == "gone":
        del holder[key]
    else:
        holder[key] = what
    return document


def _value_of_json(data, place, what) -> bytes:
    return json.dumps(_changed(json.loads(data), place, what)).encode()


def _value_of_jsonl(data, place, what) -> bytes:
    lines = data.split(b"\n")
    return b"\n".join([lines[0], _value_of_json(lines[1], place, what), *lines[2:]])


def _line_of_toml(data, place, what) -> bytes:
    lines = data.decode().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(place)) if isinstance(place, str) else place
    name = lines[at % len(lines)].partition("=")[0]
    lines[at % len(lines)] = f"{name}= {what if isinstance(what, str) else json.dumps(what)}"
    return "\n".join(lines).encode(errors="surrogatepass")


def _header(data) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _value_of_safetensors(data, place, what) -> bytes:
    header, rest = _header(data)
    head = json.dumps(_changed(header, place, what)).encode()
    return len(head).to_bytes(8, "little") + head + rest


def _tensor_of_safetensors(data, place, what) -> bytes:
    tensors, about = load(data), _header(data)[0].get("__metadata__")
    (name,) = _placed([(name,) for name in sorted(tensors)], place)
    t = tensors.pop(name)
    others = {
        "empty": lambda: t[:0], "flat": lambda: t.flatten(), "double": t.double, "int64": t.long, "bool": t.bool,
        "nan": lambda: t * float("nan"), "large": lambda: t.long() * 0 + 2**62, "minus": lambda: -1 - t.abs(),
        "wide": lambda: torch.cat([t, t], -1),
    }  # fmt: skip
    tensors |= {name: others[what]().contiguous()} if what in others else {}
    return save(tensors, about)


def _table(table, place, what):
    import pyarrow as pa

    (name,) = _placed([(name,) for name in table.schema.names], place)
    at, n = table.schema.get_field_index(name), len(table)
    others = {
        "empty": ([[]] * n, pa.list_(pa.int64())), "flat": (range(n), pa.int64()), "double": ([0.5] * n, pa.float64()),
        "int64": ([7] * n, pa.int64()), "bool": ([True] * n, pa.bool_()), "nan": ([float("nan")] * n, pa.float32()),
        "large": ([2**62] * n, pa.int64()), "minus": ([-7] * n, pa.int64()),
        "null": ([None] * n, table.schema.field(at).type),
        "text": (["x\n"] * n, pa.string()), "time": ([2**62] * n, pa.timestamp("s")), "list": ([[1]] * n, None),
        "decimal": ([1] * n, pa.decimal128(30, 5)), "nested": ([{"a": [None]}] * n, None),
        "wide": ([[[2.0]] * 7] * n, pa.list_(pa.list_(pa.float32()))),
        "ragged": ([[[2.0]] * (i % 3) for i in range(n)], None),
    }  # fmt: skip
    if what == "gone":
        return table.drop_columns(name)
    values, kind = others[what]
    own = table.schema.field(at)
    field = (
        pa.field(name, own.type, own.nullable) if kind == own.type else pa.field(name, kind or pa.array(values).type)
    )
    return table.set_column(at, field, pa.array(values, field.type))


def _column_of_parquet(data, place, what) -> bytes:
    from pyarrow import parquet

    table, out = _table(parquet.read_table(io.BytesIO(data)), place, what), io.BytesIO()
    parquet.write_table(table, out, compression="none", store_schema=False)
    return out.getvalue()


def _column_of_arrow(data, place, what) -> bytes:
    import pyarrow as pa

    table, out = _table(pa.ipc.open_stream(data).read_all(), place, what), io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def sealed(document: dict) -> bytes:
    """A manifest with the checksum of whatever it says, as `disk.sealed_json` does it."""
    blank = json.dumps({**document, "sha256": "0" * 64}).encode()
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


# -- what may happen --------------------------------------------------------------------------------------------------

EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect")
_watched: list | None = None


def _audit(event: str, args: tuple) -> None:
    if _watched is None:
        return
    if event in EVENTS:
        _watched.append((event, args))
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and args[0] != os.devnull:
        _watched.append((event, args))


@pytest.fixture(scope="module", autouse=True)
def audited():
    sys.addaudithook(_audit)  # for good, as they all are


@contextmanager
def bounded(top: Path) -> Iterator[None]:
    """Fails if anything is run, written outside the folder `top`, or allocated that is not for files of this size."""
    global _watched
    limits = None
    with suppress(ImportError, OSError):
        import resource

        soft, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    _watched = []
    try:
        yield
    finally:
        found, _watched = _watched, None
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    foreign = [what for what in found if what[0] != "open" or not str(what[1][0]).startswith(str(top))]
    assert not foreign


def check_error(error: BaseException) -> None:
    """One line, and not the end of the memory in other words."""
    assert "\n" not in str(error) and str(error).strip()
    cause: BaseException | None = error
    while cause is not None:
        assert not isinstance(cause, MemoryError) and "allocate" not in str(cause), repr(cause)
        cause = cause.__cause__


class Files(dict):
    """Content by name, too long to be shown."""

    def __repr__(self) -> str:
        return f"Files({', '.join(self)})"


def survives(files: dict[str, bytes], damage, read, vouch=None) -> None:
    """`read` a folder of damaged files: it does, or there is an `InputError`, and nothing else is done."""
    files = dict(files)
    for name, *how in damage:
        files[name] = damaged(name, files[name], *how)
    if vouch:
        files = vouch(files)
    with tempfile.TemporaryDirectory() as root:
        top, outside = Path(root) / "folder", Path(root) / "outside.txt"
        top.mkdir()
        outside.write_bytes(b"mine")
        for name, data in files.items():
            (top / name).write_bytes(data)
        with bounded(top):
            try:
                read(top)
            except InputError as error:
                check_error(error)
        assert sorted(os.listdir(root)) == ["folder", "outside.txt"] and outside.read_bytes() == b"mine"


# The same in every run. What fails is short as it is drawn; shrinking it would take minutes.
HOW = settings(
    max_examples=60,
    deadline=20_000,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)


def fuzzed(*names, examples=50):
    """Run a test with the damage to files of these names."""
    return lambda test: settings(HOW, max_examples=examples)(given(damage=damages(*names))(test))


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def valid(files, read, vouch=None):
    """`files`, read once as they are: what is imported and reserved then is not the damage's."""
    if vouch:
        assert vouch(files).keys() == files.keys()
    with tempfile.TemporaryDirectory() as root:
        for name, data in (vouch(files) if vouch else files).items():
            (Path(root) / name).write_bytes(data)
        read(Path(root))
    return Files(files)


# -- dictionaries and checkpoints -------------------------------------------------------------------------------------

DICTIONARY = (folder.MANIFEST, folder.ATOMS, folder.LABELS, folder.SAMPLE)
CHECKPOINT = "checkpoint.safetensors"


def read_dictionary(path):
    model = itda.ITDA.load(path)
    assert repr(model) and [model.labels.text(i) for i in range(len(model))]
    assert model.sample is None or [model.sample.labels.text(i) for i in range(len(model.sample.labels))]


def vouched_dictionary(files):
    with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        manifest = json.loads(files[folder.MANIFEST])
        for name in DICTIONARY[1:]:
            if isinstance(manifest["files"].get(name), dict) and "size" in manifest["files"][name]:
                digest = hashlib.sha256(files[name]).hexdigest()
                was = manifest["files"][name]
                if isinstance(was.get("sha256"), str) and was["sha256"] != digest:
                    manifest["files"][name] = {"size": len(files[name]), "sha256": digest}
        files = files | {folder.MANIFEST: sealed(manifest)}
    return files


@pytest.fixture(scope="module")
def dictionary():
    golden = Path(__file__).parent / "dictionary" / "golden" / "tiny"
    return valid({name: (golden / name).read_bytes() for name in DICTIONARY}, read_dictionary, vouched_dictionary)


@example(damage=[(folder.LABELS, "size", 0, 0)])
@example(damage=[(folder.ATOMS, "value", "shape", [2**60, 4])])
@fuzzed(*DICTIONARY, examples=80)
def test_dictionaries(dictionary, damage):
    survives(dictionary, damage, read_dictionary, vouched_dictionary)


def read_checkpoint(path):
    builder = Builder(k=3, threshold=0.5, center=False)
    if checkpoint.restore(builder, path, {"data": "x"}):
        builder.update(torch.ones(5, 8), Labels.counted(builder.position, 5))
        assert builder.finish().d == 8


def vouched_checkpoint(files):
    data = files[CHECKPOINT]
    with suppress(Exception):  # what is no safetensors file has no checksum
        tensors, metadata = load(data), _header(data)[0]["__metadata__"]
        metadata["sha256"] = checkpoint._digest(metadata["state"], tensors)
        data = save(tensors, metadata)
    return {CHECKPOINT: data}


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    path, builder = tmp_path_factory.mktemp("checkpoint"), Builder(k=3, threshold=0.5, center=False)
    x, text = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), "the cat sat on the mat"
    labels = Labels.counted(0, 40)
    labels = Labels(**{n: getattr(labels, n) for n in shards.LABEL_ARRAYS} | {"row": np.zeros(40, int)},
                    texts=(text,), text_start=np.zeros(1, int))  # fmt: skip
    builder.update(x, labels)
    checkpoint.save(builder, path, {"data": "x"})
    return valid(contents(path), read_checkpoint, vouched_checkpoint)


@example(damage=[(CHECKPOINT, "tensor", "labels.document", "empty")])
@example(damage=[(CHECKPOINT, "tensor", "labels.row", "large")])
@example(damage=[(CHECKPOINT, "tensor", "sample", "flat")])
@example(damage=[(CHECKPOINT, "tensor", "norms", "gone")])
@fuzzed(CHECKPOINT)
def test_checkpoints(unfinished, damage):
    survives(unfinished, damage, read_checkpoint, vouched_checkpoint)


@example(place="history", what=[[0, None]])
@example(place="stride", what=0)
@example(place="identity", what=[])
@example(place="position", what=10**400)
@HOW
@given(place=PLACES, what=VALUES)
def test_the_state_in_a_checkpoint(unfinished, place, what):
    """What the state says, which is JSON in the header."""
    data = unfinished[CHECKPOINT]
    metadata = _header(data)[0]["__metadata__"]
    state = json.dumps(_changed(json.loads(metadata["state"]), place, what))
    survives({CHECKPOINT: save(load(data), metadata | {"state": state})}, [], read_checkpoint, vouched_checkpoint)


# -- activations on disk ----------------------------------------------------------------------------------------------

STORE = ("activations.json", "shard-00000.safetensors", "shard-00000.parquet")


def read_store(path):
    stream = itda.activations(None, path, device="cpu")
    for batch in stream:
        assert [batch.labels.text(i) for i in range(len(batch.labels))]
    assert stream.provenance and stream.hash and list(stream.skip(3).labels())


def vouched_store(files):
    with suppress(ValueError, TypeError, KeyError, IndexError, RecursionError):
        manifest = json.loads(files["activations.json"])
        part, table = manifest["shards"][0], files["shard-00000.parquet"]
        if part["labels"]["sha256"] != (digest := hashlib.sha256(table).hexdigest()):
            part["labels"] = {"size": len(table), "sha256": digest}
        header, rest = _header(files["shard-00000.safetensors"])
        for hook in part["xxh64"]:
            start, stop = header[hook]["data_offsets"]
            part["xxh64"][hook] = xxhash.xxh64(rest[start:stop]).hexdigest()
    with suppress(ValueError, TypeError, RecursionError, UnboundLocalError):
        files = files | {"activations.json": sealed(manifest)}
    return files


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    home = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("itda.reading.collect"), "SHARD_BYTES", 30_000)
        model = tiny_models.save("gpt2", home / "model")
        itda.collect(str(model), tiny_models.DOCUMENTS * 2, home / "acts", layer=1, context_length=16, batch_rows=4)
    assert len(contents(home / "acts")) > len(STORE)
    return valid(contents(home / "acts"), read_store, vouched_store)


@example(damage=[(STORE[2], "size", 400, 0)])
@example(damage=[(STORE[0], "value", "d", 2**60)])
@example(damage=[(STORE[2], "column", "start", "minus")])
@fuzzed(*STORE, examples=60)
def test_stores(collected, damage):
    survives(collected, damage, read_store, vouched_store)


CACHE = ("state.json", "data-00000-of-00002.arrow", "data-00001-of-00002.arrow")


def read_cache(path):
    cache = Cache(path, batch_rows=4, device="cpu")
    assert cache.count_tokens() >= 0 and repr(cache.provenance)
    for batch in cache:
        for one in batch.values() if isinstance(batch, dict) else [batch]:
            assert len(one.activations) == len(one.labels)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    from datasets import Array2D, Dataset, Features, Sequence, Value

    path = tmp_path_factory.mktemp("cache")
    x, ids = np.ones((10, 7, 5), np.float32), np.arange(70).reshape(10, 7)
    kinds = {"blocks.2.hook_resid_post": Array2D((7, 5), "float32"), "token_ids": Sequence(Value("int32"), length=7)}
    Dataset.from_dict({"blocks.2.hook_resid_post": x, "token_ids": ids}, Features(kinds)).save_to_disk(
        path, num_shards=2
    )
    return valid(contents(path), read_cache)


@example(damage=[(CACHE[1], "column", "token_ids", "flat")])
@example(damage=[(name, "column", "blocks.2.hook_resid_post", "gone") for name in CACHE[1:]])
@example(damage=[(CACHE[2], "column", "blocks.2.hook_resid_post", "wide")])
@fuzzed(*CACHE, examples=80)
def test_caches(cache, damage):
    survives(cache, damage, read_cache)


# -- models -----------------------------------------------------------------------------------------------------------

INDEX, SHARDS = "model.safetensors.index.json", ("a.safetensors", "b.safetensors")


def read_weights(path):
    weights = Weights("org/model", "layers", {"w"}, lambda name: str(path / name) if (path / name).is_file() else None)
    weights.stamps(range(3), set())
    weights.outside({"embed.weight"})
    for block in range(2):
        weights.block(block)


@pytest.fixture(scope="module")
def weights():
    parts = [{"model.layers.0.w": torch.ones(4, 4), "model.embed.weight": torch.ones(9, 4)},
             {"model.layers.1.w": torch.ones(4, 4).half()}]  # fmt: skip
    index = {"metadata": {"total_size": 9}, "weight_map": {k: f for p, f in zip(parts, SHARDS, strict=True) for k in p}}
    files = {INDEX: json.dumps(index).encode(), **dict(zip(SHARDS, map(save, parts), strict=True))}
    return valid(files, read_weights)


@example(damage=[(INDEX, "value", "model.layers.0.w", "a" * 300 + ".safetensors")])
@example(damage=[(INDEX, "value", "model.layers.0.w", "\ud800.safetensors")])
@fuzzed(INDEX, *SHARDS)
def test_weights(weights, damage):
    survives(weights, damage, read_weights)


@example(damage=[("model.safetensors", "value", "dtype", "a\nb")])
@fuzzed("model.safetensors", examples=30)
def test_weights_in_one_file(weights, damage):
    survives({"model.safetensors": save(load(weights[SHARDS[0]]) | load(weights[SHARDS[1]]))}, damage, read_weights)


GROUPS = [Group(i, torch.arange(12).view(3, 4) + i, torch.ones(3, 4).long()) for i in range(2)]


def read_states(path):
    states = States(path, "model")
    try:
        if states.block >= 0 and states.holds(GROUPS, {"hidden-0": 6}):
            assert [states.get("hidden-0", group).shape for group in GROUPS]
            assert "tuple" in states.notes and [bytes.fromhex(s) for s in states.notes["samples"].values()]
        states.begin(GROUPS)
    finally:
        states.close()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    path = tmp_path_factory.mktemp("states")
    states = States(path, "model")
    states.begin(GROUPS)
    for group in GROUPS:
        states.put("hidden-0", group, torch.ones(3, 4, 6))
    states.notes = {"tuple": 2, "samples": {"layers.0": "00ff"}}
    states.finish(0)
    states.close()
    return valid(contents(path), read_states)


@example(damage=[("states.json", "value", "block", float("inf"))])
@example(damage=[("states.json", "value", "block", 10**400)])
@example(damage=[("states.json", "value", "hidden-0", [2**60, "float32"])])
@example(damage=[("states.json", "value", "hidden-0", [-1, "float32"])])
@example(damage=[("states.json", "value", "hidden-0", [6, "load"])])
@example(damage=[("states.json", "value", "forms", {})])
@example(damage=[("states.json", "value", "notes", {})])
@example(damage=[("states.json", "value", "samples", {"a": "x"})])
@fuzzed("states.json", "hidden-0.bin", examples=80)
def test_states(states, damage):
    survives(states, damage, read_states)


SAE = ("cfg.json", "sae_weights.safetensors")


def read_sae(path):
    system = import_module("itda.interop.saelens").load_sae(path)
    assert system.atoms.ndim == 2


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    sae_lens = pytest.importorskip("sae_lens")
    path = tmp_path_factory.mktemp("sae")
    cfg = sae_lens.TopKSAEConfig(d_in=8, d_sae=16, k=3, metadata=sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1"))
    sae_lens.TopKSAE(cfg).save_model(path)
    return valid({name: (path / name).read_bytes() for name in SAE}, read_sae)


@example(damage=[("cfg.json", "value", "k", [0.5])])
@example(damage=[("cfg.json", "value", "d_sae", 2**31)])
@fuzzed(*SAE, examples=40)
def test_saes(sae, damage):
    survives(sae, damage, read_sae)


# -- text and settings ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    import pyarrow as pa
    from pyarrow import parquet

    records, out = [{"text": text, "label": f"{i % 2}"} for i, text in enumerate(tiny_models.DOCUMENTS)], io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(records), out)
    lines = "\n".join(map(json.dumps, records)).encode()
    return {"a.txt": "\n".join(tiny_models.DOCUMENTS).encode(), "a.jsonl": lines, "a.parquet": out.getvalue()}


@pytest.fixture(scope="module")
def read_text():
    tokenizer = tiny_models.tokenizer()

    def read(path):
        (file,) = path.iterdir()
        for row in TokenStream(file, tokenizer, context_length=16):
            assert len(row.ids) == 16 or row.ids.size

    return read


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_text(name, texts, read_text):
    files = valid({name: texts[name]}, read_text)

    @fuzzed(name, examples=40)
    def test(damage):
        survives(files, damage, read_text)

    test()


@HOW
@given(name=st.sampled_from(["a.txt", "a.jsonl", "a.parquet"]), data=st.binary(max_size=200))
def test_text_of_any_bytes(read_text, name, data):
    survives({name: data}, [], read_text)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_labelled_texts(name, texts):
    pytest.importorskip("sklearn")

    def read(path):
        found = probing.labelled(path / name)
        assert len(found.texts) == len(found.labels)

    files = valid({name: texts[name]}, read)

    @fuzzed(name, examples=40)
    def test(damage):
        survives(files, damage, read)

    test()


GRID = b"""model = "gpt2"
data = ["a.txt", "b.txt"]
layer = [1, -1]
k = [2, 4]
threshold = 0.5
tokens = 200
center = true
context-length = 32
"""


def read_sweep(path):
    for job in grid.jobs_of(grid.read_grid(path / "sweep.toml")):
        assert job.name


@example(damage=[("sweep.toml", "line", "tokens", "9" * 5000)])
@example(damage=[("sweep.toml", "line", "threshold", 10**400)])
@fuzzed("sweep.toml", examples=100)
def test_sweeps(damage):
    survives({"sweep.toml": GRID}, damage, read_sweep)
