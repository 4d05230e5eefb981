"""Names of models and tokenizers, on the Hugging Face hub or on disk: what they may be, and what is said of faults."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from itda import remote
from itda.disk import json_object
from itda.errors import InputError, causes

ADAPTER, GGUF = "adapter_config.json", ".gguf"
_READ = (".json", ".safetensors", ".model", ".txt", ".py", ".jinja", GGUF)  # of what lies in a repository of a model
_POINTER = b"version https://git-lfs.github.com/spec/v1"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def place_of(model: str, subfolder: str = "", gguf_file: str | None = None) -> tuple[str, str | None]:
    """Where the model `model` is, folder or hub id, and the name of its GGUF file if it is one, `gguf_file` if given.

    What is a path, or looks like one, must be a GGUF file, or a folder with a config and safetensors, with a GGUF file
    alone, or with an adapter.
    """
    folder = Path(model).expanduser()
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model
    if not (os.path.exists(folder) or is_path):
        return model, gguf_file  # a hub id
    wanted = "pass a folder that `save_pretrained` wrote, or the id of a model on the Hugging Face hub."
    if os.path.isfile(folder) and folder.suffix.lower() == GGUF:
        return str(folder.parent), _checked_gguf(folder)
    place, folder = str(folder), folder / subfolder
    if not os.path.isdir(folder):
        raise InputError(f"`{model}` is {'a file' if os.path.exists(folder) else 'not there'}: {wanted}")
    if gguf_file is not None:
        if not os.path.isfile(folder / gguf_file):
            raise InputError(f"The folder `{model}` holds no {gguf_file}: pass the name of a GGUF file in it.")
        return place, _checked_gguf(folder / gguf_file)
    for file in sorted(folder.glob("*.safetensors")):
        _check_pointer(file)
    if (folder / ADAPTER).is_file():
        return place, None
    weights = any(folder.glob("*.safetensors"))
    packed = sorted(path for path in folder.iterdir() if path.suffix.lower() == GGUF)
    if packed and not weights:
        if len(packed) > 1:
            raise InputError(
                f"The folder `{model}` holds {len(packed)} GGUF files ({packed[0].name} for one): pass the path of one."
            )
        return place, _checked_gguf(packed[0])
    if not (folder / "config.json").is_file():
        raise InputError(_no_model(model, is_path, wanted))
    if not weights:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        raise InputError(
            f"The folder `{model}` holds its weights as a pickle only, which could run any code and is not read: "
            "save the model as safetensors (`save_pretrained` does) and pass that folder."
            if pickles
            else f"The folder `{model}` holds no weights (no *.safetensors): {wanted}"
        )
    return place, None


def _no_model(model: str, is_path: bool, wanted: str) -> str:
    """What is said of a folder without a config; one that the hub may have a model of the name of hides that."""
    if is_path or not remote.HUB_ID.fullmatch(model):
        return f"The folder `{model}` holds no config.json, so it is not a model: {wanted}"
    return (
        f"The folder `{model}` here holds no config.json, so it is not a model, and it hides the model `{model}` of "
        "the Hugging Face hub, if there is one: rename the folder, or work in another, to use that."
    )


def _check_pointer(path: Path) -> None:
    """Raise `InputError` if the file of weights is what Git keeps in place of a large file that was not fetched."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"`{path}` is a pointer of Git LFS, and not the weights themselves: fetch them with `git lfs pull` in "
                "its folder."
            )


def _checked_gguf(path: Path) -> str:
    _check_pointer(path)
    if _PART.search(path.name):
        raise InputError(
            f"`{path.name}` is one of several parts of a GGUF file, which transformers does not read: merge them with "
            "`llama-gguf-split --merge`, or pass the model as safetensors."
        )
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise InputError(f"`{path.name}` is a GGUF file, which needs {missing[0]}: `pip install 'itda[gguf]'`.")
    return path.name


def file_of(model: str, file: str, where: Mapping[str, Any]) -> str | None:
    """The local path of a file of a model, downloaded if need be; None if it has none of that name.

    `where` has arguments of `from_pretrained` that say where on the hub the model is.
    """
    from transformers.utils import cached_file

    told = {name: value for name, value in where.items() if name not in ("trust_remote_code", "gguf_file")}
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(model, file, **quietly, **told)


def check_hub(model: str, where: Mapping[str, Any]) -> None:
    """Raise `remote.BadAnswer` if a hub says of the model `model` what no hub says; nothing for a local folder."""
    if os.path.isdir(model) or where.get("local_files_only"):
        return
    told = {name: where.get(name) for name in ("revision", "token", "cache_dir")}
    prefix = f"{where['subfolder'].strip('/')}/" if where.get("subfolder") else ""

    def wanted(name: str) -> bool:
        own = name.removeprefix(prefix)
        return name.startswith(prefix) and "/" not in own and own.endswith(_READ)

    remote.check_answers(model, wanted, **told)
    if (config := file_of(model, "config.json", where)) is not None:
        remote.check_cached(config)


