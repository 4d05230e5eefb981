"""`SAE`: a sparse autoencoder of any kind, trained here or read from SAELens' format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from itda.codes import Codes
from itda.disk import small_file
from itda.errors import InputError, counted
from itda.provenance import section
from itda.pursuit import normalize, pursue
from itda.saes import activations, folder
from itda.saes.top_afa import top_afa

# The name that SAELens has for each kind; batchtopk has a threshold once it is trained, and is a jumprelu then.
ARCHITECTURES = {
    "topk": "topk",
    "batchtopk": "jumprelu",
    "relu": "standard",
    "jumprelu": "jumprelu",
    "top-afa": "top_afa",
    "mp": "matching_pursuit",
}
KINDS = tuple(ARCHITECTURES)
CHUNK = 512  # tokens whose pre-activations are held at a time
EPSILON = 1e-5  # added to deviations by "layer_norm"


@dataclass(frozen=True, repr=False, eq=False)
class SAE:
    """codes = f((x - b_dec) @ W_enc + b_enc), x_hat = codes @ W_dec + b_dec, with f by `kind`.

    kind       "topk": the k largest; "batchtopk" and "jumprelu": what is above `threshold` (n_atoms,); "relu": what is
               positive; "top-afa": as many as make the code as long as x - b_dec (`top_afa`); "mp": no encoder, but
               matching pursuit in k steps with coefficients of zero or more
    W_enc      (d, n_atoms); of "mp" the transpose of W_dec
    W_dec      (n_atoms, d); its rows have unit norm where it was trained here
    k          of topk and mp; of batchtopk the mean that it was trained for
    normalize  "layer_norm" takes the mean over the coordinates from each activation, divides by the deviation over
               them, and puts both back into reconstructions: errors and codes are then of what is so normalised
    subtract   whether b_dec is taken from activations before they are encoded
    metadata   what cfg.json says of where it was made: `model_name`, `hook_name`, ...
    """

    kind: str
    W_enc: Float[Tensor, "d n_atoms"]
    b_enc: Float[Tensor, " n_atoms"]
    W_dec: Float[Tensor, "n_atoms d"]
    b_dec: Float[Tensor, " d"]
    k: int | None = None
    threshold: Float[Tensor, " n_atoms"] | None = None
    normalize: Literal["none", "layer_norm"] = "none"
    subtract: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        k = f", k={self.k}" if self.k is not None else ""
        return f"SAE({self.kind!r}, {counted(self.n_atoms, 'latent')} of width {self.d}{k})"

    @property
    def n_atoms(self) -> int:
        """How many latents it has."""
        return len(self.W_dec)

    @property
    def d(self) -> int:
        """The width of an activation."""
        return self.W_dec.shape[1]

    @property
    def atoms(self) -> Float[Tensor, "n_atoms d"]:
        """The directions that latents write, of unit norm."""
        return normalize(self.W_dec)

    @property
    def hook_point(self) -> str | None:
        """Where it was made for, if it says so."""
        found = self.metadata.get("hook_name")
        return found if isinstance(found, str) and found else None

    def to(self, device: torch.device | str) -> SAE:
        """The same SAE on `device`."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        return replace(self, **{n: t.to(device) for n in names if (t := getattr(self, n)) is not None})

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d"]) -> Codes:
        """The codes (..., most) of activations (..., d); `most` is k, or the most that any of them has.

        Raises `InputError` for activations of another width.
        """
        self._check_width(x)
        flat = x.reshape(-1, self.d).to(self.W_dec)
        codes = Codes.concat([self._encoded(part) for part in flat.split(CHUNK)])
        return codes.reshape(*x.shape[:-1])

    @torch.no_grad()
    def decode(self, codes: Codes, of: Float[Tensor, "*batch d"] | None = None) -> Float[Tensor, "*batch d"]:
        """Reconstructions (..., d). With `normalize`, `of` has to be the activations that were encoded."""
        x_hat = codes.decode(self.W_dec) + self.b_dec
        if self.normalize == "none":
            return x_hat
        if of is None:
            raise InputError("This SAE normalises each activation: pass the activations too, as `decode(codes, x)`.")
        mean, deviation = _moments(of.to(self.W_dec))
        return x_hat * deviation + mean

    def reconstruct(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """`decode(encode(x), x)`."""
        return self.decode(self.encode(x), x)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d:
            raise InputError(
                f"{self!r} is for activations of width {self.d}, and these have {x.shape[-1]}: give one of this hook "
                "point."
            )

    def _encoded(self, x: Tensor) -> Codes:
        x = x if self.normalize == "none" else standardised(x)
        x = x - self.b_dec if self.subtract else x
        if self.kind == "mp":
            assert self.k is not None
            return pursue(x, self.W_dec, self.k, nonneg=True)
        pre = x @ self.W_enc + self.b_enc
        if self.kind == "topk":
            assert self.k is not None
            values, indices = pre.topk(self.k, dim=1)
            return Codes(torch.where(values > 0, indices, 0), values.relu(), self.n_atoms)
        return Codes.of_dense(self._activated(pre, x))

    def _activated(self, pre: Tensor, x: Tensor) -> Tensor:
        if self.kind == "relu":
            return activations.relu(pre)
        if self.kind == "top-afa":
            return top_afa(pre.relu(), x.norm(dim=1), self.W_dec.norm(dim=1))
        assert self.threshold is not None
        return activations.jumprelu(pre, self.threshold)

    def cfg(self) -> dict[str, Any]:
        """What cfg.json says of it, as SAELens has it."""
        out = {
            "d_in": self.d,
            "d_sae": self.n_atoms,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": self.subtract,
            "normalize_activations": self.normalize,
            "reshape_activations": "none",
            "architecture": ARCHITECTURES[self.kind],
        }
        out |= {"k": self.k, "rescale_acts_by_decoder_norm": False} if self.kind == "topk" else {}
        if self.kind == "mp":
            out |= {"residual_threshold": 0.0, "max_iterations": self.k, "stop_on_duplicate_support": False}
        return out | {"metadata": {"sae_lens_version": folder.FORMAT, **self.metadata}}

    # -- on disk ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike, **about: Any) -> Path:
        """Write it as the folder `path`, which SAELens loads; returns where. `about` is kept in `metadata.itda`.

        An SAE that was trained here is replaced; raises `InputError` for a folder that holds anything else.
        """
        out, cfg = folder.target_of(path), self.cfg()
        tensors = {"W_dec": self.W_dec, "b_dec": self.b_dec}
        tensors |= {} if self.kind == "mp" else {"W_enc": self.W_enc, "b_enc": self.b_enc}
        tensors |= {} if self.threshold is None else {"threshold": self.threshold}
        cfg["metadata"]["itda"] = section(self.metadata, "itda") | about | {"kind": self.kind, "k": self.k}
        folder.write(out, cfg, {name: tensor.float() for name, tensor in tensors.items()}, folder.TRAINED)
        return out

    @classmethod
    def load(cls, path: str | os.PathLike) -> SAE:
        """The SAE in the folder `path`, in SAELens' format; needs no SAELens.

        Raises `InputError` for a folder without one, one that is damaged, and one that SAELens alone can run.
        """
        if not os.path.isfile(Path(path) / folder.CFG):
            raise InputError(f"{path} holds no {folder.CFG}, so it is no SAE: give the folder of one.")
        before = folder.digests(Path(path))
        found = cls.read(path)
        if folder.digests(Path(path)) != before:
            raise InputError(f"{path} was replaced while it was read: run it again.")
        if found is None:
            raise InputError(
                f"{path} holds no SAE that can be run without SAELens: `itda.interop.saelens.load_sae` tries it with."
            )
        return found

    @classmethod
    def read(cls, path: str | os.PathLike) -> SAE | None:
        """The SAE in a folder in SAELens' format; None for what is damaged, or what SAELens alone can run."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            cfg = json.loads(small_file(Path(path) / folder.CFG))
            tensors = load_file(Path(path) / folder.WEIGHTS)
            return cls.of(cfg, tensors) if isinstance(cfg, dict) else None
        except InputError:
            raise
        except (OSError, ValueError, RecursionError, SafetensorError):
            return None

    @classmethod
    def of(cls, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SAE | None:
        """What cfg.json and the weights of SAELens say, as an `SAE`; None where there is no kind for it.

        Raises `InputError` for weights that are not finite.
        """
        said = section(cfg, "metadata")
        architecture = cfg.get("architecture")
        kind = next((kind for kind, name in ARCHITECTURES.items() if name == architecture), None)
        if kind is None or "sae_lens_version" not in said or cfg.get("reshape_activations", "none") != "none":
            return None
        ours = section(said, "itda")
        kind = {"batchtopk": "batchtopk" if ours.get("kind") == "batchtopk" else "jumprelu"}.get(kind, kind)
        named = _weights(kind, cfg, tensors)
        normalised = cfg.get("normalize_activations", "none")
        if named is None or normalised not in ("none", "layer_norm"):
            return None
        k = {"topk": cfg.get("k"), "mp": cfg.get("max_iterations"), "batchtopk": ours.get("k")}.get(kind)
        is_count = type(k) is int and 0 < k <= len(named["W_dec"])
        if (kind in ("topk", "mp") and not is_count) or (kind == "mp" and not _is_plain_pursuit(cfg, named["W_dec"])):
            return None
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise InputError(f"An SAE has numbers in {name} that are not finite: give another one.")
        subtract = bool(cfg.get("apply_b_dec_to_input", True))
        return cls(
            kind, **named, k=k if is_count else None, normalize=normalised, subtract=subtract, metadata=dict(said)
        )


def _weights(kind: str, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights by name in float32, if they are those of such an SAE."""
    d, n = cfg.get("d_in"), cfg.get("d_sae")
    wanted: dict[str, tuple] = {"W_dec": (n, d), "b_dec": (d,)}
    wanted |= {} if kind == "mp" else {"W_enc": (d, n), "b_enc": (n,)}
    wanted |= {"threshold": (n,)} if kind in ("jumprelu", "batchtopk") else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != wanted or not all(tensor.is_floating_point() for tensor in tensors.values()):
        return None
    found = {name: tensor.float() for name, tensor in tensors.items()}
    if kind == "mp":
        return found | {"W_enc": found["W_dec"].T, "b_enc": found["W_dec"].new_zeros(len(found["W_dec"]))}
    if kind == "topk" and cfg.get("rescale_acts_by_decoder_norm"):
        norms = found["W_dec"].norm(dim=1)
        if not bool((norms > 0).all()):
            return None
        found |= {"W_enc": found["W_enc"] * norms, "b_enc": found["b_enc"] * norms}
        found["W_dec"] = found["W_dec"] / norms[:, None]
    return found


def _is_plain_pursuit(cfg: Mapping[str, Any], atoms: Tensor) -> bool:
    """Whether SAELens' pursuit, so set, does what ours does: so many steps with rows of unit norm."""
    stops = cfg.get("residual_threshold") != 0 or cfg.get("stop_on_duplicate_support") is not False
    unit = bool(((atoms.norm(dim=1) - 1).abs() < 1e-4).all())
    return not stops and unit and bool(cfg.get("apply_b_dec_to_input", True))


def standardised(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Each activation less the mean over its coordinates, over their deviation."""
    mean, deviation = _moments(x)
    return (x - mean) / (deviation + EPSILON)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation over the coordinates, (..., 1) each."""
    mean = x.mean(-1, keepdim=True)
    return mean, ((x - mean).square().sum(-1, keepdim=True) / max(1, x.shape[-1] - 1)).sqrt()
