"""What conversations take at rest and while they are answered, and what rounding them changes.

    python benchmarks/at_rest.py answers    greedy answers and log-likelihoods behind memories stored after every turn
    python benchmarks/at_rest.py store      bytes of a conversation in the default store, turn by turn
    python benchmarks/at_rest.py ram        bytes of the process while conversations are answered side by side

Every part is stored in ``results/at_rest.json`` as soon as it is there. Bytes are measured: those that the store
holds of one conversation, and the resident set of the process. To compare with an earlier release, set
PYTHONPATH to its sources and give the parts another name with ``--as``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from common import RESULTS, environment, parser
from held_out_rows import FILE, load

import ccm
from ccm.core.memory import Memory
from ccm.core.segments import left_padded
from ccm.methods import Method
from ccm.methods.base import segments_of
from ccm.methods.default import open_method
from ccm.serving.engine import Job, PaddedEngine, Result, Sampling
from ccm.serving.store import Limits, Snapshot, codec, open_store

PRECISIONS = ("float32", "float16", "bfloat16", "int8")
SOURCES = ("chitchat", "topical-chat", "coqa", "facts", "chitchat, forty turns")
#: Rows that are answered side by side, and tokens of an answer.
SIDE, ANSWER = 8, 24
#: Tokens of a turn, and turns of the conversation that is stored.
TURN, TURNS = 56, 40


def stored(method: Method, memory: Memory, precision: str) -> bytes:
    """As the server stores it."""
    if not hasattr(method, "means"):  # a release before 16 bits
        return codec.encode(memory, precision)[0]
    return codec.encode(memory, precision, [method.means(row.steps) for row in memory.rows])[0]


def back(method: Method, data: bytes) -> Memory:
    return method.admit(codec.decode(data)[0])


# ---------------------------------------------------------------------- answers


@torch.inference_mode()
def answers(limit: int) -> dict[str, Any]:
    """Of each memory and precision: greedy answers equal to those of fp32, and what the true answer loses."""
    model, tokenizer = ccm.load_default_model()
    rows = load(FILE)
    chosen = [row for source in SOURCES for row in rows[source][:limit]]
    found: dict[str, Any] = {"sources": SOURCES, "rows": len(chosen), "answer_tokens": ANSWER}
    for name in ("ccm-chat", "ccm-merge"):
        method = open_method(name, model, tokenizer)
        tally: dict[str, Any] = {p: {"equal": 0, "off": [], "worst": 0.0} for p in PRECISIONS}
        for start in range(0, len(chosen), SIDE):
            part = chosen[start : start + SIDE]
            right: Any = None
            for precision in PRECISIONS:
                texts, nats = _answered(method, part, precision)
                right = right or (texts, nats)
                for text, own, told, whole in zip(texts, nats, *right, strict=True):
                    tally[precision]["equal"] += text == told
                    tally[precision]["off"] += (own - whole).tolist()
                    tally[precision]["worst"] = max(
                        tally[precision]["worst"], (own - whole).abs().max().item()
                    )
        found[name] = {
            precision: {
                "equal_answers": own["equal"],
                "nats_per_token": round(statistics.mean(own["off"]), 5),
                "largest_of_a_token": round(own["worst"], 4),
                "scored_tokens": len(own["off"]),
            }
            for precision, own in tally.items()
        }
        print(json.dumps({name: found[name]}), flush=True)
    return found


def _answered(
    method: Method, part: Sequence[Any], precision: str
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy answers, and log-likelihoods of the tokens of the true ones; memories are stored after every segment."""
    memories = [method.empty() for _ in part]
    for k in range(max(len(row.segments) for row in part) - 1):
        those = [i for i, row in enumerate(part) if k < len(row.segments) - 1]
        pieces = [segments_of(part[i].segments[k], method.longest) for i in those]
        after = method.take_in(Memory.stack([memories[i] for i in those]), pieces)
        for j, i in enumerate(those):
            memories[i] = back(method, stored(method, after[j], precision))
    held = Memory.stack(memories)
    begins = [next((t for t, role in enumerate(row.roles[-1]) if role), 3) for row in part]
    device = method.reader.model.device
    ids, mask = left_padded([row.segments[-1][:b] for row, b in zip(part, begins, strict=True)], device)
    out = method.reader.generate(ids, held, mask, max_new_tokens=ANSWER, do_sample=False)[:, ids.shape[1] :]
    lasts = [row.segments[-1] for row in part]
    ids, mask = left_padded(lasts, device)
    logs = method.reader.logits(ids, held, mask).log_softmax(-1)
    nats = []
    for r, (last, begin) in enumerate(zip(lasts, begins, strict=True)):
        own = logs[r, -len(last) :][begin - 1 : -1]
        nats.append(own.gather(1, torch.tensor(last[begin:]).unsqueeze(1)).squeeze(1))
    return out.tolist(), nats


