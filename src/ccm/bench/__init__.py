"""``ccm bench``: how fast a memory is beside what one would do without it, in one run.

``contenders`` are ways to keep a conversation, ``worker`` is the process of one, or of those that share a model,
``run`` takes them in turns, ``page`` shows what came out.
"""
