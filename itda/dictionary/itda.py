"""`ITDA`: a dictionary of real activations, each labelled with the token it came from."""

from __future__ import annotations

import math
import os
import re
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from itda import remote
from itda.arguments import DICTIONARY, PATH, TEXT, checks
from itda.codes import Codes
from itda.dictionary import folder, tables
from itda.dictionary.naming import nearer
from itda.dictionary.soundness import TENSORS, plain_of, problem_of
from itda.disk import checked_path, safetensors_chunks
from itda.errors import InputError, counted, first_line, one_line, shortened
from itda.labels import Labels
from itda.metrics import LOSSES, reconstruction, relative_error
from itda.pursuit import as_tensor, pursue
from itda.shortages import shortages_told

# What `measured` says in `cfg` of the sample.
MEASURED = (
    *("fvu", "fvu_robust", "fvu_standardised", "variance"),
    *("relative_error", "median_error", "sample_tokens"),
)


@dataclass(frozen=True)
class Sample:
    """A sample of the tokens a dictionary has seen: labels, codes (n, k) under it and admission losses (n,) float32."""

    labels: Labels
    codes: Codes
    losses: Float[Tensor, " n"]


@dataclass(eq=False, repr=False)
class ITDA:
    """A dictionary of `n_atoms` activations of size `d`; all tensors are float32.

    `atoms` are the dictionary, (n_atoms, d), rows of unit norm; `labels` what each of them is; `k` the pursuit steps.
    `mean` (d,) is subtracted from activations before they are encoded, unless None; then they are divided by `scale`
    (d,), the deviation of each coordinate, unless None. `norms` are the atoms' norms before they were normalised (after
    both), `losses` their admission losses (NaN for the first and for seeds).
    `cfg` says where the dictionary comes from and how it was built, a JSON object; `sample` is there to be looked at.
    `moved` (n_atoms,) is None unless the atoms were refined (`itda.refine`): then it is the cosine of each with the
    activation of its label, which it is no more.
    """

    atoms: Float[Tensor, "n_atoms d"]
    labels: Labels
    k: int
    mean: Float[Tensor, " d"] | None
    norms: Float[Tensor, " n_atoms"]
    losses: Float[Tensor, " n_atoms"]
    cfg: dict = field(default_factory=dict)
    sample: Sample | None = None
    moved: Float[Tensor, " n_atoms"] | None = None
    scale: Float[Tensor, " d"] | None = None

    def __post_init__(self) -> None:
        stream = self.cfg.get("stream") if isinstance(self.cfg, dict) else None
        if isinstance(stream, dict) and isinstance(self.labels, Labels):
            self.labels = replace(self.labels, stream=stream)  # so that they know whose they are by themselves

    def named(self, x: Float[Tensor, "tokens d"], labels: Labels) -> ITDA:
        """With the labels, `norms` and `moved` of nearer ones of the activations `x`, where atoms were moved.

        `losses` of new labels are NaN, since these tokens were not admitted.
        """
        if self.moved is None or not len(x):
            return self
        inner = self.standardised(x.float())
        found = nearer(self.atoms, self.moved, self.labels, inner, labels)
        index, (norms, losses, moved) = np.arange(len(self)), (t.clone() for t in (self.norms, self.losses, self.moved))
        for atom, (where, cosine) in found.items():
            index[atom], norms[atom] = len(self) + where, inner[where].norm()
            losses[atom], moved[atom] = math.nan, cosine
        both = Labels.concat([self.labels, labels])[index]
        return replace(self, labels=both, norms=norms, losses=losses, moved=moved)

    @property
    def n_atoms(self) -> int:
        """How many atoms there are."""
        return len(self.atoms)

    @property
    def d(self) -> int:
        """The size of an activation."""
        return self.atoms.shape[1]

    @property
    def method(self) -> str:
        """The pursuit that its codes are made by, "mp" where `cfg` says nothing."""
        return self.cfg.get("method", "mp")

    @property
    def nonneg(self) -> bool:
        """Whether it was built for codes of 0 or more."""
        return bool(self.cfg.get("nonneg", False))

    def __len__(self) -> int:
        return self.n_atoms

    def __repr__(self) -> str:
        model = _source(self)
        words = [counted(self.n_atoms, "atom"), f"d={self.d}", f"k={self.k}"] + ["centred"] * (self.mean is not None)
        words += ["standardised"] * (self.scale is not None)
        words += [str(model[key]) for key in ("id", "hook_point") if model.get(key)]
        return f"ITDA({', '.join(words)})"

    @checks(method=TEXT, backend=TEXT)
    def encode(
        self,
        x: Float[Tensor, "*batch d"] | ndarray,
        *,
        k: int | None = None,
        method: str | None = None,
        nonneg: bool | None = None,
        tol: float = 0.0,
        backend: str = "auto",
    ) -> Codes:
        """Codes of activations `x` (..., d), `standardised`, by `itda.pursue`; settings default to the dictionary's.

        `x` is moved to the device of the dictionary, where its codes are too (`model.to("cuda")` moves that). The laws
        of `pursue` hold for what is pursued; an atom's own activation encodes to itself. Raises `InputError`.
        """
        if (found := as_tensor(x)) is None:
            kind = getattr(x, "dtype", type(x).__name__)
            raise InputError(f"`x` is {kind}; a dense floating-point tensor (..., {self.d}) was wanted.")
        x = found.to(self.atoms.device)
        if x.ndim < 1 or x.shape[-1] != self.d:
            raise InputError(f"`x` has shape {tuple(x.shape)}: pass activations (..., {self.d}), as {self!r} encodes.")
        return pursue(
            self.standardised(x),
            self.atoms,
            k=self.k if k is None else k,
            method=self.method if method is None else method,
            nonneg=self.nonneg if nonneg is None else nonneg,
            tol=tol,
            backend=backend,
        )

    def decode(self, codes: Codes) -> Float[Tensor, "*batch d"]:
        """The activations (..., d) that `codes` stand for, times the scale, the mean added back; dtype of the codes."""
        if not isinstance(codes, Codes):
            raise InputError(f"`codes` is of type {type(codes).__name__}: pass what `encode` or `pursue` gave.")
        return self.restored(codes.decode(self.atoms))

    def standardised(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Activations as the pursuit has them: less the mean and over the scale, as far as the dictionary has these."""
        self._check_vectors(x)
        if self.mean is not None:
            x = x - self.mean.to(x.device)  # float16 and bfloat16 become float32 here
        return x if self.scale is None else x / self.scale.to(x.device)

    def restored(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What `standardised` gives as activations again; dtype of `x`."""
        self._check_vectors(x)
        if self.scale is not None:
            x = x * self.scale.to(x.device, x.dtype)
        return x if self.mean is None else x + self.mean.to(x.device, x.dtype)

    def _check_vectors(self, x: Any) -> None:
        if not isinstance(x, Tensor) or x.ndim < 1 or x.shape[-1] != self.d:
            came = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is {shortened(x)}"
            raise InputError(f"`x` {came}: pass a tensor of activations (..., {self.d}), as {self!r} has them.")

    def reconstruct(self, x: Float[Tensor, "*batch d"] | ndarray, **settings) -> Float[Tensor, "*batch d"]:
        """`decode(encode(x))`, (..., d); `settings` as for `encode`. float32, or float64 for float64 `x`."""
        return self.decode(self.encode(x, **settings))

    def to(self, device: torch.device | str) -> ITDA:
        """The same dictionary with its tensors on `device`; the sample stays where it is."""
        try:
            there = {name: t.to(device) for name in TENSORS if (t := getattr(self, name)) is not None}
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            why = first_line(error)
            raise InputError(
                f"`device` is {shortened(device)}, which cannot be used here ({why}): pass 'cpu', or one that is there."
            ) from error
        return replace(self, **there)

    @checks(path=PATH)
    def save(self, path: str | os.PathLike) -> None:
        """Write the dictionary as the folder `path` (docs/format.md); the same object gives the same bytes.

        A killed save leaves the old dictionary, the new one or none. Replaces an ITDA; raises `InputError` for a
        folder that holds anything else, a full disk, and an object that could not be loaded again.
        """
        with shortages_told(f"{path} could not be written"):
            self._write(path)

    def _write(self, path: str | os.PathLike) -> None:
        if problem := problem_of(self):
            raise InputError(f"This ITDA cannot be saved, because {problem[1]}: mend that, or build it again.")
        tensors = {name: t for name in TENSORS if (t := getattr(self, name)) is not None}
        files = {folder.ATOMS: safetensors_chunks(tensors), folder.LABELS: tables.labels_chunks(self.labels)}
        if self.sample is not None:
            codes = self.sample.codes
            indices, values, losses = (
                t.detach().cpu().numpy() for t in (codes.indices, codes.values, self.sample.losses)
            )
            files[folder.SAMPLE] = tables.labels_chunks(self.sample.labels, (indices, values), losses)
        plain = plain_of(self.cfg, "cfg")
        settings = {"k": int(self.k), **{key: value for key, value in plain.items() if key != "k"}}
        if wrong := folder.wrong_setting(settings):
            raise InputError(f"This ITDA cannot be saved, because its `cfg` says {wrong}: mend that entry.")
        folder.write_folder(path, self.n_atoms, self.d, settings, files)

    @classmethod
    @checks(path=PATH)
    def load(cls, path: str | os.PathLike) -> ITDA:
        """Read the dictionary in the folder `path`, on the CPU, after checking all of it; `InputError` if it is bad."""
        path = Path(checked_path(path))
        with shortages_told(f"{path} could not be read"):
            return cls._of_files(path, *folder.read_files(path))

    @classmethod
    def _of_files(cls, path: Path, manifest: dict, data: dict[str, bytearray]) -> ITDA:
        """What a manifest and the `data` of the files that it names say, which were at `path`."""
        n_atoms, d = manifest["n_atoms"], manifest["d"]
        tensors = folder.read_atoms(data.pop(folder.ATOMS), path / folder.ATOMS, n_atoms, d)
        labels, _ = tables.read_labels(path / folder.LABELS, n_atoms, data=data.pop(folder.LABELS))
        sample = None
        if folder.SAMPLE in data:
            sampled, parts = tables.read_labels(path / folder.SAMPLE, sample=True, data=data.pop(folder.SAMPLE))
            indices, values, losses = (torch.from_numpy(parts[name]) for name in ("indices", "values", "losses"))
            sample = Sample(sampled, Codes(indices, values, n_atoms), losses)
        cfg = {key: value for key, value in manifest.items() if key not in folder.RESERVED}
        full: dict[str, Any] = {"mean": None, **tensors}
        model = cls(labels=labels, k=manifest["k"], **full, cfg=cfg, sample=sample)
        if problem := problem_of(model):
            raise InputError(f"{path / problem[0]} is damaged, because {problem[1]}: copy or train the ITDA again.")
        return model

    @classmethod
    @checks(dictionary=DICTIONARY)
    def of(cls, dictionary: ITDA | str | os.PathLike) -> ITDA:
        """The dictionary itself, or that of a folder or a hub repository; on the CPU."""
        return dictionary.to("cpu") if isinstance(dictionary, ITDA) else cls.from_pretrained(dictionary)

    @classmethod
    @checks(repo_or_path=PATH, revision=TEXT)
    def from_pretrained(
        cls,
        repo_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> ITDA:
        """`load` a folder, or else download (or find in the cache) the hub repository `org/name` and load that."""
        name = os.fspath(repo_or_path)
        if os.path.isdir(name) and remote.HUB_ID.fullmatch(name) and not os.path.lexists(Path(name) / folder.MANIFEST):
            raise InputError(
                f"The folder {name} here holds no {folder.MANIFEST}, so it is not an ITDA, and it hides {name} of the "
                "hub, if there is one: rename the folder, or work in another, to use that."
            )
        if os.path.lexists(name) or not remote.HUB_ID.fullmatch(name):
            return cls.load(name)
        from huggingface_hub import snapshot_download

        files = [folder.MANIFEST, folder.ATOMS, folder.LABELS, folder.SAMPLE]
        where: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        with _hub_errors(f"There is no folder {name}, and the hub gave no such ITDA"), remote.bounded_retries():
            if not local_files_only:
                remote.check_answers(name, files.__contains__, **where)
            path = snapshot_download(name, local_files_only=local_files_only, allow_patterns=files, **where)
            remote.check_cached(path)  # whatever the server said the second time
        return cls.load(path)

    @checks(repo_id=TEXT, revision=TEXT)
    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | bool | None = None, revision: str | None = None
    ) -> str:
        """Save the dictionary with a model card to the hub repository `org/name`, made if need be; returns its URL."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "itda"
            self.save(path)
            (path / "README.md").write_text(_model_card(self, repo_id), encoding="utf-8")
            with _hub_errors(f"{repo_id} could not be pushed to the hub"):
                api = HfApi(token=token)
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                message = f"ITDA of {counted(self.n_atoms, 'atom')}"
                api.upload_folder(repo_id=repo_id, folder_path=path, revision=revision, commit_message=message)
        return str(url)


def _source(model: ITDA) -> dict:
    """What `cfg` says about the language model, if anything."""
    source = model.cfg.get("model")
    return source if isinstance(source, dict) else {}


def _hub_errors(what: str) -> AbstractContextManager[None]:
    """Say in one sentence whatever the hub's client raises: `what`, and why."""
    return remote.door(what, lambda error: f"{what} ({_reason(error)}).")


def _reason(error: Exception) -> str:
    """Why the hub's client failed; the kinds of its errors differ between versions and HTTP libraries."""
    status, kind = remote.status_of(error), type(error).__name__
    if isinstance(error, remote.BadAnswer):
        return f"{error}: that is no hub, so do not use this server (`HF_ENDPOINT`)"
    if kind == "LocalEntryNotFoundError":
        return "the hub cannot be reached and the cache does not have it: check the network, or give a local folder"
    if kind == "RevisionNotFoundError":
        return "there is no such revision: check `revision`"
    if status in (401, 403, 404):
        return f"HTTP {status}: check the name `org/name`, and your access with `hf auth login`"
    if kind == "HFValidationError":
        return f"{first_line(error)}: give a name `org/name`"
    if status is not None and status >= 500:
        return f"HTTP {status}: the server has failed, so try again later"
    return f"{kind}: {first_line(error)}; try again later, or with a local folder"


_MARKUP = re.compile(r"[<>&|`*\[\]()!#\\~]|(?<!\w)_|_(?!\w)")  # within a word _ is no markup


def _inert(value: object) -> str:
    """`value` as text that Markdown and HTML show as it is: a setting may come from anywhere."""
    text = one_line(" ".join(str(value).split()))
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)


