"""SAELens (v6): folders that it loads by itself, an architecture that keeps signed codes, and its SAEs as systems.

`export` and `load_sae` serve `itda export` and `itda eval --sae`. Importing this module needs no SAELens; what needs it
says so. After `register()`, SAELens knows the architecture "itda".
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda.arguments import ITDA as ITDA_KIND
from itda.arguments import PATH, TEXT, checks
from itda.codes import Codes
from itda.dictionary.folder import ATOMS, check_writable_target
from itda.dictionary.itda import ITDA
from itda.disk import (
    ELSEWHERE,
    LARGEST,
    as_input_error,
    leftover_of,
    remove_leftovers,
    safetensors_chunks,
    small_file,
    staged,
    sync_folder,
    write_file,
)
from itda.errors import InputError, first_line
from itda.evaluation.systems import System
from itda.interop.made_for import check, check_format, check_place, model_of
from itda.locks import PATIENCE, locked
from itda.provenance import section
from itda.pursuit import normalize, pursue
from itda.shortages import shortage, shortages_told

if TYPE_CHECKING:
    from sae_lens import SAE

CFG, WEIGHTS, NEXT = "cfg.json", "sae_weights.safetensors", "sae_weights.next"
ARCHITECTURES = ("matching_pursuit", "itda")


@checks(dictionary=ITDA_KIND, out=PATH, architecture=TEXT)
def export(dictionary: ITDA, out: str | os.PathLike, *, architecture: str = "matching_pursuit") -> Path:
    """Write `dictionary` as the folder `out`, which `sae_lens.SAE.load_from_disk` reads.

    "matching_pursuit" is SAELens' own and needs nothing of this library: its pursuit takes positive correlations only,
    so a dictionary of signed codes becomes the split one, latents 0 to n-1 its atoms and n to 2n-1 their negatives, and
    the difference of the two latents of an atom is its coefficient. "itda" keeps n latents with signed codes, and needs
    `itda.interop.saelens.register()` before it is loaded. The labels go into `metadata` of cfg.json.

    Raises `InputError` for a dictionary whose pursuit SAELens' own cannot do, for one with a `scale`, and a folder that
    holds anything else.
    """
    if not len(dictionary):
        raise InputError(
            f"{dictionary!r} has no atoms to export: give one with some (a lower `threshold` admits more)."
        )
    if architecture not in ARCHITECTURES:
        raise InputError(f"`architecture` is {architecture!r}; choose one of {', '.join(map(repr, ARCHITECTURES))}.")
    method = dictionary.method
    if architecture == "matching_pursuit" and method != "mp":
        raise InputError(
            f"SAELens' own architecture does matching pursuit, and this dictionary has method {method!r}: export it "
            "with `architecture='itda'` (`--architecture itda`)."
        )
    check_unscaled(dictionary)
    out = _target(out)
    signed = architecture == "matching_pursuit" and not dictionary.nonneg
    atoms = torch.cat([dictionary.atoms, -dictionary.atoms]) if signed else dictionary.atoms
    bias = torch.zeros(dictionary.d) if dictionary.mean is None else dictionary.mean
    cfg = {
        "d_in": dictionary.d,
        "d_sae": len(atoms),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,  # of zeros where the dictionary is not centred
        "normalize_activations": "none",
        "reshape_activations": "none",
        "architecture": architecture,
        "metadata": _metadata(dictionary, signed),
    }
    if architecture == "matching_pursuit":
        cfg |= {"residual_threshold": 0.0, "max_iterations": dictionary.k, "stop_on_duplicate_support": False}
    else:
        cfg |= {"k": dictionary.k, "method": method, "nonneg": dictionary.nonneg}
    tensors = {"W_dec": atoms.float(), "b_dec": bias.float()}
    with shortages_told(f"{out} could not be written"):
        _write(out, cfg, safetensors_chunks(tensors, {"format": "pt", "itda": "export"}))
    return out


def _write(out: Path, cfg: dict[str, Any], weights: list) -> None:
    """Put an export into `out`, by one process at a time; cfg.json comes last, and says which weights it is of."""
    digest = hashlib.sha256()
    for chunk in weights:
        digest.update(chunk)
    cfg["metadata"]["itda"]["sha256"] = digest.hexdigest()
    with locked(Path(os.path.realpath(out)), patience=PATIENCE, within=True):
        _check_exports_alone(out)
        for name in (CFG, WEIGHTS):
            remove_leftovers(out / name)  # of an export that was killed
        with as_input_error(f"{out} could not be written", ELSEWHERE):
            (out / NEXT).unlink(missing_ok=True)  # of one by an earlier version
            with staged(out / WEIGHTS, weights) as temporary:  # a full disk leaves the old export
                (out / CFG).unlink(missing_ok=True)  # never old labels beside new weights
                os.replace(temporary, out / WEIGHTS)
                sync_folder(out)
        write_file(out / CFG, [(json.dumps(cfg, indent=1, allow_nan=False) + "\n").encode()])


def check_unscaled(dictionary: ITDA) -> None:
    """Raise `InputError` for a dictionary whose coordinates are over their deviations, which an SAE cannot say."""
    if dictionary.scale is not None:
        raise InputError(
            f"{dictionary!r} was built with `scale` = 'std', and an SAE has one weight for all coordinates: build one "
            "without `scale` (`--scale`) to hand it on."
        )


def _target(out: str | os.PathLike) -> Path:
    target = Path(out)
    if not os.path.isdir(target):
        check_writable_target(target)
    return target


def _check_exports_alone(target: Path) -> None:
    """Raise `InputError` for a folder with anything but an export; known within its lock, when nobody else writes."""
    with as_input_error(f"{target} could not be used", ELSEWHERE):
        found = [path for path in target.iterdir() if not _is_leftover(path)]
    # What has vanished meanwhile was a temporary file of another export into it.
    if foreign := sorted({path.name for path in found if os.path.lexists(path)} - {CFG, WEIGHTS}):
        raise InputError(f"{target} holds {foreign[0]!r}, which is no part of an export: choose a new or empty folder.")
    if (target / WEIGHTS).exists() and not (target / CFG).exists() and not _is_ours(target / WEIGHTS):
        raise InputError(f"{target} holds {WEIGHTS} of something else: choose a new or empty folder.")
    if (target / CFG).exists() and not _is_export(target / CFG):
        raise InputError(f"{target} holds a {CFG} that is not of an export: choose a new or empty folder.")


def _is_leftover(path: Path) -> bool:
    """Whether this is what a killed export left."""
    plain = path.is_file() and not path.is_symlink()
    return plain and (leftover_of(path.name) in (CFG, WEIGHTS) or (path.name == NEXT and _is_ours(path)))


def _is_ours(path: Path) -> bool:
    """Whether the weights at `path`, which may have been cut short, were written by `export`."""
    with suppress(OSError, ValueError, RecursionError, AttributeError), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return "itda" in json.loads(file.read(min(size, LARGEST)))["__metadata__"]
    return False


def _is_export(path: Path) -> bool:
    """Whether `path` is the cfg.json of an export; that of any other SAE has the same name."""
    with suppress(OSError):
        return bool(_said(small_file(path)))
    return False


def _said(data: bytes) -> dict[str, Any]:
    """What the cfg.json of an export says of it; of anything else, nothing."""
    with suppress(ValueError, RecursionError):
        document = json.loads(data)
        return section(section(document, "metadata"), "itda") if isinstance(document, dict) else {}
    return {}


def _digests(folder: Path) -> tuple[str | None, str]:
    """The sha256 of cfg.json (None if it is of no export) and of the weights, which are of one export if it is of any.

    Raises `InputError` if they are not: somebody is replacing the export, or was killed by a power cut.
    """
    with as_input_error(f"{folder} could not be read", "give another folder"):
        data = small_file(folder / CFG)
        known = _said(data).get("sha256")
        if known is None:  # of SAELens, or of an earlier version
            return None, ""
        with open(folder / WEIGHTS, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != known:
        raise InputError(
            f"{folder / WEIGHTS} is not of the export that {CFG} is of (its sha256 differs): export the dictionary "
            "again."
        )
    return hashlib.sha256(data).hexdigest(), found


def _metadata(dictionary: ITDA, signed: bool) -> dict[str, Any]:
    """What SAELens and its users look for, and what each latent is."""
    model, stream = (section(dictionary.cfg, part) for part in ("model", "stream"))
    hook, layer = model.get("hook_point"), model.get("layer")
    is_block = layer is not None and hook is not None and hook.rpartition(".")[2] == str(layer)
    labels = dictionary.labels
    return {
        "sae_lens_version": "6.0.0",  # of the format: what says none is read as older, and loses its metadata
        "sae_lens_training_version": None,
        "model_name": model.get("id"),
        "hook_name": f"blocks.{layer}.hook_resid_post" if is_block else hook,
        "hf_hook_name": hook,
        "context_size": stream.get("context_length"),
        "dataset_path": stream.get("data"),
        "prepend_bos": bool(stream.get("prefix")),
        "exclude_special_tokens": not dictionary.cfg.get("special_tokens", False),
        "itda": {
            "k": dictionary.k,
            "split": signed,
            "stream_hash": stream.get("hash"),
            "labels": [[*map(int, pair), labels.text(i)] for i, pair in enumerate(labels.pairs().tolist())],
        },
    }


@checks(path=PATH, name=TEXT)
def load_sae(path: str | os.PathLike, name: str | None = None, device: str = "cpu") -> System:
    """An SAE in SAELens' format, from a folder, as a `System` for `itda.evaluate`.

    Raises `InputError` for what SAELens cannot load, without SAELens, for an SAE that does not say at which hook point
    it was made, and as `system_of` does.
    """
    register()
    from sae_lens import SAE

    if not os.path.isfile(Path(path) / WEIGHTS):
        check_format(path)
    if not os.path.isfile(Path(path) / CFG):
        raise InputError(f"{path} holds no {CFG}, so it is no SAE in SAELens' format: give the folder of one.")
    if os.path.isfile(Path(path) / ATOMS):
        raise InputError(f"{path} is an ITDA, and an SAE in SAELens' format was wanted: export it, or give another.")
    before = _digests(Path(path))
    try:
        sae = SAE.load_from_disk(str(path), device=device)
    except Exception as error:
        raise shortage(error, f"{path} could not be loaded") or InputError(
            f"SAELens cannot load {path} ({type(error).__name__}: {first_line(error)}): give another folder."
        ) from error
    if _digests(Path(path)) != before:  # SAELens opens the files by their names
        raise InputError(f"{path} was replaced while it was read: run it again.")
    for key, value in sae.state_dict().items():
        if not bool(value.isfinite().all()):
            raise InputError(f"The SAE in {path} has numbers in {key} that are not finite: give another folder.")
    name = name or Path(os.path.abspath(path)).name
    check(sae, name)
    check_place(sae, name)
    return system_of(sae, name)


def system_of(sae: SAE, name: str, **cost: Any) -> System:
    """A loaded SAE as a `System`; its codes are its feature activations, as many as are not zero.

    Raises `InputError` for what writes other activations than it reads, or reads others than those of the model as it
    is: transcoders, single heads, scaled or centred activations.
    """
    check(sae, name)

    @torch.no_grad()
    def run(x: Tensor) -> tuple[Tensor, Codes]:
        if x.shape[1] != atoms.shape[1]:
            raise InputError(
                f"The SAE {name!r} is for activations of width {atoms.shape[1]}, and these have {x.shape[1]}: give one "
                "of this hook point."
            )
        parts, codes = [], []
        for part in x.to(sae.device, sae.dtype).split(512):
            try:
                features = sae.encode(part)
                parts.append(sae.decode(features).float())
            except InputError:
                raise
            except (TypeError, ValueError) as error:  # of settings in cfg.json that are none
                raise InputError(
                    f"SAELens cannot run {name!r} ({type(error).__name__}: {first_line(error)}): give another SAE."
                ) from error
            codes.append(sparse(features))
        return torch.cat(parts), Codes.concat(codes)

    rows, bias = sae.W_dec.detach().float().cpu(), getattr(sae, "b_dec", None)
    atoms = normalize(rows)
    hook, k = sae.cfg.metadata.hook_name, getattr(sae.cfg, "k", None)
    k = k if isinstance(k, int) else None
    place = hook if isinstance(hook, str) and hook else None
    own: dict[str, Any] = {"rows": rows, "bias": None if bias is None else bias.detach().float().cpu()}
    if sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        own["inner"] = torch.no_grad()(lambda x: sae.run_time_activation_norm_fn_in(x.to(sae.device, sae.dtype)))
    return System(name, atoms, run, k, dict(cost), place, made_for=model_of(sae), **own)


def sparse(dense: Float[Tensor, "tokens n_atoms"]) -> Codes:
    """The codes (tokens, most) of dense ones, largest first; `most` is the largest number of a token."""
    most = int((dense != 0).sum(1).max()) if len(dense) else 0
    indices = dense.abs().topk(most, dim=1).indices
    values = dense.gather(1, indices).float()
    return Codes(torch.where(values != 0, indices, 0), values, dense.shape[1])


@cache
def register() -> tuple[type, type]:
    """Make SAELens know the architecture "itda"; returns its class and that of its config.

    Codes are signed and pass `hook_sae_acts_post`, reconstructions `hook_sae_recons`. Raises `InputError` without
    SAELens.
    """
    try:
        from sae_lens import SAE, SAEConfig, register_sae_class
    except ImportError as error:
        raise InputError(
            f"SAELens cannot be imported ({error}): install it with `pip install 'itda[saelens]'`."
        ) from error
    sae_class, cfg_class = _classes(SAE, SAEConfig)
    register_sae_class("itda", sae_class, cfg_class)
    return sae_class, cfg_class


def as_sae(dictionary: ITDA, device: str = "cpu") -> SAE:
    """`dictionary` as a SAELens SAE of architecture "itda", in memory."""
    check_unscaled(dictionary)
    sae_class, cfg_class = register()
    from sae_lens.saes.sae import SAEMetadata

    own = {"method": dictionary.method, "nonneg": dictionary.nonneg}
    cfg = cfg_class(d_in=dictionary.d, d_sae=len(dictionary), device=device, k=dictionary.k, **own)
    cfg.metadata = SAEMetadata(**_metadata(dictionary, False))
    sae = sae_class(cfg)
    sae.W_dec.data.copy_(dictionary.atoms)
    sae.b_dec.data.copy_(torch.zeros(dictionary.d) if dictionary.mean is None else dictionary.mean)
    return sae


def _classes(sae_base: Any, cfg_base: Any) -> tuple[type, type]:
    """The classes, which can only be made once SAELens is imported."""
    from dataclasses import dataclass, field

    from sae_lens.saes.sae import SAEMetadata

    @dataclass
    class ITDAConfig(cfg_base):
        """`k` steps of the pursuit `method`, "mp", "omp" or "gp"; `nonneg` for non-negative codes."""

        k: int = 40
        method: str = "mp"
        nonneg: bool = False
        metadata: Any = field(default_factory=SAEMetadata)  # a dict for a moment, when SAELens reads cfg.json

        @classmethod
        def architecture(cls) -> str:
            return "itda"

    class ITDASAE(sae_base):
        """Atoms as decoder rows; the encoder is the pursuit of this library."""

        @property
        def W_enc(self) -> Tensor:
            """(d_in, d_sae), which SAELens' weight metrics look at: the atoms too."""
            return self.W_dec.T

        def initialize_weights(self) -> None:
            shape: dict[str, Any] = dict(dtype=self.dtype, device=self.device)
            self.W_dec = torch.nn.Parameter(torch.zeros(self.cfg.d_sae, self.cfg.d_in, **shape))
            self.b_dec = torch.nn.Parameter(torch.zeros(self.cfg.d_in, **shape))

        def encode(self, x: Tensor) -> Tensor:
            """Signed codes (..., d_sae)."""
            x = self.process_sae_in(x)
            codes = pursue(x, self.W_dec, self.cfg.k, method=self.cfg.method, nonneg=self.cfg.nonneg)
            return self.hook_sae_acts_post(codes.dense().to(x.dtype))

        def decode(self, feature_acts: Tensor) -> Tensor:
            """Reconstructions (..., d_in)."""
            out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
            return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

        def fold_W_dec_norm(self) -> None:
            """Nothing to fold: atoms have unit norm."""

    return ITDASAE, ITDAConfig
