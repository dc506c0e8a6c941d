"""The trainer: its losses, its resuming, and that it learns."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from ccm.compressor import Compressor, CompressorConfig
from ccm.data.chitchat import Conversation, Turn
from ccm.data.facts import TEST, TRAIN
from ccm.data.rows import RowStream
from ccm.errors import CCMError, ConfigError
from ccm.models import load_default_model
from ccm.training import TrainConfig, Trainer
from ccm.training.objectives import OBJECTIVES, summed_loss

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def talks(monkeypatch: pytest.MonkeyPatch) -> list[Conversation]:
    def talk(n: int) -> Conversation:
        turns = [Turn("assistant" if i % 2 else "user", f"{n} says {i * n}") for i in range(14)]
        return Conversation(f"c{n}", ("a", "b"), tuple(turns))

    made = [talk(n) for n in range(5)]
    monkeypatch.setattr("ccm.data.chitchat.load_chitchat", lambda split, **_: made)
    return made


def tiny_trainer(folder: Path, **changes: object) -> Trainer:
    torch.manual_seed(0)
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=2048)
    settings = {
        "compressor": CompressorConfig(slots=2, rule="mean"),
        "steps": 6,
        "rows": 2,
        "turns": (6, 9),
        "window_choices": (0, 40),
        "slot_choices": (1, 2),
        "facts": 0.3,
        "eval_every": 3,
        "save_every": 2,
        "bf16": False,
    }
    return Trainer(model, TOKENIZER, TrainConfig(**{**settings, **changes}), folder)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_chunked_loss_equals_the_plain_one(name: str) -> None:
    torch.manual_seed(0)
    student = torch.randn(300, 16, requires_grad=True)
    teacher, weight, targets = torch.randn(300, 16), torch.randn(50, 16), torch.randint(0, 50, (300,))

    def head(x: torch.Tensor) -> torch.Tensor:
        return x @ weight.T

    if name == "ce":
        plain = torch.nn.functional.cross_entropy(head(student), targets, reduction="sum")
    else:
        log_q, p = head(student).log_softmax(-1), head(teacher).softmax(-1)
        plain = torch.nn.functional.kl_div(log_q, p, reduction="sum")
    (expected,) = torch.autograd.grad(2 * plain, student)
    chunked = summed_loss(student, teacher, targets, head, OBJECTIVES[name])
    (got,) = torch.autograd.grad(2 * chunked, student)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_the_full_context(talks: list[Conversation], tmp_path: Path) -> None:
    """With every token in the window the student sees what the teacher sees: the divergence is zero."""
    trainer = tiny_trainer(tmp_path, window_choices=(100_000,), slot_choices=())
    batch = next(iter(trainer.rows))
    loss, tokens = trainer.losses(batch, random.Random(0))
    assert tokens > 50 and abs(float(loss.detach())) / tokens < 1e-6
    loss, _ = tiny_trainer(tmp_path / "b", window_choices=()).losses(batch, random.Random(0))
    assert float(loss.detach()) / tokens > 1e-3


def test_a_killed_run_continues_to_the_same_weights(talks: list[Conversation], tmp_path: Path) -> None:
    whole = tiny_trainer(tmp_path / "whole")
    whole.run()

    class Killed(BaseException):
        pass

    def kill_at_5(report: dict) -> None:
        if report["step"] == 5:
            raise Killed  # nothing gets a chance to save, as with kill -9; the last checkpoint is of step 4

    killed = tiny_trainer(tmp_path / "killed")
    with pytest.raises(Killed):
        killed.run(kill_at_5)
    resumed = tiny_trainer(tmp_path / "killed")
    assert resumed.step == 4
    resumed.run()
    for a, b in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)
    assert resumed.tokens == whole.tokens


def test_another_configuration_does_not_resume(talks: list[Conversation], tmp_path: Path) -> None:
    tiny_trainer(tmp_path, steps=2).run()
    with pytest.raises(ConfigError, match="another configuration"):
        tiny_trainer(tmp_path, steps=3)


def test_a_loss_that_is_no_number_stops_the_run(talks: list[Conversation], tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.parameters[-1].data.fill_(float("nan"))
    with pytest.raises(CCMError, match="lower learning rate"):
        trainer.run()


def test_the_exported_adapter_has_its_record_and_loads(talks: list[Conversation], tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.run()
    assert (tmp_path / "adapter" / "training.json").exists()
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=2048)
    loaded = Compressor.from_pretrained(model, tmp_path / "adapter")
    assert loaded.config == trainer.config.compressor


def test_rows_are_the_same_for_a_seed_and_resume_anywhere(talks: list[Conversation]) -> None:
    def stream(seed: int) -> RowStream:
        return RowStream(talks, TOKENIZER, (6, 9), 2, facts=0.5, seed=seed)

    first, again, other = (iter(stream(seed)) for seed in (0, 0, 1))
    served = [next(first) for _ in range(40)]
    assert served == [next(again) for _ in range(40)]
    assert served != [next(other) for _ in range(40)]
    late = stream(0)
    late.served = 25
    assert next(iter(late)) == served[25]


def test_planted_facts_of_training_and_test_have_nothing_in_common() -> None:
    def pieces(kinds):
        questions = (piece for k in kinds for pair in k.questions for piece in pair)
        return {*questions, *(x for k in kinds for x in (k.name, *k.statements, *k.values))}

    assert not pieces(TRAIN) & pieces(TEST)


def test_planted_values_are_where_the_row_says_and_were_told_before(talks: list[Conversation]) -> None:
    seen = 0
    for batch, _ in zip(RowStream(talks, TOKENIZER, (6, 9), 2, facts=1.0), range(20), strict=False):
        for row in batch:
            for turn, start, stop in row.recall:
                value = TOKENIZER.decode(row.segments[turn][start:stop]).strip()
                told = "".join(TOKENIZER.decode(s) for s in row.segments[: turn - 1])
                assert value and value in told
                assert value not in TOKENIZER.decode(row.segments[turn - 1])
                seen += 1
    assert seen > 20


def test_echoed_turns_repeat_an_earlier_one(talks: list[Conversation]) -> None:
    def repeats(echoes: float) -> int:
        stream = RowStream(talks, TOKENIZER, (9,), 2, echoes=echoes)
        rows = [row for batch, _ in zip(stream, range(10), strict=False) for row in batch]
        return sum(len(row.segments) - len(set(row.segments)) for row in rows)

    assert repeats(1.0) > repeats(0.0) + 10


@pytest.mark.slow
def test_a_few_steps_on_the_embedded_model_improve_held_out_quality(tmp_path: Path) -> None:
    model, tokenizer = load_default_model()
    config = TrainConfig(
        compressor=CompressorConfig(slots=4, rank=4), steps=24, rows=2, eval_every=24, eval_rows=8, warmup=4
    )
    trainer = Trainer(model, tokenizer, config, tmp_path)
    before = trainer.evaluate()["recovered_share"]
    after = trainer.run()["recovered_share"]
    assert after > before + 0.1
