"""A server that is no hub: nothing is written outside the cache, nothing goes on without end, and who is to blame."""

from __future__ import annotations

import signal
import time

import pytest
import torch

import itda
from itda import remote
from itda.errors import InputError
from itda.models import hub as hub_module
from itda.models.loading import load_model
from tests.hub_server import serving
from tests.tiny_models import save


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """The files of a dictionary, and of a model."""
    home = tmp_path_factory.mktemp("home")
    itda.build([torch.randn(30, 8, generator=torch.Generator().manual_seed(0))], k=2, threshold=0.3).save(home / "d")
    save("gpt2", home / "model")
    return {what: {file.name: file.read_bytes() for file in (home / what).iterdir()} for what in ("d", "model")}


@pytest.fixture
def hub(monkeypatch):
    with serving(monkeypatch) as lies:
        yield lies


def opened(what: str, cache) -> object:
    if what == "d":
        return itda.ITDA.from_pretrained("org/tiny", cache_dir=cache, token=False)
    return load_model("org/tiny", hooks=1, cache_dir=str(cache), token=False)


def outside(tmp_path) -> list[str]:
    """What lies in the folder of the test, and not in the cache."""
    found = (path.relative_to(tmp_path).parts for path in tmp_path.rglob("*") if path.is_file())
    return ["/".join(parts) for parts in found if parts[:3] != ("a", "b", "cache")]


@pytest.mark.parametrize("what", ["d", "model"])
def test_an_honest_server(what, hub, homes, tmp_path):
    hub.files = homes[what]
    first = opened(what, tmp_path / "a" / "b" / "cache")
    asked = hub.gets
    again = opened(what, tmp_path / "a" / "b" / "cache")
    assert hub.gets == asked  # all of it is in the cache
    if what == "model":
        assert first.provenance(1)["revision"] == "c" * 40
        assert first.provenance(1) == again.provenance(1)
    assert outside(tmp_path) == []


LIES = [
    ({"commit": "../../../out"}, "it calls its commit '../../../out', and 40 hexadecimal digits were wanted"),
    ({"commit": "/tmp/out"}, "it calls its commit '/tmp/out'"),
    ({"commit": "C" * 40}, "it calls its commit 'CCC"),
    ({"commit": ""}, "it calls its commit ''"),
    ({"commit": 7}, "it calls its commit 7"),
    ({"header": "../../../../out"}, "it calls its commit '../../../../out'"),
    ({"etag": "../../../../out"}, "the ETag of .* is '../../../../out', which is none"),
    ({"etag": "/tmp/out"}, "the ETag of .* is '/tmp/out'"),
    ({"etag": ".."}, "the ETag of .* is '..'"),
    ({"names": ("../out.json",)}, "it has a file called '../out.json', which is no name in a folder"),
    ({"names": ("/out.json",)}, "it has a file called '/out.json'"),
    ({"names": ("a\\..\\..\\out.json",)}, "it has a file called 'a"),
    ({"names": ("C:out.json",)}, "it has a file called 'C:out.json'"),
]


@pytest.mark.parametrize("what", ["d", "model"])
@pytest.mark.parametrize(
    ("said", "sentence"), LIES, ids=lambda value: "" if isinstance(value, str) else str(value)[:40]
)
def test_names_that_lead_out_of_the_cache_are_refused_before_anything_is_written(
    what, said, sentence, hub, homes, tmp_path
):
    hub.files = homes[what]
    vars(hub).update(said)
    with pytest.raises(InputError, match=sentence) as caught:
        opened(what, tmp_path / "a" / "b" / "cache")
    assert "do not use this server" in str(caught.value) and "mend" not in str(caught.value)
    assert outside(tmp_path) == [] and hub.gets == 0


def test_a_lie_that_comes_late_is_found_afterwards(hub, homes, tmp_path):
    """As long as it is asked, the server says what is true; when the client downloads, it does not."""
    hub.files, hub.etag = homes["d"], "../../../../out"
    hub.late = sum(name in ("cfg.json", "atoms.safetensors", "labels.parquet", "sample.parquet") for name in hub.files)
    with pytest.raises(InputError, match=r"its client was made to write .* outside of its cache"):
        opened("d", tmp_path / "a" / "b" / "cache")


def test_what_is_in_a_cache(tmp_path):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    blob = tmp_path / "models--org--tiny" / "blobs" / "x"
    blob.parent.mkdir()
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to(blob)
    remote.check_cached(snapshot)
    remote.check_cached(snapshot / "config.json")
    (tmp_path / "out").write_text("{}")
    (snapshot / "other.json").symlink_to(tmp_path / "out")
    for path in (snapshot, snapshot / "other.json", tmp_path / "out", snapshot.parent / "main"):
        with pytest.raises(remote.BadAnswer, match="outside of its cache"):
            remote.check_cached(path)


@pytest.mark.parametrize("what", ["d", "model"])
@pytest.mark.parametrize("piece", [64, 10_000_000])
def test_a_server_that_announces_more_than_it_sends_is_given_up(what, piece, hub, homes, tmp_path, monkeypatch):
    """The client counts its attempts anew with every piece that comes: of a file of many, there was no end."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", piece)
    hub.files, hub.longer = homes[what], 100
    with pytest.raises(InputError) as caught:
        opened(what, tmp_path / "cache")
    assert "\n" not in str(caught.value) and "mend" not in str(caught.value)
    if piece == 64:
        assert "than it announces, again and again" in str(caught.value)
    assert hub.gets < 100


@pytest.mark.parametrize("what", ["d", "model"])
def test_faults_of_a_server_are_its_own(what, hub, homes, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.files, hub.status = homes[what], 500
    with pytest.raises(InputError) as caught:
        opened(what, tmp_path / "cache")
    assert "mend" not in str(caught.value) and "\n" not in str(caught.value)
    hub.status, hub.page = 200, b"<html>log in to this network first</html>"
    with pytest.raises(InputError) as caught:
        itda.ITDA.from_pretrained("org/tiny", cache_dir=tmp_path / "other", token=False)
    assert "mend" not in str(caught.value) and "\n" not in str(caught.value)


class Alarm(TimeoutError):
    """Of a program that gives its work so many seconds."""


@pytest.mark.parametrize("kind", [TimeoutError, Alarm])
@pytest.mark.parametrize("what", ["d", "model"])
def test_a_timeout_of_the_callers_own_stays_one(what, kind, hub, homes, tmp_path, monkeypatch):
    hub.files = homes[what]
    place = "huggingface_hub.snapshot_download" if what == "d" else "transformers.AutoConfig.from_pretrained"

    def ring(*args):
        raise kind("too long")

    def slow(*args, **settings):
        try:
            time.sleep(5)
        except OSError as error:  # as libraries do
            raise OSError("something went wrong") from error

    before = signal.signal(signal.SIGALRM, ring)
    monkeypatch.setattr(place, slow)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(kind, match="too long"):
            opened(what, tmp_path / "cache")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_timeout_of_the_network_is_a_sentence():
    import socket

    with pytest.raises(InputError, match="the Hugging Face hub was not reached"), hub_module.door("org/tiny", None):
        reading, writing = socket.socketpair()
        with reading, writing:
            reading.settimeout(0.01)
            try:
                reading.makefile("rb").read(1)
            except TimeoutError as error:
                raise OSError("not read") from error


def test_what_is_no_name_is_one_sentence(homes):
    dictionary = itda.build([torch.eye(4)], k=2)
    for name in (None, 7, "a b", "..", ""):
        with pytest.raises(InputError) as caught:
            dictionary.push_to_hub(name)
        assert "\n" not in str(caught.value) and "mend" not in str(caught.value)
