"""Dictionaries: `ITDA`, its folder, Algorithm 1 (`admission`, `builder`, `build`), and what improves one (`refine`).

What enters here takes activations and labels, from wherever they come.
May use pursuit and the vocabulary; it does not know models or text.
"""
