"""Text of any kind as documents, and documents as token rows in a fixed, hashed order.

What enters here depends on the text, the tokenizer and the settings alone, so that the same data give the same rows.
May use the vocabulary.
"""
