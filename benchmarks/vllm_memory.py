"""vLLM with memories against vLLM with the full history in the prompt: throughput, first tokens and KV blocks.

32 conversations with 2,000 tokens of history each take one turn after another, all at once. The arms:

    memory       the whole turn of our server: fold what was said, write the answer in vLLM, fold the answer
    generation   its part in vLLM alone: memories lie in the store, as if they were folded on another machine
    full         the history in the prompt, prefix caching on, in as many KV blocks as the arms above

Conversations take one turn before the time is taken: all of them, or in "full" as many as vLLM's prefix cache holds.
These come first afterwards, which is the best that can happen to that cache.

    make vllm-env && python benchmarks/vllm_memory.py --arms memory generation
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, parser, store

import ccm
from ccm.chat.turns import render, turns_of
from ccm.data import load_chitchat
from ccm.methods import Method, as_method
from ccm.models.load import DEFAULT_MODEL
from ccm.serving.engine import Job, Result, Sampling, segments_of
from ccm.serving.engine.base import Event
from ccm.serving.store import Limits, Snapshot, codec, open_store
from ccm.serving.vllm.client import Call, VllmServer
from ccm.serving.vllm.engine import VllmEngine
from ccm.serving.vllm.reference import Reference

sys.path.append(str(Path(__file__).parent.parent / "tests" / "vllm"))
from vllm_servers import Vllm, kv_transfer, serving

CONVERSATIONS, HISTORY, ANSWER, TURNS = 32, 2000, 32, 1
#: Seconds after which an arm is over; turns that are not done then count for nothing, also among first tokens.
LONGEST = 150
#: Where the folded histories are kept between two runs.
FOLDED = RESULTS.parent / "runs" / "vllm_memory.safetensors"
BLOCK = 32
#: KV blocks, which are scarce: about eleven histories.
BLOCKS = 11 * (HISTORY + 200) // BLOCK
SAMPLING = Sampling(max_tokens=ANSWER, temperature=0)
#: One turn of conversation i: seconds to its first token, and tokens of its answer.
Turn = Callable[[int], tuple[float, int]]


class Watch(threading.Thread):
    """Looks at vLLM's own counts four times a second."""

    def __init__(self, vllm: Vllm, blocks: int):
        super().__init__(daemon=True)
        self.vllm, self.blocks = vllm, blocks
        self.samples: list[tuple[float, float]] = []  # blocks in use, requests that run
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.25):
            used = self.vllm.metric("vllm:kv_cache_usage_perc") * self.blocks
            self.samples.append((used, self.vllm.metric("vllm:num_requests_running")))

    def stop(self) -> dict[str, float]:
        self.over.set()
        self.join()
        busy = [(used, running) for used, running in self.samples if running]
        return {
            "blocks_in_use_peak": round(max(used for used, _ in busy)),
            "blocks_per_request": round(sum(u for u, _ in busy) / sum(r for _, r in busy), 1),
            "running_mean": round(statistics.mean(running for _, running in busy), 1),
        }


def texts() -> list[str]:
    """What is said, in an order that is always the same."""
    talks = load_chitchat("test", cap_per_user=None)
    said = sorted({turn.text for talk in talks for turn in talk.turns if 20 < len(turn.text) < 200})
    random.Random(0).shuffle(said)
    return said


