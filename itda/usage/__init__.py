"""What every atom does over a million tokens: how often, how strongly, where, beside which others, and to what end.

Codes and labels enter, in any order and of any batches; what is kept is one folder beside the dictionary.
May use reading and all below.
"""
