"""Hugging Face models: found, loaded no further than needed, and read at hook points.

What enters here is about one model: where its blocks are, where its weights lie, who runs it. `loading.load_model`
chooses. May use text (for the identity of a tokenizer) and the vocabulary.
"""
