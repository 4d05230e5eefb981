"""SAEBench (0.6): a dictionary as one of its custom SAEs, for its evaluations.

Importing this module needs no SAEBench; `adapter` does. `benchmarks/interop.py` (`make interop`) runs SAEBench's core
evaluation on one offline, beside our own figures, and says where the two count differently.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from itda.dictionary.itda import ITDA
from itda.errors import InputError
from itda.interop.saelens import _metadata, check_unscaled
from itda.provenance import section

if TYPE_CHECKING:
    from sae_bench.custom_saes.base_sae import BaseSAE


def adapter(dictionary: ITDA, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> BaseSAE:
    """`dictionary` as SAEBench wants SAEs: `encode`, `decode`, weights (in `dtype`, on `device`) and a `cfg`.

    SAEBench counts a latent as active where it is above 0, so signed codes become the split ones of `itda export`:
    latents 0 to n-1 are positive coefficients, n to 2n-1 negative ones, and `W_dec` (2n, d) has the atoms and their
    negatives; with `nonneg`, latents are atoms. `W_enc` is zero, since no matrix encodes: what SAEBench says of
    encoder weights (its cosines are then 0, or -1 for NaN) means nothing. Codes are those of `dictionary.encode`,
    computed in float32 at least. `cfg` is SAEBench's and can be changed: where SAEBench loads the model, `model_name`
    has to be one that TransformerLens knows; what the dictionary does not say is None.

    Raises `InputError` for a dictionary with a `scale`, and without SAEBench.
    """
    check_unscaled(dictionary)
    try:
        from sae_bench.custom_saes.base_sae import BaseSAE
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises either
        said = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise InputError(
            f"SAEBench cannot be imported ({said}): install it with `pip install sae-bench==0.6.0` in an environment "
            "of its own (it wants numpy < 2 and datasets < 4), and beside a torch for the CPU uninstall torchvision."
        ) from error
    signed = not dictionary.nonneg
    return _class(BaseSAE)(dictionary, signed, _metadata(dictionary, signed), torch.device(device), dtype)


@cache
def _class(base: Any) -> Any:
    """The class of adapters, which can only be made once SAEBench is imported."""

    class ITDABench(base):
        """Atoms as decoder rows; the encoder is the pursuit of this library."""

        def __init__(self, dictionary: ITDA, signed: bool, meta: dict[str, Any], device: Any, dtype: Any) -> None:
            n, layer = len(dictionary) * (1 + signed), section(dictionary.cfg, "model").get("layer")
            super().__init__(dictionary.d, n, meta["model_name"], layer, device, dtype, hook_name=meta["hook_name"])
            self.dictionary, self.signed = dictionary, signed
            atoms = torch.cat([dictionary.atoms, -dictionary.atoms]) if signed else dictionary.atoms
            self.W_dec.data.copy_(atoms)
            if dictionary.mean is not None:
                self.b_dec.data.copy_(dictionary.mean)
            self.requires_grad_(False)
            cfg = {"architecture": "itda", "device": str(device), "apply_b_dec_to_input": True}
            cfg |= {"activation_fn_str": dictionary.method}
            cfg |= {"activation_fn_kwargs": {"k": dictionary.k, "nonneg": not signed}}
            cfg |= {name: meta[name] for name in ("hook_name", "context_size", "dataset_path", "prepend_bos")}
            for name, value in cfg.items():
                setattr(self.cfg, name, value)

        def encode(self, x: Tensor) -> Tensor:
            """Codes (..., d_sae), none below 0."""
            if self.dictionary.atoms.device != self.W_dec.device:
                self.dictionary = self.dictionary.to(self.W_dec.device)
            codes = self.dictionary.encode(x).dense()
            if self.signed:
                codes = torch.cat([codes.relu(), (-codes).relu()], -1)
            return codes.to(self.W_dec.dtype)

        def decode(self, feature_acts: Tensor) -> Tensor:
            """Reconstructions (..., d_in)."""
            return feature_acts.to(self.W_dec) @ self.W_dec + self.b_dec

        def forward(self, x: Tensor) -> Tensor:
            """Reconstructions of activations (..., d_in)."""
            return self.decode(self.encode(x))

    return ITDABench
