"""What is alike in two or more models (`compare`), and what fine-tuning changed (`diff`).

What enters here aligns the tokens that models share, builds dictionaries on them, and asks `similarity` for numbers.
May use report, which draws its results, and all below.
"""