# ---------------------------------------------------------------------- store


@torch.inference_mode()
def store(limit: int) -> dict[str, Any]:
    """Bytes of one conversation in a SQLite store, and of what each commit adds."""
    model, tokenizer = ccm.load_default_model()
    method = open_method("ccm-chat", model, tokenizer)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"memory": method.text, "tokens_per_turn": TURN}
    ways = [("float32", False)]
    if hasattr(codec, "cuts"):
        ways += [("float32", True), ("float16", True), ("int8", True)]
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            f"{p}, {'equal parts once' if cut else 'whole'}": (
                open_store(f"sqlite://{folder}/{p}{cut}.db", Limits(keep=4, marks=3)),
                p,
                cut,
            )
            for p, cut in ways
        }
        for opened, _, _ in stores.values():
            opened.create("t", "one")
        memory, seconds = method.empty(), {name: [] for name in stores}
        for turn in range(1, limit + 1):
            words = torch.randint(1000, 40000, (TURN,), generator=generator).tolist()
            memory = method.take_in(memory, [segments_of(words, method.longest)])
            for name, (opened, precision, cut) in stores.items():
                began = time.perf_counter()
                data = stored(method, memory, precision)
                given = Snapshot(data, {}, cuts=codec.cuts(data)) if cut else Snapshot(data, {})
                opened.commit("t", "one", turn - 1, given)
                seconds[name].append(time.perf_counter() - began)
                if turn in (4, 8, TURNS):
                    key = found.setdefault(name, {}).setdefault(f"turn {turn}", {})
                    key["version"], key["all"] = len(data), opened.info("t", "one").nbytes
                    key["versions"] = list(opened.versions("t", "one"))
        for name, (opened, _, _) in stores.items():
            began = time.perf_counter()
            back(method, opened.latest("t", "one").payload)
            found[name]["load_seconds"] = round(time.perf_counter() - began, 3)
            found[name]["commit_seconds"] = round(statistics.median(seconds[name]), 3)
            opened.close()
    found["entries"] = memory.length
    return found


# ---------------------------------------------------------------------- ram


def ram(limit: int) -> dict[str, Any]:
    """Resident bytes that each of some conversations adds while all of them are answered, and at the most."""
    model, tokenizer = ccm.load_default_model()
    method = open_method("ccm-chat", model, tokenizer)
    with torch.inference_mode():
        memory = method.empty()
        generator = torch.Generator().manual_seed(0)
        while memory.length < method.limit:
            words = torch.randint(1000, 40000, (256,), generator=generator).tolist()
            memory = method.take_in(memory, [segments_of(words, method.longest)])
    precision = "float16" if "float16" in codec.DTYPES else "float32"
    payloads = [stored(method, memory, precision) for _ in range(limit)]
    nbytes = memory.nbytes
    del memory
    engine = PaddedEngine(method, tokenizer, rows=limit)

    def answered(those: Sequence[bytes], during: Callable[[], None] = lambda: None) -> None:
        done = [threading.Event() for _ in those]
        for data, event in zip(those, done, strict=True):

            def hear(said: Any, event: threading.Event = event) -> None:
                if isinstance(said, (Result, Exception)):
                    event.set()

            job = Job(
                back(method, data), prompt=tuple(range(1000, 1016)), sampling=Sampling(24, temperature=0)
            )
            engine.submit(job, hear)
            del job
        while not all(event.wait(0.005) for event in done):
            during()

    answered(payloads[:1])
    process, seen = psutil.Process(), []
    before = process.memory_info().rss
    answered(payloads, lambda: seen.append(process.memory_info().rss))
    engine.close()
    seen = seen[len(seen) // 4 :]  # all have joined
    return {
        "conversations": limit,
        "memory_bytes": nbytes,
        "stored_bytes": len(payloads[0]),
        "while_answered": round((statistics.median(seen) - before) / limit),
        "at_most": round((max(seen) - before) / limit),
    }


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("part", choices=["answers", "store", "ram"])
    arguments.add_argument("--as", dest="name", default=None, help="name of the part in the results")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    limit = given.limit or {"answers": 8, "store": TURNS, "ram": 8}[given.part]
    made = {"answers": answers, "store": store, "ram": ram}[given.part](limit)
    path = RESULTS / "at_rest.json"
    kept = json.loads(path.read_text()) if path.exists() else {"task": __doc__.splitlines()[0]}
    kept[given.name or given.part] = made
    kept["environment"] = environment()
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
