"""Names of models and tokenizers, on the Hugging Face hub or on disk: what they may be, and what is said of faults."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from itda.errors import InputError


def checked_name(model: str, subfolder: str = "") -> str:
    """`model`; what is a path, or looks like one, must be a folder with a config and safetensors."""
    folder = Path(model).expanduser()
    if not (os.path.exists(folder) or model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model):
        return model  # a hub id
    folder = folder / subfolder
    wanted = "pass a folder that `save_pretrained` wrote, or the id of a model on the Hugging Face hub."
    if not os.path.isdir(folder):
        raise InputError(f"`{model}` is {'a file' if os.path.exists(folder) else 'not there'}: {wanted}")
    if not (folder / "config.json").is_file():
        raise InputError(f"The folder `{model}` holds no config.json, so it is not a model: {wanted}")
    if not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        raise InputError(
            f"The folder `{model}` holds its weights as a pickle only, which could run any code and is not read: "
            "save the model as safetensors (`save_pretrained` does) and pass that folder."
            if pickles
            else f"The folder `{model}` holds no weights (no *.safetensors): {wanted}"
        )
    return str(Path(model).expanduser())


@contextmanager
def door(model: str, revision: str | None) -> Iterator[None]:
    """Whatever goes wrong in loading `model` leaves as one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(_sentence(model, revision, error)) from error


def _sentence(model: str, revision: str | None, error: BaseException) -> str:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    if "trust_remote_code" in str(error):
        return (
            f"`{model}` runs code of its own: read that code, and if you trust it pass `trust_remote_code=True` "
            "(`--trust-remote-code`)."
        )
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
    with warnings.catch_warnings():
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
    with quiet():
        try:
            found = _auto_tokenizer(str(tokenizer), **hub)
            if len(found) <= len(found.all_special_ids):  # what transformers 5 makes up where there are no files
                raise OSError("it has no vocabulary")
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise InputError(_sentence(str(tokenizer), None, error)) from error
            raise InputError(
                f"`{tokenizer}` has no tokenizer that can be loaded ({_one_line(error)}): "
                "pass one with `tokenizer=`, loaded or as an id or folder."
            ) from error
        return found


def _auto_tokenizer(tokenizer: str, **hub) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(tokenizer, **hub)
    except ValueError as error:
        if "TokenizersBackend" not in str(error):
            raise
        # What transformers 5 calls a fast tokenizer of no model's own; 4 does not know the name.
        return PreTrainedTokenizerFast.from_pretrained(tokenizer, **hub)
