"""``generate`` from a memory: every way of transformers, against logits computed by hand."""

from __future__ import annotations

import pytest
import torch
from tiny import history, pad, random_rows, tiny_compressor
from torch import Tensor

from ccm.core.compressor import Compressor
from ccm.core.memory import Memory
from ccm.errors import ConfigError

SEGMENTS = random_rows([[6, 9, 4], [5], []], seed=3)
PROMPTS = random_rows([[5, 8, 3]], seed=4)[0]
NEW = 8
FAMILIES = ["llama", "mistral", "gemma3_text", "gpt_neox"]
SIZES = [{}, {"sink": 2, "window": 8}]


@pytest.fixture(scope="module", params=FAMILIES)
def compressor(request) -> Compressor:
    return tiny_compressor(request.param, rule="mean")


def greedy(compressor: Compressor, prompt: list[int], memory: Memory | None) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(compressor.logits([ids], memory)[0, -1].argmax()))
    return ids


def log_probability(compressor: Compressor, ids: Tensor, prompt: int, memory: Memory) -> float:
    """Of everything after the prompt, from one pass of logits; ids (T,)."""
    scores = compressor.logits(ids.unsqueeze(0), memory)[0].log_softmax(-1)
    return float(scores[prompt - 1 : -1].gather(1, ids[prompt:].unsqueeze(1)).sum())


@pytest.mark.parametrize("sizes", SIZES, ids=["plain", "window"])
def test_equals_a_hand_written_greedy_loop(compressor, sizes):
    memory = history(compressor, SEGMENTS[0], **sizes)
    expected = greedy(compressor, PROMPTS[0], memory)
    out = compressor.generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
    assert out[0].tolist() == expected
    again = compressor.generate([PROMPTS[0]], memory, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, again)  # the memory is not changed
    alone = compressor.generate([PROMPTS[0]], max_new_tokens=NEW, do_sample=False)
    assert alone[0].tolist() == greedy(compressor, PROMPTS[0], None)
    assert not torch.equal(out, alone)


def test_one_token_prompt(compressor):
    memory = history(compressor, SEGMENTS[0])
    out = compressor.generate([[7]], memory, max_new_tokens=NEW, do_sample=False)
    assert out[0].tolist() == greedy(compressor, [7], memory)


@pytest.mark.parametrize("sizes", SIZES, ids=["plain", "window"])
def test_ragged_batch_equals_each_alone(compressor, sizes):
    memories = [history(compressor, s, **sizes) if s else compressor.empty() for s in SEGMENTS]
    for side in ("left", "right"):
        ids, mask = pad(PROMPTS, side)
        out = compressor.generate(ids, Memory.stack(memories), mask, max_new_tokens=NEW, do_sample=False)
        for r, (prompt, memory) in enumerate(zip(PROMPTS, memories, strict=True)):
            expected = greedy(compressor, prompt, memory if memory.length else None)
            assert out[r, ids.shape[1] - len(prompt) :].tolist() == expected, side


def test_beams(compressor):
    memory = history(compressor, SEGMENTS[0])
    prompt = PROMPTS[1]
    single = compressor.generate([prompt], memory, max_new_tokens=NEW, num_beams=1, do_sample=False)
    assert single[0].tolist() == greedy(compressor, prompt, memory)
    out = compressor.generate(
        [prompt],
        memory,
        max_new_tokens=NEW,
        num_beams=3,
        num_return_sequences=2,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert out.sequences.shape == (2, len(prompt) + NEW)
    for ids, score in zip(out.sequences, out.sequences_scores.tolist(), strict=True):
        assert log_probability(compressor, ids, len(prompt), memory) == pytest.approx(score, abs=1e-3)
    assert out.sequences_scores[0] >= out.sequences_scores[1]


def test_beams_over_a_batch_of_memories(compressor):
    memories = [history(compressor, SEGMENTS[0]), history(compressor, SEGMENTS[1])]
    ids, mask = pad(PROMPTS[:2], "left")
    options = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    out = compressor.generate(ids, Memory.stack(memories), mask, **options)
    for r in range(2):
        alone = compressor.generate([PROMPTS[r]], memories[r], **options)
        assert out[r, ids.shape[1] - len(PROMPTS[r]) :].tolist() == alone[0].tolist()


def test_several_samples(compressor):
    memory = history(compressor, SEGMENTS[0])
    prompt = PROMPTS[0]
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "num_return_sequences": 2}
    draws = []
    for _ in range(2):
        torch.manual_seed(11)
        draws.append(
            compressor.generate([prompt], memory, **options, return_dict_in_generate=True, output_logits=True)
        )
    assert torch.equal(draws[0].sequences, draws[1].sequences)
    first, second = draws[0].sequences
    assert not torch.equal(first, second)
    steps = torch.stack(draws[0].logits, 1)  # (2, new, V)
    for ids, got in zip((first, second), steps, strict=True):
        expected = compressor.logits(ids.unsqueeze(0), memory)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_the_model_generates_as_before_afterwards(compressor):
    ids = torch.tensor([PROMPTS[1]])
    before = compressor.model.generate(ids, max_new_tokens=NEW, do_sample=False)
    compressor.generate(ids, history(compressor, SEGMENTS[0]), max_new_tokens=2)
    assert torch.equal(compressor.model.generate(ids, max_new_tokens=NEW, do_sample=False), before)


def test_too_long_a_request_is_refused():
    compressor = tiny_compressor(model={"max_position_embeddings": 32})
    memory = history(compressor, SEGMENTS[0])  # 6 slots
    fits = compressor.generate([PROMPTS[0]], memory, max_new_tokens=32 - 6 - 5, do_sample=False)
    assert fits.shape[1] == 32 - 6
    with pytest.raises(ConfigError, match="33 positions are more than the model's context of 32"):
        compressor.generate([PROMPTS[0]], memory, max_new_tokens=32 - 6 - 5 + 1)
