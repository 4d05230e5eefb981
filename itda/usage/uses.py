"""`itda.uses`: one pass over text or activations on disk, and what the atoms of a dictionary did in it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch

from itda.arguments import PATH, checks
from itda.beside import USES, USES_MANIFEST, USES_STATE, content_hash, is_uses, is_uses_file
from itda.dictionary import unfinished
from itda.dictionary.folder import MANIFEST
from itda.dictionary.itda import ITDA
from itda.dictionary.usual import usual_norm
from itda.disk import as_input_error, checked_path, make_folder
from itda.errors import InputError, Interrupted, counted
from itda.labels import Batch
from itda.locks import locked
from itda.metrics import MASSIVE, norms
from itda.models import lens
from itda.progress import Step, reporter
from itda.provenance import checked_rest, differing, identity, section
from itda.reading.activations import Activations
from itda.reading.on_disk import is_stored
from itda.reading.own_model import model_of, stored_of
from itda.settings import groups, names, takes, verbs
from itda.text.documents import open_documents
from itda.text.prompts import TokenStream
from itda.text.reread import cut_of
from itda.usage.kept import Uses
from itda.usage.seen import Seen, lowest
from itda.usage.texts import Spool
from itda.usage.writing import write

WORK = "look at uses"


@takes(verbs.USES)
@checks(dictionary=PATH)
def uses(dictionary: str | os.PathLike, data: Any, **given: Unpack[verbs.Use]) -> Uses:
    """See what every atom of a dictionary does over `data`, and keep that beside it, in its folder.

    dictionary   the folder of an ITDA; what is seen is kept in its folder `uses` (docs/format.md)
    data         text, as for `itda.activations`, cut into rows as in training unless said otherwise; or activations on
                 disk (`itda collect`), which are read without the model: then nothing is known of what atoms promote,
                 unless `model` is given
    tokens       so many are read at most; massive ones, of |x| beyond five times the usual, are left out and counted

    Of every atom and sign: how many tokens use it, the histogram of its coefficients, its largest uses, and examples
    from each fifth of them, drawn from all; at which positions, beside which other atoms beyond chance, and which atoms
    point the same way; and by the logit lens, which tokens it raises and lowers. Counts are exact. Examples of fifths
    are of a sample of 40 uses, and what is used together is of a sample of 65,536 tokens; of fewer, of all. Memory does
    not grow with tokens. No result depends on the order or the batches of activations.

    A call that was interrupted goes on with the same call, to the same files; one with other settings than what is
    there replaces that with `overwrite`. Raises `InputError` for what cannot be read or written and for another model
    (unless `force`), and `Interrupted` when `stop` said so.
    """
    settings: dict[str, Any] = dict(given)
    report = reporter(settings["progress"])
    place = Path(checked_path(dictionary))
    if not (place / MANIFEST).is_file() and not place.exists():
        raise InputError(f"There is no folder {place}: give the folder of a dictionary, where its uses are to be kept.")
    itda = ITDA.load(place)
    if not len(itda):
        raise InputError(f"{place} has no atoms whose uses could be seen: give a dictionary with some.")
    stream, model = _stream(itda, data, settings)
    how = _identity(itda, stream, settings)
    target = Path(os.path.realpath(place)) / USES
    if target.exists() and not is_uses(target):
        raise InputError(f"{target} is no folder of uses, so nothing was written: rename it, or move the dictionary.")
    with locked(target, "looking at uses in"):
        if (found := _there(target, place, itda, how, settings["overwrite"])) is not None:
            return found
        try:
            return _Pass(itda, target, stream, model, how, settings, report).run()
        finally:
            report(None)


def _stream(itda: ITDA, data: Any, given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The activations to read, and the model where one is at hand."""
    cut = {
        name: value for name in names(groups.Rows, groups.Order, groups.Source) if (value := given[name]) is not None
    }
    special, batch_rows = given["special_tokens"], given["batch_rows"]
    if is_stored(data):
        idle = ("tokenizer", "trust_remote_code") if given["model"] is None else ()
        verbs.USES.refuse(given, idle, "activations on disk are read without a model")
        reading = cut | {"special_tokens": special, "batch_rows": batch_rows, "tokens": given["tokens"]}
        if given["model"] is None:
            reading |= {"dtype": given["dtype"]}
            return stored_of(itda.cfg, itda.d, data, given["force"], reading), None
        stream = stored_of(itda.cfg, itda.d, data, given["force"], reading)
        return stream, model_of(itda.cfg, given, head=True)[0]
    cut = cut_of(section(itda.cfg, "stream"), data) | cut
    if isinstance(data, str | os.PathLike):
        source: Any = {name: cut.get(name, verbs.TEXT.settings[name].default) for name in names(groups.Source)}
        open_documents(data, source)  # or refused, before a model is loaded
    model, hook = model_of(itda.cfg, given, head=True)
    rows = TokenStream(data, model.tokenizer, **cut)
    special = bool(itda.cfg.get("special_tokens")) if special is None else special
    batch_rows = batch_rows or itda.cfg.get("batch_rows") or verbs.ACTIVATIONS.settings["batch_rows"].default
    read = model.at([hook], model.tokenizer)
    return Activations(read, rows, batch_rows, tokens=given["tokens"], special_tokens=special, single=True), model


