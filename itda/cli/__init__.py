"""The command line: one function for each command, one library call each.

What enters here parses words, prints results and handles signals; flags are built from `itda.settings`.
May use everything below, imported when a command runs, so that `itda --help` stays quick. Nothing uses it.
"""
