"""top-AFA as an architecture of SAELens: its SAEs are those of `itda.saes`, made to run there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from itda.saes.top_afa import top_afa


def top_afa_classes() -> tuple[type, type]:
    """The class of SAEs and that of their config, which can only be made once SAELens is imported."""
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    @dataclass
    class TopAFAConfig(StandardSAEConfig):
        """Nothing but what every SAE has."""

        metadata: Any = field(default_factory=SAEMetadata)  # a dict for a moment, when SAELens reads cfg.json

        @classmethod
        def architecture(cls) -> str:
            return "top_afa"

    class TopAFASAE(StandardSAE):
        """As many latents of a token as make its code as long as x - b_dec."""

        def encode(self, x: Tensor) -> Tensor:
            """Codes (..., d_sae)."""
            x = self.process_sae_in(x)
            acts = self.hook_sae_acts_pre(x @ self.W_enc + self.b_enc).relu()
            flat, norms = acts.reshape(-1, acts.shape[-1]), self.W_dec.norm(dim=1)
            return self.hook_sae_acts_post(top_afa(flat, x.reshape(len(flat), -1).norm(dim=1), norms).view_as(acts))

    return TopAFASAE, TopAFAConfig
