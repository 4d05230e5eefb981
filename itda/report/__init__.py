"""What a person sees: reports in the terminal, pictures and pages.

Texts come from models and data: none is taken for markup, and no control character of theirs reaches the terminal.
Used by comparison and evaluation, which make their own results; a report of theirs is of type Any here.
May use reading and all below.
"""

from itda.report.contents import AtomReport, Found, Summary, atom_report, find, summary
from itda.report.decomposition import Decomposition, Decompositions, decompose, decompose_all

__all__ = [
    "AtomReport",
    "Decomposition",
    "Decompositions",
    "Found",
    "Summary",
    "atom_report",
    "decompose",
    "decompose_all",
    "find",
    "summary",
]
