"""How good a dictionary is: on held-out text, beside its controls and other systems, in one table.

What enters here is a measure of a dictionary, a control for it, or a way to find text that it has not read.
May use training, comparison, report and all below.
"""
