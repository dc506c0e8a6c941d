"""What a token of an answer costs behind 128 and 324 entries of memory, and what copies of the weights change.

The embedded model in float32, and behind the longer memory in bfloat16, each by its own forward pass, by the step of
``ccm.decoding`` and by that step from copies of the weights; ``generate`` and the server's engine. Ways are run in
turns, so that every load of the machine meets all of them. The share is of a limit: bytes of weights and of keys and
values that a token must read, over the bandwidth that is measured in the same turns, once in pages of 2 MB, which is
all that the machine can do, and once in those of 4 KB, in which tensors lie by themselves. With one thread times are
its own processor time.

Quality, in float32, is told by what was held out (benchmarks/held_out_rows.py): nats per token, how far they move,
and how often the likeliest token is another one.

    python benchmarks/decode.py --threads 1
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import held_out_rows
import torch
from common import parser, store
from held_out_rows import shared

import ccm
from ccm.bench.machine import bandwidth, clock_of
from ccm.core.reader import Reader
from ccm.decoding import Decoder, install
from ccm.methods.base import Method, segments_of
from ccm.methods.default import open_method
from ccm.serving.engine.padded import run

NEW, ANSWER, SCORED, SHORT = 16, 48, 18, 128
BYTES = {"float16": 2, "int8": 1}


class Ordinary(Decoder):
    """The model's own forward pass."""

    def run(self, model: Any, kwargs: Any) -> None:
        return None


class Ways:
    """The ways of one model to decode."""

    def __init__(self, model: Any):
        install(model)
        self.model = model
        self.known: dict[str, tuple[Decoder, str]] = {"ordinary": (Ordinary(), "model")}
        self.known |= {name: (Decoder(), name) for name in ("model", "float16", "int8")}

    def take(self, name: str) -> None:
        self.model.__dict__["_ccm_decoder"], self.model.ccm_decode_in = self.known[name]

    def check(self) -> None:
        """Raises if one of them came to nothing."""
        for name, (decoder, _) in self.known.items():
            if name != "ordinary" and not (decoder._steps and all(decoder._steps.values())):
                raise SystemExit(f"{name}: the model takes the ordinary way")


def generated(reader: Reader, memory: Any, prompt: Sequence[int], new: int) -> list[int]:
    never = reader.model.config.vocab_size  # the token that would end it
    out = reader.generate(
        [list(prompt)], memory, max_new_tokens=new, eos_token_id=never, pad_token_id=0, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def engine(reader: Reader, memory: Any, prompt: Sequence[int], clock: Callable[[], float]) -> float:
    """Seconds a token of the server's engine, without the drawing."""
    batch, logits = run(reader, reader.live(memory), torch.tensor([list(prompt)]))
    began = clock()
    for _ in range(NEW):
        batch, logits = run(reader, batch, logits.argmax(-1, keepdim=True))
    return (clock() - began) / NEW


def scores(reader: Reader, memory: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (T - 1, V) of a text behind a memory, a token at a time."""
    batch, found = reader.live(memory), []
    for i, token in enumerate(ids[:-1]):
        batch, logits = run(reader, batch, torch.tensor([[token]]))
        if i:  # the first one is the prompt
            found.append(logits[0].float().log_softmax(-1))
    return torch.stack(found)


def speeds(method: Method, memory: Any, prompt: Sequence[int], ways: Ways, threads: int, repeats: int) -> Any:
    reader, clock = method.reader, clock_of(threads)
    times: dict[str, dict[str, list[float]]] = {n: {"generate": [], "engine": []} for n in ways.known}
    widths: dict[str, list[float]] = {"": [], "_small_pages": []}
    for turn in range(repeats + 1):
        for name, own in times.items():
            ways.take(name)
            marks = [clock()]
            for new in (1 + NEW, 1):
                generated(reader, memory, prompt, new)
                marks.append(clock())
            taken = {"generate": (marks[1] - marks[0] - marks[2] + marks[1]) / NEW}
            taken["engine"] = engine(reader, memory, prompt, clock)
            for loop, seconds in taken.items() if turn else ():
                own[loop].append(seconds)
        for pages, seen in widths.items():
            seen.append(bandwidth(threads, large=not pages))
    ways.check()
    weights = sum(p.numel() for n, p in ways.model.named_parameters() if "lora_" not in n)
    entries = (memory.length + len(prompt) + NEW // 2) * method.reader.kv_bytes_per_token()
    result = {}
    for name, own in times.items():
        size = weights * BYTES.get(name, ways.model.dtype.itemsize) + entries
        result[name] = {"bytes": size}
        for loop, seconds in own.items():
            ratios = [a / b for a, b in zip(times["ordinary"][loop], seconds, strict=True)]
            result[name][loop] = {
                "tokens_per_second": round(1 / statistics.median(seconds), 1),
                "times_ordinary": round(statistics.median(ratios), 2),
            }
            for pages, seen in widths.items():
                shares = [size / s / w for s, w in zip(seconds, seen[1:], strict=True)]
                result[name][loop][f"share_of_bandwidth{pages}"] = round(statistics.median(shares), 2)
    most = {f"bandwidth{pages}": round(statistics.median(seen) / 1e9, 1) for pages, seen in widths.items()}
    return {**most, **result}


def quality(method: Method, rows: Any, ways: Ways, prompts: Sequence[Sequence[int]], memory: Any) -> Any:
    reader, found = method.reader, {}
    texts = [[token for segment in row.segments for token in segment] for row in rows]
    right: list[torch.Tensor] = []
    answers: list[list[int]] = []
    for name in ways.known:
        ways.take(name)
        made = [scores(reader, reader.empty(), text[:SCORED]) for text in texts]
        wrote = [generated(reader, memory, prompt, ANSWER) for prompt in prompts]
        right, answers = right or made, answers or wrote
        pairs = list(zip(made, right, texts, strict=True))
        nats = torch.cat([-m[range(len(m)), text[2 : len(m) + 2]] for m, _, text in pairs])
        others = torch.cat([m.argmax(-1) != r.argmax(-1) for m, r, _ in pairs])
        apart = torch.cat([(r.exp() * (r - m)).sum(-1) for m, r, _ in pairs])
        same = [shared(mine, other) for mine, other in zip(wrote, answers, strict=True)]
        found[name] = {
            "nats": round(float(nats.mean()), 4),
            "kl": round(float(apart.mean()), 6),
            "other_choices": round(float(others.float().mean()), 4),
            "answer_tokens_before_the_first_other_one": same,
        }
    return {"tokens": len(nats), **found}


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"task": "decode behind a memory, one token at a time"}
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = ccm.load_default_model(dtype)
        method = open_method("ccm-chat", model, tokenizer)
        ways = Ways(model)
        rows = held_out_rows.load(held_out_rows.FILE)
        chosen = [part[0] for part in rows.values()]
        memory, memories = method.empty(), []
        text = [token for row in chosen for segment in row.segments for token in segment]
        while memory.length < method.limit:
            before = memory.length
            memory = method.take_in(memory, [segments_of(tuple(text[:128]), method.longest)])
            text = text[128:]
            if before < SHORT <= memory.length and dtype == "float32":
                memories.append(memory)
        asked = ("What did we talk about?", "Tell me a story about a cat.")
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": q}], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            for q in asked
        ]
        result[dtype] = {
            f"{held.length} entries": speeds(
                method, held, prompts[0], ways, arguments.threads, arguments.limit or 5
            )
            for held in [*memories, memory]
        }
        if dtype == "float32":
            result[dtype]["quality"] = quality(method, chosen, ways, prompts, memory)
        store("decode", result)


if __name__ == "__main__":
    main()
