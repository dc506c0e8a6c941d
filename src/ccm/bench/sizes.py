"""What is measured, and how long it is in tokens."""

from __future__ import annotations

#: A question, what stands before an answer, and an answer.
QUESTION, HEAD, ANSWER = 21, 3, 32
#: The longest history.
LONGEST = 100_000
#: What is prefilled, and folded, at once to see how fast that is.
PREFILL, FOLD = 1024, 200
#: Entries of the memory, and of what is measured beside it.
ENTRIES = 328
#: Contenders, ours first.
NAMES = (
    "ccm",
    "ccm in llama.cpp",
    "llama.cpp",
    "vllm",
    "full cache",
    "kvpress",
    "streaming-llm",
    "window",
    "resend",
)
