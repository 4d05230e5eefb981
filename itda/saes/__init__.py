"""Sparse autoencoders: trained here, beside the dictionaries that they are compared with.

What enters here makes an SAE, or is part of one. May use training, reading and all below; no table and no picture.
"""

from itda.saes.top_afa import top_afa

__all__ = ["top_afa"]
