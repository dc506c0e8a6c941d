"""Encoder-decoder models behind the same names: their encoder reads the context, their decoder writes the answers."""
