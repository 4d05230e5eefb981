"""Trainings from names to folders: one (`train`), many (`sweep`), and the processes that do them.

What enters here orchestrates: it loads, reads, builds, improves and saves by what is below, and goes on where it was
interrupted. May use reading and all below; it decides nothing about a dictionary itself.
"""
