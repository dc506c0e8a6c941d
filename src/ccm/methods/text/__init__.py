"""Text: what is kept is words, in fewer tokens, and the model reads them anew."""