class Bench:
    """The model, and what is said in every conversation."""

    def __init__(self, count: int):
        self.model, self.tokenizer = ccm.load_default_model()
        said = iter(texts())
        self.histories: list[list[int]] = []
        for _ in range(count):
            ids: list[int] = []
            while len(ids) < HISTORY:
                ids += render(self.tokenizer, ("user", "assistant")[len(ids) % 2], next(said)).ids
            self.histories.append(ids[:HISTORY])
        self.questions = [
            [list(render(self.tokenizer, "user", next(said)).ids) for _ in range(TURNS + 1)]
            for _ in range(count)
        ]
        self.asked = [0] * count
        template = turns_of(self.tokenizer)
        self.head, self.tail = template.head, template.tail

    def question(self, i: int) -> list[int]:
        self.asked[i] += 1
        return self.questions[i][self.asked[i] - 1]

    def options(self) -> dict[str, Any]:
        return {"max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}

    def raw(
        self, server: VllmServer, prompt: list[int], reference: Reference | None
    ) -> tuple[float, list[int]]:
        """Seconds to the first token, and the answer."""
        began, first, answer = time.perf_counter(), 0.0, []
        for tokens in server.tokens(prompt, reference, self.options(), Call()):
            first = first or time.perf_counter() - began
            answer += tokens
        return first, answer

    # ------------------------------------------------------------------ the arms

    def full(self, server: VllmServer) -> Turn:
        def turn(i: int) -> tuple[float, int]:
            self.histories[i] += [*self.question(i), *self.head]
            first, answer = self.raw(server, self.histories[i], None)
            self.histories[i] += [*answer, *self.tail]
            return first, len(answer)

        return turn

    def memories(self) -> tuple[Method, list[ccm.Memory]]:
        """The method of a server, and every history folded, which is done once for all arms."""
        compressor = ccm.Compressor.from_pretrained(self.model, "ccm-merge")
        method = as_method(compressor, self.tokenizer, sink=4, window=64)
        if not FOLDED.exists():
            rows = self.fold(method, range(CONVERSATIONS))
            rows.save(FOLDED)
        memory, _ = ccm.Memory.load(FOLDED)
        return method, [memory[i] for i in range(len(memory))]

    def fold(self, method: Method, rows: range) -> ccm.Memory:
        memory = method.empty(len(rows))
        for start in range(0, HISTORY, method.longest):
            ids = torch.tensor([self.histories[i][start : start + method.longest] for i in rows])
            memory = method.fold(memory, ids)
            print(f"folded {start + ids.shape[1]} tokens of each history", file=sys.stderr, flush=True)
        return memory

    def generation(self, server: VllmServer, url: str) -> Turn:
        _, memories = self.memories()
        shared = open_store(url)
        references: list[list[Reference]] = []
        for i, memory in enumerate(memories):
            shared.create("bench", str(i))
            payload, metadata = codec.encode(memory)
            for version in range(TURNS + 1):  # a memory is another one after each turn
                shared.commit("bench", str(i), version, Snapshot(payload, metadata))
            references.append([Reference("bench", str(i), v + 1, memory.length) for v in range(TURNS + 1)])

        def turn(i: int) -> tuple[float, int]:
            first, answer = self.raw(server, [*self.question(i), *self.head], references[i].pop())
            return first, len(answer)

        return turn

    def memory(self, server: VllmServer, url: str) -> Turn:
        method, memories = self.memories()
        engine = VllmEngine(
            method, self.tokenizer, server, open_store(url, Limits(ttl=3600)), rows=len(memories)
        )
        engine._ends = frozenset()  # every answer has its full length, as in the other arms

        def turn(i: int) -> tuple[float, int]:
            began, first = time.perf_counter(), [0.0]
            done = threading.Event()
            results: list[Event] = []

            def listener(event: Event) -> None:
                first[0] = first[0] or time.perf_counter() - began
                if not isinstance(event, str):
                    results.append(event)
                    done.set()

            segments = segments_of(tuple(self.question(i)), method.longest)
            job = Job(memories[i], segments, tuple(self.head), SAMPLING, tuple(self.tail))
            engine.submit(job, listener)
            done.wait()
            (result,) = results
            if not isinstance(result, Result):
                raise RuntimeError(f"a turn failed: {result}")
            memories[i] = result.memory
            return first[0], result.tokens

        return turn


def round_of(turn: Turn, count: int, turns: int) -> tuple[list[tuple[float, int]], float]:
    """Every conversation takes that many turns, all at once; what is done after :data:`LONGEST` seconds, and when."""
    done: list[tuple[float, int]] = []

    def client(i: int) -> None:
        for _ in range(turns):
            done.append(turn(i))

    began = time.perf_counter()
    clients = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(count)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(max(0, began + LONGEST - time.perf_counter()))
    seconds = time.perf_counter() - began
    if seconds < LONGEST and len(done) != count * turns:
        raise RuntimeError("some turns failed")
    return list(done), seconds


def measure(arm: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        url = f"sqlite://{temporary}/turns.db"
        bench = Bench(CONVERSATIONS)
        folder = Path(temporary) / "model"
        bench.model.save_pretrained(folder)
        bench.tokenizer.save_pretrained(folder)
        options = ["--dtype", "bfloat16", "--max-model-len", "4096", "--num-gpu-blocks-override", str(BLOCKS)]
        options += ["--max-num-seqs", str(CONVERSATIONS)]
        with serving(folder, Path(temporary) / "log", *options, kv=kv_transfer(url)) as vllm:
            server = VllmServer(vllm.url)
            if arm == "full":
                turn = bench.full(server)
            else:
                turn = getattr(bench, arm)(server, url)
            round_of(turn, min(count, BLOCKS * BLOCK // (HISTORY + 200)) if arm == "full" else count, 1)
            before = (
                vllm.metric("vllm:prefix_cache_hits_total"),
                vllm.metric("vllm:prefix_cache_queries_total"),
            )
            watch = Watch(vllm, BLOCKS)
            watch.start()
            turns, seconds = round_of(turn, count, TURNS)
            kv = watch.stop()
            hits = vllm.metric("vllm:prefix_cache_hits_total") - before[0]
            asked = vllm.metric("vllm:prefix_cache_queries_total") - before[1]
            preempted = vllm.metric("vllm:num_preemptions_total")
    firsts = sorted(first for first, _ in turns)
    return {
        "turns": len(turns),
        "seconds": round(seconds, 1),
        "turns_per_second": round(len(turns) / seconds, 3),
        "answer_tokens_per_second": round(sum(n for _, n in turns) / seconds, 1),
        "first_token_p50": round(statistics.median(firsts), 2),
        "first_token_p95": round(firsts[int(0.95 * len(firsts))], 2),
        "prefix_cache_hit_rate": round(hits / asked, 3),
        "preemptions": preempted,
        **kv,
    }


def ratios(arms: dict[str, Any]) -> dict[str, Any]:
    """How many times better than the full history, where both were measured."""
    if "full" not in arms:
        return {}
    full = arms["full"]
    return {
        f"{arm} against full": {
            "throughput": round(arms[arm]["turns_per_second"] / full["turns_per_second"], 2),
            "first_token_p50": round(full["first_token_p50"] / arms[arm]["first_token_p50"], 2),
            "kv_per_request": round(full["blocks_per_request"] / arms[arm]["blocks_per_request"], 2),
            "kv_peak": round(full["blocks_in_use_peak"] / arms[arm]["blocks_in_use_peak"], 2),
        }
        for arm in ("memory", "generation")
        if arm in arms
    }


def main() -> None:
    arguments = parser(__doc__.partition("\n")[0])
    arguments.add_argument("--arms", nargs="+", default=["memory", "generation", "full"])
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    count = options.limit or CONVERSATIONS
    path = RESULTS / "vllm.json"
    known = json.loads(path.read_text()) if path.exists() and options.limit is None else {}
    arms = known.get("arms", {})
    for arm in options.arms:
        arms[arm] = measure(arm, count)
        print(arm, json.dumps(arms[arm]), file=sys.stderr, flush=True)
        if options.limit is None:
            settings = {
                "conversations": CONVERSATIONS,
                "history_tokens": HISTORY,
                "answer_tokens": ANSWER,
                "turns_each": TURNS,
                "longest_seconds": LONGEST,
                "block_tokens": BLOCK,
                "kv_blocks": BLOCKS,
                "vllm": "0.32.0 on the CPU, bfloat16, eager, prefix caching on",
                "model": DEFAULT_MODEL,
                "adapter": "ccm-merge, sink 4, window 64",
            }
            store("vllm", {"settings": settings, "arms": arms, "ratios": ratios(arms)})


if __name__ == "__main__":
    main()
