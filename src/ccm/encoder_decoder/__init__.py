"""Encoder-decoder models behind the same names: the context is read by the encoder, what is asked is written by the decoder."""
