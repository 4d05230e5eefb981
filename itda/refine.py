"""`itda.refine`: keep the most useful atoms of a dictionary (`select`), or move them (`refine`). The public face."""

from itda.dictionary.refine import refine, select

__all__ = ["refine", "select"]