def _identity(itda: ITDA, stream: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a pass to go on, or to be done already."""
    own = {"dictionary": content_hash(itda), "tokens": given["tokens"]}
    own |= {"k": given["k"] or itda.k, "method": given["method"] or itda.method}
    own["nonneg"] = itda.nonneg if given["nonneg"] is None else given["nonneg"]
    return identity(stream.provenance) | own


def _there(target: Path, place: Path, itda: ITDA, how: Mapping[str, Any], overwrite: bool) -> Uses | None:
    """Uses that are there already, of the same settings; `InputError` for others that may not be replaced."""
    if not (target / USES_MANIFEST).is_file() or (target / USES_STATE).is_file():
        return None
    try:
        found = Uses.load(place, itda)
        name = differing(found.about["settings"], how)
    except InputError:
        if overwrite:
            return None
        raise
    if name is None:
        return found
    if not overwrite:
        was = found.about["settings"].get(name)
        raise InputError(
            f"{target} is of a pass with {name} = {was!r}, and now it is {how.get(name)!r}: give the former settings, "
            "or replace it with `overwrite` (`--overwrite`)."
        )
    return None


def _clear_state(target: Path) -> None:
    with as_input_error(f"{target} could not be emptied", "choose a dictionary in another place"):
        for name in os.listdir(target):
            if is_uses_file(name) and (name == USES_STATE or "rows-" in name):
                (target / name).unlink()


class _Pass:
    """One pass, which can be stopped after every batch and goes on from there."""

    def __init__(
        self,
        itda: ITDA,
        target: Path,
        stream: Any,
        model: Any,
        how: Mapping[str, Any],
        given: Mapping[str, Any],
        report: Callable,
    ) -> None:
        self.itda, self.target, self.stream, self.model = itda, target, stream, model
        self.how, self.given, self.report = how, given, report
        self.encoder = itda.to(model.device) if model is not None and model.device.type == "cuda" else itda
        self.limit = MASSIVE * usual_norm(itda)
        self.seen = Seen(len(itda), how["k"], lowest(itda.norms))
        self.spool = Spool(target)
        self.position, self.hash = 0, None
        self.state = target / USES_STATE

    def run(self) -> Uses:
        """Go on from what is there, to the end."""
        make_folder(self.target)
        self._restore()
        if not self.state.is_file():
            self.spool.begin(0)
            self._save()  # first: it says that the rest of the folder is ours
        try:
            self._read()
            if not self.position:
                raise InputError("The data holds no valid token, so there is nothing to see: give more text.")
            self._save()
            provenance = self.stream.provenance
            about = {"model": provenance["model"], "stream": provenance["stream"], "settings": dict(self.how)}
            why = self._no_lens()
            model = self.model if why is None else None
            return write(self.target, self.itda, self.seen, self.spool, model, about | {"no_lens": why}, self._told)
        except KeyboardInterrupt as error:
            if isinstance(error, Interrupted):
                raise
            raise Interrupted(self.kept) from None

    def _read(self) -> None:
        began = saved = time.monotonic()
        rest = self.stream.skip(self.position) if self.position else self.stream
        start = self.position
        items = checked_rest(rest, {self.hash}, "pass over uses") if start else rest
        for batch in items:
            self._add(batch)
            self.hash = rest.hash
            seconds = (time.monotonic() - began) * self.position / max(1, self.position - start)
            total = min((n for n in (self.given["tokens"], rest.expected) if n is not None), default=None)
            self.report(Step("seeing uses", self.position, total, seconds))
            stop = self.given["stop"]()
            if stop or time.monotonic() - saved > self.given["checkpoint_seconds"]:
                self._save()
                saved = time.monotonic()
            if stop:
                raise Interrupted(self.position)
        self.hash, self.stream = rest.hash, rest

    def _add(self, batch: Batch) -> None:
        """Take one batch of activations and labels."""
        x, labels = batch.activations, batch.labels
        if not bool(torch.isfinite(x).all()):
            raise InputError("An activation is not finite: read with a wider `dtype`, such as 'float32'.")
        self.spool.add(labels)
        kept = norms(x) <= self.limit
        settings = {name: self.how[name] for name in ("k", "method", "nonneg")}
        codes = self.encoder.encode(x if kept.all() else x[torch.from_numpy(kept).to(x.device)], **settings)
        self.seen.massive += int((~kept).sum())
        self.seen.add(codes, labels if kept.all() else labels[kept])
        self.position += len(labels)

    kept = 0  # tokens of the state on disk

    def _save(self) -> None:
        self.spool.flush()
        about = {
            "position": self.position,
            "hash": self.hash,
            "files": self.spool.files,
            "tokens": self.given["tokens"],
        }
        unfinished.save(self.state, self.seen.tensors(), about, self._lasting())
        self.kept = self.position

    def _restore(self) -> None:
        try:
            found = unfinished.load(self.state, self._lasting(), WORK)
            if found is not None:
                self._check_tokens(found[1])
        except InputError:
            if not self.given["overwrite"]:
                raise
            _clear_state(self.target)
            return
        if found is None:
            return
        tensors, about = found
        try:
            self.seen.restore(tensors)
            self.position, self.hash = int(about["position"]), about["hash"]
            files = int(about["files"])
        except (LookupError, TypeError, ValueError) as error:
            raise unfinished.unreadable(self.state, error) from error
        self.spool.begin(files)
        self.kept = self.position

    def _lasting(self) -> dict[str, Any]:
        """What must be equal for the pass to go on: all but how far it is to go."""
        return {name: value for name, value in self.how.items() if name != "tokens"}

    def _check_tokens(self, about: Mapping[str, Any]) -> None:
        """A pass may be given another end while it has not reached either: its last row may be cut there."""
        was, now, position = about["tokens"], self.given["tokens"], about["position"]
        if was != now and position >= min(n for n in (was, now) if n is not None):
            raise InputError(
                f"The unfinished pass in {self.target} has read {counted(position, 'token')} of {was or 'all'}, and "
                f"{now or 'all'} are asked for: give as many as before, or begin anew with `overwrite` (`--overwrite`)."
            )

    def _told(self, what: str, total: int) -> Callable[[int], None]:
        """Tell how far one of the last works is; a stop is heeded there too."""
        began = time.monotonic()

        def done(count: int) -> None:
            self.report(Step(what, count, total, time.monotonic() - began))
            if self.given["stop"]():
                raise KeyboardInterrupt

        return done

    def _no_lens(self) -> str | None:
        """Why nothing is known of what atoms promote."""
        if self.model is None:
            return "activations on disk were read without the model (`model` names it)"
        return lens.no_lens(self.model, self.itda.d)
