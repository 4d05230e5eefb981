"""What activations come from, and what of it must be equal for work that was interrupted to go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from itda.errors import InputError, counted, shortened
from itda.settings import verbs

VERSIONS = "versions."  # in an `identity`, before the name of a library
# Of a stream, what was read of it so far or lay beside it: that it is the same text its hash says.
COUNTED = ("stream.hash", "stream.documents", "stream.files", "stream.unread")
BOS, PREFIX = "stream.bos", "stream.prefix"
FINGERPRINT = "model.fingerprint"  # of the weights, in an `identity`; what is read block by block says it late


def identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a provenance says that must be equal for a reading to go on, without what changes on the way.

    The last bits of activations depend on the versions of the libraries that read them, and on the kind of processor,
    which stands beside these, so they are part of it.
    """
    flat = {f"{part}.{key}": v for part in ("model", "stream") for key, v in provenance.get(part, {}).items()}
    flat |= {key: value for key, value in provenance.items() if key not in ("model", "stream", "versions")}
    flat |= {VERSIONS + library: version for library, version in section(provenance, "versions").items()}
    return {name: value for name, value in flat.items() if name not in COUNTED}


def checked_rest(stream: Any, hashes: set[str | None], work: str) -> Iterator:
    """The items of a stream that skips what was read before, when it had one of `hashes`.

    Raises `InputError` if that is no longer what it was.
    """
    changed = InputError(
        f"The text has changed in its first {counted(stream.skipped, 'token')} since this {work} began: "
        "restore it to go on, "
        "or give another folder to start anew."
    )
    for item in stream:
        if hashes - {None, stream.skipped_hash}:
            raise changed
        yield item
    # All of it may have been read before; then rows without valid tokens may have been hashed after the last ones.
    if hashes - {None, stream.skipped_hash, stream.hash}:
        raise changed


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What two identities do not agree on, weights last, which say least; versions that were not taken down agree.

    A setting that one of them does not know, since it is older, was at its default then. How rows open is said by their
    prefix where there was no choice yet; that they are the same rows, by the hash of those that were read.
    """
    was, now = _with_defaults(was, now), _with_defaults(now, was)
    if BOS not in was or BOS not in now:
        was, now = ({name: value for name, value in one.items() if name != BOS} for one in (was, now))
    for name in sorted(
        was.keys() | now.keys(), key=lambda name: (name == FINGERPRINT, name.startswith(VERSIONS), name)
    ):
        unknown = name.startswith(VERSIONS) and None in (was.get(name), now.get(name))
        if was.get(name) != now.get(name) and not unknown:
            return name
    return None


def _with_defaults(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`one` with the default of every setting that `other` alone knows."""
    missing = {
        name: verbs.TRAIN.settings.get(name.removeprefix("stream.")) for name in other.keys() - one.keys() - {BOS}
    }
    return {name: declared.default for name, declared in missing.items() if declared is not None} | dict(one)


def said_of(name: str, was: Any, now: Any) -> str:
    """How work "was begun" differs from what is asked for now in `name`, and what to do to go on."""
    if name.startswith(VERSIONS):
        library = name.removeprefix(VERSIONS)
        mend = "go on with the former kind" if library == "processor" else "install the former version to go on"
        return f"{library} {was}, and this is {library} {now}, whose activations may differ in their last bits: {mend}"
    if name == PREFIX:
        return (
            f"rows that open with {shortened(was)}, and now they open with {shortened(now)}: give "
            f"`bos={'always' if was else 'never'!r}` (`--bos {'always' if was else 'never'}`) to go on"
        )
    return f"{name} = {shortened(was)}, and now it is {shortened(now)}: give the former settings to go on"


def section(cfg: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What a dictionary from elsewhere has there, if that is a dict as it should be."""
    value = cfg.get(key)
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Whether a value from a file of JSON is a number, finite in float64."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
