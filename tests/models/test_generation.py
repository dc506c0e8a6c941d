"""How tokens are drawn: what is asked for, and the model's own settings for the rest, in sessions and engines."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny import scramble, tiny_model, tiny_tokenizer

from ccm.core.compressor import Compressor, CompressorConfig
from ccm.methods import as_method
from ccm.models.generation import EMBEDDED, Drawing, drawing, own_drawing
from ccm.models.load import DEFAULT_MODEL
from ccm.serving.engine import Job, Result, Sampling
from ccm.serving.engine.padded import PaddedEngine
from ccm.session import Session

TOKENIZER = tiny_tokenizer()
WARM = Drawing(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)


def model_with(**settings: Any) -> Any:
    config = transformers.GenerationConfig(**settings)
    return SimpleNamespace(name_or_path="some/model", generation_config=config)


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({}, Drawing()),
        ({"do_sample": True}, Drawing(temperature=1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, Drawing(temperature=0.6, top_k=20)),
        ({"do_sample": True, "min_p": 0.1, "top_p": 0.9}, Drawing(temperature=1.0, top_p=0.9, min_p=0.1)),
        ({"temperature": 0.6, "top_p": 0.9}, Drawing(top_p=0.9)),  # it does not say that it is drawn
        ({"repetition_penalty": 1.1}, Drawing(repetition_penalty=1.1)),
    ],
)
def test_a_models_own_settings_are_those_of_its_files(settings: dict[str, Any], own: Drawing) -> None:
    assert own_drawing(model_with(**settings)) == own


def test_the_embedded_model_has_sane_ones() -> None:
    model = model_with()
    model.name_or_path = DEFAULT_MODEL
    assert own_drawing(model) == EMBEDDED
    assert 0 < EMBEDDED.temperature < 0.5 and EMBEDDED.repetition_penalty > 1, "no word salad, and no loops"


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, WARM),
        ({"temperature": None, "top_p": None}, WARM),
        ({"temperature": 0.2}, Drawing(0.2, 0.8, 20, 0.0, 1.05)),
        ({"temperature": 0}, Drawing(0, 0.8, 20, 0.0, 1.05)),
        ({"do_sample": False, "temperature": 0.4}, Drawing(0, 0.8, 20, 0.0, 1.05)),
        ({"do_sample": True}, WARM),
        ({"top_p": 1, "top_k": 0, "repetition_penalty": 1}, Drawing(0.7, 1, 0, 0.0, 1)),
    ],
)
def test_what_is_given_wins(given: dict[str, Any], chosen: Drawing) -> None:
    assert drawing(WARM, given) == chosen


@pytest.mark.parametrize(
    ("given", "temperature"), [({}, 0), ({"top_p": 0.9}, 1), ({"do_sample": True}, 1), ({"seed": 3}, 0)]
)
def test_a_greedy_model_draws_when_it_is_asked_to(given: dict[str, Any], temperature: float) -> None:
    assert drawing(Drawing(), given).temperature == temperature


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    """On a model whose files say that it is drawn, hot enough to tell."""
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024)
    model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=1.5, pad_token_id=0)
    return scramble(Compressor(model, CompressorConfig(slots=2)))


def said(compressor: Compressor, seed: int = 0, **options: Any) -> str:
    torch.manual_seed(seed)
    return Session(compressor, TOKENIZER).generate("Hello there.", **{"max_new_tokens": 12, **options})


def test_a_session_answers_as_the_model_does(compressor: Compressor) -> None:
    greedy = said(compressor, do_sample=False)
    assert said(compressor) == said(compressor) == said(compressor, temperature=1.5)
    assert len({said(compressor, seed) for seed in range(4)} | {greedy}) > 3
    assert said(compressor, temperature=0) == said(compressor, 1, temperature=0.0) == greedy
    assert said(compressor, 1, top_k=1) == greedy
    assert said(compressor, num_beams=2) == said(compressor, 1, num_beams=2), "beams are followed, not drawn"
    whole = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    assert said(compressor, generation_config=whole) == greedy, "a whole config says all of it"
    for settings in ({"max_new_tokens": 4}, {"max_new_tokens": 4, "num_beams": 2}):
        whole = transformers.GenerationConfig(do_sample=False, pad_token_id=0, **settings)
        alone = Session(compressor, TOKENIZER).generate("Hello there.", generation_config=whole)
        assert alone == said(compressor, do_sample=False, **settings), "also what is looked at before it"
    assert said(compressor, do_sample=False, stop_strings=greedy[0]) == greedy[0], "the tokenizer is at hand"


def test_an_engine_answers_as_the_model_does(compressor: Compressor) -> None:
    engine = PaddedEngine(as_method(compressor), TOKENIZER)

    def written(**sampling: Any) -> str:
        events: queue.Queue[Any] = queue.Queue()
        prompt = tuple(TOKENIZER.encode("Hello there."))
        job = Job(compressor.empty(), prompt=prompt, sampling=Sampling(max_tokens=12, **sampling))
        engine.submit(job, events.put)
        while not isinstance(event := events.get(timeout=60), Result):
            assert isinstance(event, str)
        return event.text

    try:
        greedy = written(temperature=0)
        assert written(seed=1) == written(seed=1, temperature=1.5)
        assert len({written(seed=seed) for seed in range(4)} | {greedy}) > 3
        assert written(temperature=0, seed=5) == written(seed=6, top_k=1) == greedy
    finally:
        engine.close()


def test_an_answer_says_whether_it_was_cut(compressor: Compressor) -> None:
    session = Session(compressor, TOKENIZER)
    session.generate("Hello there.", max_new_tokens=3, temperature=0)
    assert session.last is not None and session.last.cut
    ids: list[int] = []

    class Tokens:
        def put(self, value: torch.Tensor) -> None:
            ids.extend(value.flatten().tolist())

        def end(self) -> None:
            pass

    Session(compressor, TOKENIZER).generate(
        "Hello there.", max_new_tokens=3, temperature=0, streamer=Tokens()
    )
    config = compressor.model.generation_config
    before, config.eos_token_id = config.eos_token_id, ids[-1]
    try:
        again = Session(compressor, TOKENIZER)
        again.generate("Hello there.", max_new_tokens=50, temperature=0)
    finally:
        config.eos_token_id = before
    assert again.last is not None and not again.last.cut
