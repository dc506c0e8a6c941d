"""Memories in llama.cpp (llama-cpp-python): it reads and writes, and what it has read is folded.

    memory -> places -> state of a sequence -> llama.cpp -> state -> keys and values -> memory

``library`` has the calls, ``layout`` the bytes of a state, ``runtime`` the sequences, ``reader`` a method's model.
"""