def commit_of(path: str) -> str | None:
    """The commit of a file or folder in the cache of the hub; None for one that is elsewhere."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", Path(path).as_posix())
    return found[1] if found else None


def door(model: str, revision: str | None) -> AbstractContextManager[None]:
    """Whatever goes wrong in loading `model` leaves as one sentence."""
    return remote.door(f"`{model}` could not be loaded", lambda error: _sentence(model, revision, error))


def _sentence(model: str, revision: str | None, error: BaseException) -> str:
    every = list(causes(error))
    kinds = {kind.__name__ for cause in every for kind in type(cause).__mro__}
    if "trust_remote_code" in str(error):
        return (
            f"`{model}` runs code of its own: read that code, and if you trust it pass `trust_remote_code=True` "
            "(`--trust-remote-code`)."
        )
    if bad := next((cause for cause in every if isinstance(cause, remote.BadAnswer)), None):
        return f"The server gave no model `{model}` ({bad}): that is no hub, so do not use this server (`HF_ENDPOINT`)."
    if (status := next(filter(None, map(remote.status_of, every)), 0)) >= 500:
        return f"The hub could not give `{model}` (HTTP {status}): the server has failed, so try again later."
    if "GatedRepoError" in kinds:
        return f"`{model}` is gated: ask for access on its hub page, log in with `hf auth login`, and run this again."
    if "RevisionNotFoundError" in kinds:
        return f"`{model}` has no revision `{revision}`: pass a branch, tag or commit that its hub page lists."
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return f"The Hugging Face hub has no model `{model}` that you may read: check the id, or pass a local folder."
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "TimeoutError"}:
        return (
            f"`{model}` is neither a local folder nor in the local cache, and the Hugging Face hub was not reached: "
            "check the name and the network, or pass a local folder."
        )
    if "requires `accelerate`" in str(error):
        return "`device_map` needs accelerate: install it with `pip install 'itda[big]'`."
    if "SafetensorError" in kinds:
        return f"The weights of `{model}` are damaged ({_one_line(error)}): download or save them again."
    return (
        f"`{model}` could not be loaded ({type(error).__name__}: {_one_line(error)}): "
        "check that it is complete, and that the installed transformers knows its kind of model."
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "..."


@contextmanager
def quiet() -> Iterator[None]:
    """No logging, progress bars or warnings of the libraries that load, and their settings as before afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_verbosity()  # sets its level up, if this is its first use
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings(), remote.bounded_retries():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            transformers_logging.disable_progress_bar()
            disable_progress_bars()
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
            (enable_progress_bars if hub_bars else disable_progress_bars)()


def load_tokenizer(tokenizer: Any, **hub) -> Any:
    """The tokenizer of a hub id or folder; one that is loaded already as it is."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer

    def sentence(error: Exception) -> str:
        if "trust_remote_code" in str(error) or isinstance(error, remote.BadAnswer):
            return _sentence(str(tokenizer), None, error)
        return (
            f"`{tokenizer}` has no tokenizer that can be loaded ({_one_line(error)}): "
            "pass one with `tokenizer=`, loaded or as an id or folder."
        )

    with quiet(), remote.door(f"The tokenizer {tokenizer} could not be loaded", sentence):
        name, own = _tokenizer_place(str(tokenizer))
        if "trust_remote_code" not in hub:  # it is not that of a model whose files were looked at
            check_hub(name, hub)
        found = _auto_tokenizer(name, **hub | own)
        if len(found) <= len(found.all_special_ids):  # what transformers 5 makes up where there are no files
            raise OSError("it has no vocabulary")
        return found


def _tokenizer_place(name: str) -> tuple[str, dict[str, str]]:
    """Where the tokenizer of a model that is called `name` is, where that is a GGUF file or an adapter without one."""
    path = Path(name).expanduser()
    if path.suffix.lower() == GGUF and path.is_file():
        return str(path.parent), {"gguf_file": _checked_gguf(path)}
    if path.is_dir() and not any((path / file).is_file() for file in ("tokenizer_config.json", "tokenizer.json")):
        if len(packed := [file for file in path.iterdir() if file.suffix.lower() == GGUF]) == 1:
            return str(path), {"gguf_file": _checked_gguf(packed[0])}
        base = json_object(path / ADAPTER).get("base_model_name_or_path")
        if isinstance(base, str) and base:
            return base, {}
        if remote.HUB_ID.fullmatch(name) and not (path / "config.json").is_file():
            raise InputError(_no_model(name, False, ""))
    return name, {}


def _auto_tokenizer(tokenizer: str, **hub) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(tokenizer, **hub)
    except ValueError as error:
        if "TokenizersBackend" not in str(error):
            raise
        # What transformers 5 calls a fast tokenizer of no model's own; 4 does not know the name.
        return PreTrainedTokenizerFast.from_pretrained(tokenizer, **hub)
