"""Greedy answers of many conversations at a time against each conversation alone, and twins that must never mix.

Alone means a ``ccm.Session`` in this process, with the same weights. The control gives every twin the other's
key: a check that could not see a mixed memory would find nothing wrong with it.

    python benchmarks/serving/exactness.py
    python benchmarks/serving/exactness.py --device cuda --dtype bfloat16
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch
from harness import Server, ask, placed, placed_parser, serving, store, streamed
from texts import conversations, twins

import ccm
from ccm.methods.default import CHAT
from ccm.serving.keys import Keys

SEED = 7
TENANTS = ("alice", "bob")


def script(talk: list[dict[str, str]], before: int, turns: int) -> list[list[dict[str, str]]]:
    """What one client sends: a history of ``before`` turns with the first question, then a user's turn at a time."""
    users = [i for i, message in enumerate(talk) if message["role"] == "user" and i >= before]
    return [talk[: users[0] + 1], *([talk[i]] for i in users[1:turns])]


def alone(
    scripts: Sequence[list[list[dict[str, str]]]], tokens: int, device: str, dtype: str
) -> list[list[str]]:
    """The answers of a session of the library for each script."""
    model, tokenizer = ccm.load_model(None, dtype, device)
    compressor = ccm.Compressor.from_pretrained(model, "ccm-merge")
    answers = []
    for lines in scripts:
        session = ccm.Session(compressor, tokenizer, **CHAT)
        said = []
        for messages in lines:
            for message in messages[:-1]:
                session.append(message["content"], message["role"])
            said.append(session.generate(messages[-1]["content"], max_new_tokens=tokens, do_sample=False))
        answers.append(said)
    return answers


def say(client: openai.OpenAI, messages: list[dict[str, str]], name: str, stream: bool, tokens: int) -> str:
    if stream:
        return streamed(client, messages, name, max_tokens=tokens)[0]
    return str(ask(client, messages, name, max_tokens=tokens).choices[0].message.content)


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all calls, which start together."""
    barrier = threading.Barrier(len(calls))

    def one(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def differing(got: Sequence[list[str]], expected: Sequence[list[str]]) -> list[int]:
    """Indices of the conversations in which any answer is another one."""
    return [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]


def concurrent(
    server: Server,
    clients: Sequence[openai.OpenAI],
    scripts: Any,
    tokens: int,
    run: int,
    names: Sequence[str],
) -> list[list[str]]:
    """All scripts at a time, each client at its own pace; every other one streams."""

    def play(i: int) -> list[str]:
        rng, answers = random.Random(SEED * 1000 + run * 100 + i), []
        for messages in scripts[i]:
            time.sleep(rng.random() * 0.5)  # so that rows join and leave in the midst of others
            answers.append(say(clients[i], messages, names[i], (i + run) % 2 == 0, tokens))
        return answers

    return at_once([lambda i=i: play(i) for i in range(len(scripts))])  # type: ignore[misc]


def main() -> bool:
    arguments = placed_parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    count, turns, tokens, runs = (8, 2, 8, 1) if arguments.quick else (16, 4, 24, 3)
    talks = conversations(count, 24)
    scripts = [script(talk, 2 * (i % 4), turns) for i, talk in enumerate(talks)]
    pairs = twins(count // 2)
    facts = [[{"role": "user", "content": text}] for both, _ in pairs for text in both]
    questions = [[{"role": "user", "content": question}] for _, question in pairs for _ in TENANTS]
    plays = [[fact, question] for fact, question in zip(facts, questions, strict=True)]
    where = arguments.device, arguments.dtype
    expected, twin_answers = alone(scripts, tokens, *where), alone(plays, tokens, *where)

    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        keys = {tenant: Keys.add(folder / "keys", tenant) for tenant in TENANTS}
        options = ("--api-keys", str(folder / "keys"), *placed(arguments))
        with serving(folder, arguments.threads, *options) as server:
            alice, bob = (server.client(keys[tenant]) for tenant in TENANTS)
            rows = []
            for run in range(runs):
                names = [f"run-{run}-{i}" for i in range(count)]
                got = concurrent(server, [alice] * count, scripts, tokens, run, names)
                rows.append({"run": run, "differing": differing(got, expected)})
            single = [
                [say(alice, messages, f"single-{i}", False, tokens) for messages in lines]
                for i, lines in enumerate(scripts)
            ]
            # twins: the same name of the session under two keys
            names = [f"twin-{i // 2}" for i in range(count)]
            owners = [alice, bob] * (count // 2)
            got = concurrent(server, owners, plays, tokens, 0, names)
            mixed = differing(got, twin_answers)
            for i, client in enumerate(owners):
                ask(client, facts[i], f"control-{i // 2}", max_tokens=tokens)
            exchanged = [bob, alice] * (count // 2)
            control = at_once(
                [
                    lambda i=i: say(exchanged[i], questions[i], f"control-{i // 2}", i % 2 == 0, tokens)  # type: ignore[misc]
                    for i in range(count)
                ]
            )
            last = [[answers[-1]] for answers in twin_answers]
            flagged = differing([[answer] for answer in control], last)
            told_apart = [i for i in range(count) if last[i] != last[i ^ 1]]
    result = {
        "task": "answers of concurrent conversations against each alone, and of twins with different memories",
        "engine": "padded",
        "conversations": count,
        "turns": turns,
        "tokens_per_answer": tokens,
        "answers_compared": runs * count * turns,
        "seed": SEED,
        "runs": rows,
        "one_at_a_time_differing": differing(single, expected),
        "neighbours_with_equal_answers": count - len(differing(expected, expected[1:] + expected[:1])),
        "twins": {
            "pairs": count // 2,
            "pairs_whose_answers_alone_differ": len(told_apart) // 2,
            "differing_from_alone": mixed,
            "control_with_exchanged_keys_flagged": flagged,
        },
        "reached": not mixed and not any(row["differing"] for row in rows) and flagged == told_apart != [],
    }
    return store("exactness", result, arguments)


if __name__ == "__main__":
    sys.exit(not main())
