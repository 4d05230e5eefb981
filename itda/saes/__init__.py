"""Sparse autoencoders: what one is, its folder in SAELens' format, and its training (`itda.train_sae`).

What enters here makes, holds or runs SAEs. May use reading and all below: an SAE can begin with the atoms of an ITDA.
"""

from itda.saes.top_afa import top_afa

__all__ = ["top_afa"]
