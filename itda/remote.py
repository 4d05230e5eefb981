"""A hub's answers, checked before its client writes files by them and after: it takes names from what a server says.

The client of the Hugging Face hub makes paths in its cache of the commit and of the ETag that a server sends, and goes
on asking for as long as any bytes come. A server may be a mirror, or whatever `HF_ENDPOINT` is.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from itda.errors import InputError, causes, shortened
from itda.shortages import shortage

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[A-Za-z0-9][\w.:+=-]{0,199}", re.ASCII)
_LIBRARIES = {
    *("socket", "ssl", "http", "selectors", "asyncio", "concurrent", "threading", "queue", "anyio", "certifi"),
    *("httpx", "httpcore", "httpx2", "httpcore2", "requests", "urllib3", "huggingface_hub", "hf_xet", "transformers"),
}
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
MOST_RETRIES = 8  # of one download, after which a server does not send what it has announced


class BadAnswer(OSError):
    """What a server said that no hub says; the text is the rest of a sentence."""


def check_answers(
    repo: str, wanted: Callable[[str], bool], *, revision: str | None = None, token: Any = None, cache_dir: Any = None
) -> None:
    """Ask a hub for the commit of `repo` and for the files whose names are `wanted`, and check what it says.

    Raises `BadAnswer` for a commit, a file's name or an ETag that is none. A hub that is not reached is nothing that
    is wrong: its client may find all of it in the cache.
    """
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return
    try:
        info: Any = HfApi(token=token).repo_info(repo, revision=revision)
    except Exception:  # which the client meets again, and says
        return
    _check_commit(info.sha)
    names = [file.rfilename for file in info.siblings or ()]
    for name in names:
        parts = re.split(r"[/\\]", name) if isinstance(name, str) else [""]
        if {"", ".", ".."} & set(parts) or "\0" in name or re.match(r"[A-Za-z]:", name):
            raise BadAnswer(f"it has a file called {shortened(name)}, which is no name in a folder")
    for name in filter(wanted, names):
        if isinstance(try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=info.sha), str):
            continue
        try:
            found = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision or info.sha), token=token)
        except Exception:
            continue
        _check_commit(found.commit_hash)
        if not isinstance(found.etag, str) or not _ETAG.fullmatch(found.etag):
            raise BadAnswer(f"the ETag of {name} is {shortened(found.etag)}, which is none")


def _check_commit(commit: Any) -> None:
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise BadAnswer(f"it calls its commit {shortened(commit)}, and 40 hexadecimal digits were wanted")


def check_cached(path: str | os.PathLike) -> None:
    """Raise `BadAnswer` unless a file or folder that a hub's client gave is in the snapshot of a commit, in its cache.

    A folder's files are links into the cache of the same repository.
    """
    place = Path(os.path.abspath(path))
    snapshot = next((one for one in (place, *place.parents) if one.parent.name == "snapshots"), None)
    if snapshot is None or not _COMMIT.fullmatch(snapshot.name):
        raise BadAnswer(f"its client was made to write to {shortened(str(path))}, outside of its cache")
    home = os.path.realpath(snapshot.parent.parent)
    for one in [place, *(place.rglob("*") if place.is_dir() else ())]:
        if os.path.commonpath([home, os.path.realpath(one)]) != home:
            raise BadAnswer(f"its client was made to write {one.name} outside of its cache")


@contextmanager
def bounded_retries() -> Iterator[None]:
    """Inside, a download that the client takes up again and again ends with `BadAnswer`.

    It begins to count anew with every byte, and says every time that it tries again: that is counted.
    """
    logger = logging.getLogger("huggingface_hub.file_download")
    counts: dict[Any, int] = {}
    level, raised = logger.level, logger.isEnabledFor(logging.WARNING)

    def counted(record: logging.LogRecord) -> bool:
        if "Trying to resume download" in str(record.msg):
            file = record.args[0] if isinstance(record.args, tuple) and record.args else None
            counts[file] = counts.get(file, 0) + 1
            if counts[file] > MOST_RETRIES:
                raise BadAnswer(f"it sends less of {shortened(file)} than it announces, again and again")
        return raised

    logger.addFilter(counted)
    logger.setLevel(min(logging.WARNING, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.removeFilter(counted)
        logger.setLevel(level)


@contextmanager
def door(what: str, sentence: Callable[[Exception], str]) -> Iterator[None]:
    """Whatever goes wrong inside leaves as one `sentence`; what the machine ran out of, as a `Shortage`: `what` failed.

    The caller's own `TimeoutError` leaves as it is, and so does an `InputError`.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if (own := own_timeout(error)) is not None:
            raise own from None
        raise shortage(error, what) or InputError(sentence(error)) from error


def own_timeout(error: BaseException) -> TimeoutError | None:
    """The `TimeoutError` of the caller's own (of an alarm, for one) that `error` is or was made of; None for others."""
    for cause in causes(error):
        if isinstance(cause, TimeoutError) and (trace := cause.__traceback__) is not None:
            while trace.tb_next is not None:
                trace = trace.tb_next
            if str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] not in _LIBRARIES:
                return cause
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the answer that an error of a hub's client is about."""
    with suppress(AttributeError):
        return error.response.status_code  # type: ignore[attr-defined]
    return None
