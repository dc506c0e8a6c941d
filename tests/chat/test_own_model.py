"""A user's own model: a folder with another template gets its own prompts in chat, serve, train and eval."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from real_templates import tokenizer_of
from test_template import Recording, own
from tiny import scramble, tiny_model

import ccm
from ccm.chat.messages import Message
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.data.sources import get_source
from ccm.evaluation.own_data import OwnChats, OwnItems
from ccm.methods import as_method
from ccm.serving.engine import PaddedEngine, Sampling
from ccm.serving.service import Service, Settings
from ccm.serving.store import open_store

#: A model's shape, and the name of its template in the archive.
MODELS = {
    "llama": "meta-llama-Llama-3.1-8B-Instruct",
    "qwen3": "Qwen-Qwen3-0.6B",
    "gemma2": "google-gemma-2-2b-it",
    "mistral": "mistralai-Mistral-Nemo-Instruct-2407",
}
SAID = ["My cat is Miso.", "  And my dog?  ", "I work\n\nnights <|eot_id|>.", "Who am I?", "Bye."]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory) -> Path:
    """As a user has it: random weights, a real tokenizer and template."""
    tokenizer = tokenizer_of(MODELS[request.param])
    path = tmp_path_factory.mktemp(request.param)
    backend = "eager" if request.param == "gemma2" else "sdpa"
    tiny_model(
        request.param, backend, vocab_size=len(tokenizer), max_position_embeddings=2048
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder) -> tuple[Compressor, Any]:
    model, tokenizer = ccm.load_model(str(folder))
    return scramble(Compressor(model, CompressorConfig(slots=2, rule="concat"))), tokenizer


def literal(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The dialogue by its own template; control tokens that somebody said are told from its own by a stand-in."""
    marked = [Message(m.role, m.content.replace("<|eot_id|>", "EOT")) for m in messages]
    ids = own(tokenizer, marked, [])
    assert ids is not None
    return ids


def test_chat(loaded):
    compressor, tokenizer = loaded
    session = Recording(compressor, tokenizer, window=1024)
    said: list[Message] = []
    for text in SAID[:2]:
        answer = session.generate(text, max_new_tokens=5, do_sample=False)
        said += [Message("user", text), Message("assistant", answer)]
    asked = Message("user", SAID[3])
    session.append(asked)
    step = session.dialogues.answer(session.dialogue)
    assert [*session.ids, *step.ids, *step.head] == literal(tokenizer, [*said, asked])


def test_serve(loaded, tmp_path):
    """What the engine gets, from the first request on, is the whole dialogue; with two clients' ways to send it."""
    compressor, tokenizer = loaded
    method = as_method(compressor, tokenizer, slots=2, sink=4, window=512, segment=64)
    taken: list[int] = []
    seen: list[list[int]] = []

    class Watched(PaddedEngine):
        def submit(self, job, listener):
            seen.append([*taken, *(t for segment in job.segments for t in segment), *job.prompt])
            taken.extend(t for segment in job.segments for t in segment)
            remember = job.remember

            def kept(text):
                left = remember(text)
                if left.memory is not None:
                    taken.clear()
                taken.extend(t for segment in left.segments for t in segment)
                return left

            return super().submit(replace(job, remember=kept), listener)

    service = Service(
        method,
        tokenizer,
        open_store(f"sqlite://{tmp_path}/m.db"),
        Settings("tiny"),
        Watched(method, tokenizer, rows=2),
    )

    async def run() -> None:
        known: list[Message] = []
        for text in (SAID[0], SAID[1], SAID[3]):
            messages = [*known, Message("user", text)]
            sampling = Sampling(max_tokens=5, temperature=0)
            turn = await service.answer("t", "s", messages, sampling, create=True, resent=True)
            outcome = await turn.finish()
            assert seen[-1] == literal(tokenizer, messages)
            known = [*messages, Message("assistant", outcome.text)]

    try:
        asyncio.run(run())
    finally:
        service.close()


def test_train_and_eval(loaded, tmp_path):
    _, tokenizer = loaded
    talk = [
        {"role": ("user", "assistant")[i % 2], "content": f"{text.strip()} {i}"}
        for i, text in enumerate(SAID[:4] * 2)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": talk, "user": f"u{k}"}) + "\n" for k in range(40)))
    messages = [Message(one["role"], one["content"]) for one in talk]
    whole = literal(tokenizer, messages[:-1])
    source = get_source("jsonl", tokenizer, path=file, turns=8)
    row = source.draw(random.Random(0))
    ids = [token for segment in row.segments[:-1] for token in segment]
    spelled = [t.replace("<|eot_id|>", "EOT") for t in (tokenizer.decode(ids), tokenizer.decode(whole))]
    assert spelled[1].startswith(spelled[0]) and len(ids) > 60
    special = set(tokenizer.all_special_ids)
    assert [t for t in ids if t in special] == [t for t in whole if t in special][
        : sum(t in special for t in ids)
    ]
    item = next(OwnChats(path=file).items(tokenizer, 1))
    assert item.segments == row.segments[: len(item.segments)]


def test_a_question_of_own_items_is_a_turn_and_a_head(loaded, tmp_path):
    _, tokenizer = loaded
    file = tmp_path / "items.jsonl"
    context = [{"role": "user", "content": "Miso is a cat."}, {"role": "assistant", "content": "Noted."}]
    file.write_text(
        json.dumps({"context": context, "question": "What is Miso?", "answers": ["a cat"]}) + "\n"
    )
    item = next(OwnItems(path=file).items(tokenizer, 1))
    (query,) = item.queries[2]
    said = [*(Message(**one) for one in context), Message("user", "What is Miso?")]
    assert [*(t for segment in item.segments for t in segment), *query.prompt] == literal(tokenizer, said)
