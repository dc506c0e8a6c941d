"""What a turn costs beside its answer: taking in text, and remembering what was written.

Both as ratios of one interleaved run, and in passes of the model and tokens that they run over, which no load of the
machine changes:

* 200 tokens taken in over a full memory of 256 slots, segment by segment and in one pass, against plainly prefilling
  the same tokens over as many entries, by transformers alone on a copy of the model that has no adapter;
* 4,000 tokens pasted at once, some 3,000 words, against a prefill of them;
* an answer of 24 tokens remembered, read again and taken over from what wrote it, against a prefill of its tokens.

    python benchmarks/turn_cost.py --threads 1
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from common import parser, store

import ccm
from ccm.core.live import Live
from ccm.core.room import CACHE
from ccm.methods.base import segments_of
from ccm.methods.default import open_method

TEXT, PASTE, ANSWER = 200, 4_000, 24


@contextmanager
def passes(body: torch.nn.Module) -> Iterator[list[int]]:
    """Tokens of each pass of a decoder."""
    found: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append(
            (kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]).shape[1]
        )

    hook = body.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def measure(
    calls: dict[str, Callable[[], object]], bodies: Sequence[torch.nn.Module], repeats: int
) -> dict[str, Any]:
    """Of calls that are run in turns: passes, tokens, median seconds, and the ratio to the first one of each turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    ran: dict[str, list[int]] = {}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            with passes(bodies[name != "prefill"]) as ran[name]:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    times = {name: own[1:] for name, own in times.items()}
    (first, *_), result = times.values(), {}
    for name, own in times.items():
        ratios = sorted(b / a for a, b in zip(first, own, strict=True))
        result[name] = {
            "passes": len(ran[name]),
            "tokens": sum(ran[name]),
            "seconds": round(statistics.median(own), 4),
            "ratio": round(statistics.median(ratios), 2),
            "spread": [round(ratios[len(ratios) // 4], 2), round(ratios[-1 - len(ratios) // 4], 2)],
        }
    return result


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = arguments.limit or 9
    clean, _ = ccm.load_default_model()  # never sees an adapter
    model, tokenizer = ccm.load_default_model()
    method = open_method("ccm-chat", model, tokenizer)
    reader = method.reader
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1000, 40000, (count,), generator=generator).tolist())

    memory = method.empty()
    while memory.length < method.limit or memory.slots < 256:
        memory = method.take_in(memory, [segments_of(words(256), method.longest)])
    text, paste, answer = words(TEXT), words(PASTE), words(ANSWER)

    def prefill(ids: tuple[int, ...]) -> object:
        cache = Live.over(memory, reader.rotary, clean.dtype).cache
        return clean.base_model(input_ids=torch.tensor([ids]), use_cache=True, **{CACHE: cache})

    def one_by_one() -> object:
        after = memory
        for part in segments_of(text, method.longest):
            after = method.fold(after, [part])
        return after

    def pasted() -> object:
        after, left = memory, segments_of(paste, method.longest)
        while left:
            count = method.portion(after.length, left)
            after, left = method.take_in(after, [left[:count]]), left[count:]
        return after

    parts = segments_of(text, method.longest)
    (known,) = reader.read([answer[:-1]], memory)
    taking_in = {
        "prefill": lambda: prefill(text),
        "segment by segment": one_by_one,
        "one pass": lambda: method.take_in(memory, [parts]),
    }
    pasting = {"prefill": lambda: prefill(paste), "as a session takes it in": pasted}
    remembering = {
        "prefill": lambda: prefill(answer),
        "read again, then folded": lambda: method.fold(memory, [answer]),
        "read again, one pass": lambda: method.take_in(memory, [[answer]]),
        "taken over": lambda: method.take_in(memory, [[answer]], read=[known]),
    }
    bodies = clean.base_model, reader.body
    store(
        "turn_cost",
        {
            "task": "take in text, and remember an answer, against prefilling as many tokens",
            "memory": {"method": method.text, "entries": memory.length, "slots": memory.slots},
            "taking_in": {"tokens": TEXT, **measure(taking_in, bodies, repeats)},
            "pasting": {"tokens": PASTE, **measure(pasting, bodies, min(repeats, 3))},
            "remembering": {"tokens": ANSWER, **measure(remembering, bodies, repeats)},
        },
    )


if __name__ == "__main__":
    main()