def _model_card(model: ITDA, repo_id: str) -> str:
    """README.md of a hub repository: the front matter the hub indexes, the settings, and how to load it."""
    source = _source(model)
    base = source.get("id")
    front = ["library_name: itda", "tags:", "- itda", "- interpretability", "- dictionary-learning"]
    # A local folder is no use to anybody else.
    if isinstance(base, str) and remote.HUB_ID.fullmatch(base) and not os.path.exists(base):
        front.append(f'base_model: "{base}"')
    settings = {"n_atoms": model.n_atoms, "d": model.d, "k": model.k, **model.cfg}
    settings |= {f"model.{key}": source.get(key) for key in ("id", "revision", "hook_point")}
    rows = [(key, v) for key, v in settings.items() if v is not None and not isinstance(v, dict | list)]
    table = [f"| {_inert(key)} | {_inert(value)} |" for key, value in rows]
    lines = ["---", *front, "---", "", f"# {repo_id.split('/')[-1]}", ""]
    what = "real activations"
    if model.moved is not None:
        what = "directions that began as real activations and were moved to fit; an atom has the label of the nearest "
        what += f"(median cosine {float(model.moved.median()):.2f})"
    lines += [f"A dictionary of {what}: inference-time decomposition of activations, arXiv 2505.17769.", ""]
    lines += ["| setting | value |", "|---|---|", *table, "", "```python", "import itda", ""]
    lines += [f'model = itda.ITDA.from_pretrained("{repo_id}")', "codes = model.encode(x)  # x: (..., d)", "```", ""]
    return "\n".join(lines)


def measured(model: ITDA, x: Tensor, labels: Labels) -> ITDA:
    """The dictionary with the tokens `x` (tokens, d) and their `labels` as its sample, and its errors on them.

    fvu, fvu_robust, fvu_standardised and variance are those of `metrics.reconstruction`; relative_error and
    median_error are of |x - x_hat|^2 / |x - mean|^2 of a token, coordinates over the scale if there is one.
    """
    codes = model.encode(x)
    x_hat = model.decode(codes)
    inner, inner_hat = model.standardised(x.float()).double(), codes.decode(model.atoms).double()
    error = relative_error(inner, inner_hat).numpy()
    mean, median = (float(of(error)) if len(error) else math.nan for of in (np.mean, np.median))
    cfg = model.cfg | {**reconstruction(x.double(), x_hat.double()), "sample_tokens": len(x)}
    cfg |= {"relative_error": mean, "median_error": median}
    loss = LOSSES[cfg.get("loss", "relative")](inner, inner_hat)
    return replace(model, cfg=cfg, sample=Sample(labels, codes, loss.float()))
