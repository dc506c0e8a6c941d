"""What is measured, and how long it is in tokens."""

from __future__ import annotations

#: A question, what stands before an answer, and an answer.
QUESTION, HEAD, ANSWER = 21, 3, 32
#: The longest history.
LONGEST = 100_000
#: What is prefilled, and folded, at once to see how fast that is.
PREFILL, FOLD = 1024, 200
#: Contenders, ours first.
NAMES = ("ccm", "ccm in llama.cpp", "llama.cpp", "full cache", "streaming-llm", "window", "resend")
