"""A folder of pages to look at a dictionary with, in a browser, without a network or the model: `itda page`.

What a page shows comes from the dictionary's folder alone: the dictionary, its uses (`itda.usage`) and what was
measured of it. `assets` has what browsers run, and the one library that it needs, with its licence.
"""
