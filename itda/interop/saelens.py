"""SAELens (v6): folders that it loads by itself, an architecture that keeps signed codes, and its SAEs as systems.

`export` and `load_sae` serve `itda export` and `itda eval --sae`. Importing this module needs no SAELens; what needs it
says so. After `register()`, SAELens knows the architecture "itda".
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from itda.arguments import ITDA as ITDA_KIND
from itda.arguments import PATH, TEXT, checks
from itda.codes import Codes
from itda.dictionary.folder import ATOMS
from itda.dictionary.itda import ITDA
from itda.errors import InputError, first_line
from itda.evaluation.systems import System
from itda.interop import formats, saelens_hub
from itda.interop.made_for import check, check_place
from itda.interop.top_afa import top_afa_classes
from itda.provenance import section
from itda.pursuit import normalize, pursue
from itda.saes import folder
from itda.saes.sae import CHUNK, SAE
from itda.shortages import shortage, shortages_told

if TYPE_CHECKING:
    from sae_lens import SAE as TheirSAE

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
    out = folder.target_of(out)
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
        folder.write(out, cfg, tensors, folder.EXPORT)
    return out


def check_unscaled(dictionary: ITDA) -> None:
    """Raise `InputError` for a dictionary whose coordinates are over their deviations, which an SAE cannot say."""
    if dictionary.scale is not None:
        raise InputError(
            f"{dictionary!r} was built with `scale` = 'std', and an SAE has one weight for all coordinates: build one "
            "without `scale` (`--scale`) to hand it on."
        )


def _metadata(dictionary: ITDA, signed: bool) -> dict[str, Any]:
    """What SAELens and its users look for, and what each latent is."""
    labels = dictionary.labels
    return folder.metadata(dictionary.cfg) | {
        "itda": {
            "k": dictionary.k,
            "split": signed,
            "stream_hash": section(dictionary.cfg, "stream").get("hash"),
            "labels": [[*map(int, pair), labels.text(i)] for i, pair in enumerate(labels.pairs().tolist())],
        },
    }


@checks(path=PATH, name=TEXT)
def load_sae(path: str | os.PathLike, name: str | None = None, device: str = "cpu") -> System:
    """An SAE as a `System` for `itda.evaluate`: a folder in SAELens' format, one of the hub, or in another format.

    A name on the hub is release/sae_id of SAELens' list, or org/repository/folder, where nothing here is called so;
    other formats are those of `itda.interop.formats`. What `itda.saes.sae.SAE` can be, it becomes; SAELens runs the
    rest and reads names, and has to be installed for that.

    Raises `InputError` for what cannot be loaded, for an SAE in SAELens' format that does not say at which hook point
    it was made, and as `system_of` does.
    """
    if not os.path.lexists(path):
        saelens_hub.check_name(os.fspath(path))
        register()
        named = saelens_hub.load(os.fspath(path), device)
        check_place(_said(named), name := name or os.fspath(path))
        return system_of(named, name)
    if not os.path.isfile(Path(path) / folder.WEIGHTS) and (other := formats.read(path)) is not None:
        return system_of(other.to(device), name or formats.name_of(path))
    if not os.path.isfile(Path(path) / folder.CFG):
        raise InputError(f"{path} holds no {folder.CFG}, so it is no SAE in SAELens' format: give the folder of one.")
    if os.path.isfile(Path(path) / ATOMS):
        raise InputError(f"{path} is an ITDA, and an SAE in SAELens' format was wanted: export it, or give another.")
    name = name or formats.name_of(path)
    before = folder.digests(Path(path))
    found = SAE.read(path)
    sae = _by_saelens(path, device) if found is None else found.to(device)
    if folder.digests(Path(path)) != before:  # the files are opened by their names
        raise InputError(f"{path} was replaced while it was read: run it again.")
    check_place(_said(sae), name)
    return system_of(sae, name)


def _by_saelens(path: str | os.PathLike, device: str) -> TheirSAE:
    register()
    from sae_lens import SAE as TheirSAE

    try:
        sae = TheirSAE.load_from_disk(str(path), device=device)
    except Exception as error:
        raise shortage(error, f"{path} could not be loaded") or InputError(
            f"SAELens cannot load {path} ({type(error).__name__}: {first_line(error)}): give another folder."
        ) from error
    for key, value in sae.state_dict().items():
        if not bool(value.isfinite().all()):
            raise InputError(f"The SAE in {path} has numbers in {key} that are not finite: give another folder.")
    return sae


def system_of(sae: SAE | TheirSAE, name: str, **cost: Any) -> System:
    """An SAE, or one that SAELens has loaded, as a `System`; its codes are as many as are not zero.

    Raises `InputError` for what writes other activations than it reads, or reads others than those of the model as it
    is: transcoders, single heads, scaled or centred activations.
    """
    check(cfg := _said(sae), name)
    ours = sae if isinstance(sae, SAE) else SAE.of(cfg, sae.state_dict())
    if ours is not None:
        return System.of_sae(ours, name, **cost)
    return _run_by_saelens(sae, name, cost)


def _said(sae: SAE | TheirSAE) -> dict[str, Any]:
    """What cfg.json says of an SAE."""
    return sae.cfg() if isinstance(sae, SAE) else sae.cfg.to_dict()


def _run_by_saelens(sae: TheirSAE, name: str, cost: dict[str, Any]) -> System:
    """What no `SAE` of ours can be."""
    rows, bias = sae.W_dec.detach().float().cpu(), getattr(sae, "b_dec", None)
    atoms = normalize(rows)

    @torch.no_grad()
    def run(x: Tensor) -> tuple[Tensor, Codes]:
        if x.shape[1] != atoms.shape[1]:
            raise InputError(
                f"The SAE {name!r} is for activations of width {atoms.shape[1]}, and these have {x.shape[1]}: give one "
                "of this hook point."
            )
        parts, codes = [], []
        for part in x.to(sae.device, sae.dtype).split(CHUNK):
            try:
                features = sae.encode(part)
                parts.append(sae.decode(features).float())
            except InputError:
                raise
            except (TypeError, ValueError) as error:  # of settings in cfg.json that are none
                raise InputError(
                    f"SAELens cannot run {name!r} ({type(error).__name__}: {first_line(error)}): give another SAE."
                ) from error
            codes.append(Codes.of_dense(features))
        return torch.cat(parts), Codes.concat(codes)

    hook, k, model = sae.cfg.metadata.hook_name, getattr(sae.cfg, "k", None), sae.cfg.metadata.model_name
    place, made_for = (each if isinstance(each, str) and each else None for each in (hook, model))
    own: dict[str, Any] = {"rows": rows, "bias": None if bias is None else bias.detach().float().cpu()}
    if sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        own["inner"] = torch.no_grad()(lambda x: sae.run_time_activation_norm_fn_in(x.to(sae.device, sae.dtype)))
    return System(name, atoms, run, k if isinstance(k, int) else None, cost, place, made_for=made_for, **own)


@cache
def register() -> tuple[type, type]:
    """Make SAELens know the architectures "itda" and "top_afa"; returns the class and the config of the first.

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
    register_sae_class("top_afa", *top_afa_classes())
    return sae_class, cfg_class


def as_sae(dictionary: ITDA, device: str = "cpu") -> TheirSAE:
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
