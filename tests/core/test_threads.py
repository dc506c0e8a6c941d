"""Many threads on one compressor: each gets what it gets alone, whatever the others are in the middle of."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from engine_contract import SIZES as TURN_SIZES
from engine_contract import TEXTS, run, turn
from tiny import history, random_rows, tiny_compressor, tiny_tokenizer
from torch import nn
from torch.utils.checkpoint import CheckpointError

from ccm.core import gate
from ccm.core.attention import PLAN
from ccm.core.compressor import Compressor
from ccm.core.memory import Memory
from ccm.methods import as_method
from ccm.serving.engine import PaddedEngine
from ccm.session import Session

TOKENIZER = tiny_tokenizer()
ROWS = random_rows([[6, 9, 5], [4, 8, 7]])
GREEDY = {"do_sample": False, "max_new_tokens": 6}
SIZES = {"slots": 2, "sink": 2, "window": 24, "segment": 12}


class SharedGate:
    """The control: the gate as it was, one for all threads."""

    __init__, read, behind = gate.LayerGate.__init__, gate.LayerGate.read, gate.LayerGate.behind


def compressor_of(family: str = "llama", **config: Any) -> Compressor:
    backend = "eager" if family == "gemma2" else "sdpa"
    return tiny_compressor(family, backend, model={"vocab_size": len(TOKENIZER)}, **config)


def in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@contextmanager
def intruder(compressor: Compressor, other: Callable[[], Any]) -> Iterator[list[Any]]:
    """Within it, another thread runs all of ``other`` whenever a pass of this one is inside of its first layer."""
    here, results = threading.current_thread(), []

    def before_projection(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is here:
            results.append(in_a_thread(other))

    layer = next(m for n, m in compressor.model.named_modules() if n.endswith("layers.0"))
    first = next(m for m in layer.modules() if hasattr(m, "lora_A"))
    handle = first.register_forward_pre_hook(before_projection)
    try:
        yield results
    finally:
        handle.remove()


def parts(memory: Memory) -> list[torch.Tensor]:
    return [t for row in memory.rows for kv in (row.sink, row.slots, row.window) for t in kv]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------- one pass in the middle of another


def crossed(compressor: Compressor) -> bool:
    """Whether passes with and without COMP tokens, each in the middle of the other, come out as alone."""
    ids = [ROWS[0][0]]
    passes: list[Callable[[], list[torch.Tensor]]] = [
        lambda: parts(compressor.compress(ids)),
        lambda: [compressor.logits(ids)],
        lambda: [compressor(ROWS).logits],
    ]
    with torch.no_grad():
        alone = [run() for run in passes]
        for i, run in enumerate(passes):
            for j, other in enumerate(passes):
                try:
                    with intruder(compressor, torch.no_grad()(other)) as seen:
                        found = run()
                except IndexError:  # places of a longer pass
                    return False
                if not (seen and same(found, alone[i]) and all(same(part, alone[j]) for part in seen)):
                    return False
    return True


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("gpt_neox", {"target_modules": "all"})],
    ids=["gate", "all-projections"],
)
def test_a_pass_in_the_middle_of_another(family, config, one_thread, monkeypatch):
    assert crossed(compressor_of(family, **config))
    monkeypatch.setattr(gate, "LayerGate", SharedGate)
    assert not crossed(compressor_of(family, **config)), "the control: a gate for all threads is seen"


def gradients(compressor: Compressor, run: Callable[[Callable[[], Any]], Any]) -> list[torch.Tensor]:
    loss = compressor(ROWS).loss
    run(loss.backward)
    found = [p.grad for p in compressor.trainable_parameters()]
    compressor.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_a_layer_again_on_any_thread(reentrant, one_thread, monkeypatch):
    """Backward on another thread than forward, and passes of others in the middle of what is run again."""

    def right() -> bool:
        compressor = compressor_of(rule="mean")
        alone = gradients(compressor, lambda backward: backward())
        options = {"use_reentrant": reentrant}
        compressor.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        for layer in compressor.model.base_model.layers:
            layer.training = True

        def disturbed(backward: Callable[[], Any]) -> None:
            with intruder(compressor, lambda: compressor.logits([ROWS[0][0]])) as seen:
                backward()
            assert seen

        ways = (in_a_thread, disturbed, lambda backward: in_a_thread(partial(disturbed, backward)))
        try:
            found = [gradients(compressor, run) for run in ways]
        except CheckpointError:  # torch has seen that another computation was run again
            return False
        return all(
            a is not None and (a - b).abs().max() <= 1e-5 * b.abs().max()
            for one in found
            for a, b in zip(one, alone, strict=True)
        )

    assert right()
    monkeypatch.setattr(gate, "LayerGate", SharedGate)
    assert not right(), "the control"


def test_an_error_in_the_middle_of_a_pass_leaves_nothing_behind(one_thread):
    compressor = compressor_of()
    ids = [ROWS[0][0]]
    alone, logits = parts(compressor.compress(ids)), compressor.logits(ids)

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), intruder(compressor, fail):
        compressor.compress(ids)
    assert torch.equal(compressor.logits(ids), logits) and same(parts(compressor.compress(ids)), alone)


def test_a_copy_of_a_compressor_has_a_gate_that_opens(one_thread):
    compressor = compressor_of()
    twin = copy.deepcopy(compressor)
    assert same(parts(twin.compress([ROWS[0][0]])), parts(compressor.compress([ROWS[0][0]])))


# ---------------------------------------------------------------------- generate


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_answers_of_two_threads_in_step(family, one_thread):
    """Sliding windows ask every pass of ``generate`` for its own plan."""
    compressor = compressor_of(family, rule="concat", sink=2, window=10)
    memories = [history(compressor, segments) for segments in random_rows([[9, 5, 7, 8, 6], [7, 8]])]
    assert memories[0].length != memories[1].length
    alone = [compressor.generate([[7, 8, 9]], memory, **GREEDY) for memory in memories]
    assert not torch.equal(*alone)

    def in_step(*hooks: Callable[..., Any]) -> list[Any]:
        handles = [compressor.model.register_forward_pre_hook(hook, with_kwargs=True) for hook in hooks]
        try:
            with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                runs = [pool.submit(answer, memory) for memory in memories]
                return [run.exception() or run.result() for run in runs]
        finally:
            for handle in handles:
                handle.remove()

    barrier, last = threading.Barrier(2), {}

    def answer(memory: Memory) -> torch.Tensor:
        try:
            return compressor.generate([[7, 8, 9]], memory, **GREEDY)
        except Exception:
            barrier.abort()  # nobody waits for it any more
            raise

    def wait(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        barrier.wait(60)

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        last[PLAN] = kwargs[PLAN]

    def hand_out(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, **last}

    assert same(in_step(wait), alone)
    barrier.reset()
    mixed = in_step(keep, wait, hand_out)  # the control: one plan for both
    assert any(
        isinstance(out, Exception) or not torch.equal(out, a) for out, a in zip(mixed, alone, strict=True)
    )


def test_a_streamer_may_use_the_compressor(one_thread):
    """A pass inside of ``generate`` has the plan of its own cache, or none."""
    compressor = compressor_of("mistral", sink=2, window=10)
    memory, ids = history(compressor, ROWS[0]), [ROWS[1][1]]
    alone, logits = compressor.generate(ids, memory, **GREEDY), compressor.logits(ids)
    seen = []

    class Streamer:
        def put(self, value: Any) -> None:
            seen.append(compressor.logits(ids))

        def end(self) -> None:
            pass

    assert torch.equal(compressor.generate(ids, memory, streamer=Streamer(), **GREEDY), alone)
    assert len(seen) > 2 and same(seen, [logits] * len(seen))


# ---------------------------------------------------------------------- sessions


def talk(compressor: Compressor, number: int) -> list[Any]:
    """A conversation with facts of its own: answers, streamed pieces, logits and the memory."""
    session = Session(compressor, TOKENIZER, **SIZES) if compressor.config.kind == "ccm" else None
    if session is None:
        memory = history(compressor, random_rows([[6, 9, 5]], seed=number)[0])
        return [
            *parts(memory),
            compressor.logits([[5, 6]], memory),
            compressor.generate([[5]], memory, **GREEDY),
        ]
    session.append(f"my number is {number}, and nothing else")
    pieces: list[str] = []
    found: list[Any] = [session.generate("what is it?", streamer=pieces.append, **GREEDY), tuple(pieces)]
    found.append(session.fork().generate("twice that?", **GREEDY))
    session.append(f"{number} it was")
    return [*found, compressor.logits([[5, 6]], session.memory), *parts(session.memory)]


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@contextmanager
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def differences(compressor: Compressor, threads: int = 4, rounds: int = 3) -> int:
    """Conversations that come out other than alone, or not at all."""
    set_up: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(1, **set_up) as pool:
        alone = list(pool.map(partial(talk, compressor), range(threads)))
    assert not any(equal(a, b) for i, a in enumerate(alone) for b in alone[:i]), "each is different"
    wrong = 0
    with quick_switches(), ThreadPoolExecutor(threads, **set_up) as pool:
        for _ in range(rounds):
            talks = [pool.submit(talk, compressor, n) for n in range(threads)]
            for one, expected in zip(talks, alone, strict=True):
                wrong += bool(one.exception()) or not equal(one.result(), expected)
    return wrong


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"rule": "mean"}),
        ("mistral", {}),
        ("gemma2", {"target_modules": "all"}),
        ("llama", {"kind": "compressive"}),
        ("llama", {"kind": "autocompressor"}),
    ],
    ids=["mean", "sliding", "all-projections", "pooled", "soft-prompts"],
)
def test_twin_conversations_in_a_pool(family, config):
    assert differences(compressor_of(family, **config)) == 0


def test_the_pool_sees_a_gate_for_all_threads(monkeypatch):
    """The negative control of the test above."""
    monkeypatch.setattr(gate, "LayerGate", SharedGate)
    compressor = compressor_of()
    assert any(differences(compressor) for _ in range(10))


def test_sessions_beside_a_running_engine():
    """The server's thread, and others that use its compressor for themselves."""
    compressor = compressor_of("mistral")
    engine = PaddedEngine(as_method(compressor, TOKENIZER, **TURN_SIZES), TOKENIZER, rows=4)
    jobs = [turn(TOKENIZER, compressor.empty(), text) for text in TEXTS[:4]]
    try:
        alone = [run(engine, [job])[0][0] for job in jobs]
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(lambda: [run(engine, [job])[0][0] for job in jobs * 2])
            assert differences(compressor, threads=2) == 0
            for result, expected in zip(answers.result(), alone * 2, strict=True):
                assert result.text == expected.text and same(parts(result.memory), parts(expected.memory))
    finally:
        engine.close()


# ---------------------------------------------------------------------- what belongs to a thread


def test_copies_share_what_threads_keep():
    own = gate.LayerGate("ccm0")
    own.places = slice(0, 2)
    assert copy.deepcopy([own])[0].places == slice(0, 2) and in_a_thread(lambda: own.places) is None
