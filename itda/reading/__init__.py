"""Activations with their labels: from a model that reads text (`activations`), or from disk (`Store`, SAELens' caches).

What enters here yields batches of (activations, labels), or writes them to disk (`collect`).
May use models and text; it does not know dictionaries, which are built from any iterator of batches.
"""
