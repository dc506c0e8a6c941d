"""Encoder-decoders in sessions, methods, evaluation and training; what cannot serve them says so."""

from __future__ import annotations

import io
import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from test_encoder_decoder_contract import ROWS, TOLERANCE, compressor_for
from tiny import scramble, tiny_tokenizer, two_sided_compressor, two_sided_model

import ccm
from ccm.cli import main
from ccm.core.families import get_family
from ccm.core.memory import Memory
from ccm.errors import ConfigError, UnsupportedModelError
from ccm.evaluation.items import Choice, Generation, Item, Likelihood
from ccm.evaluation.protocol import run_item
from ccm.methods import get_method
from ccm.methods.base import METHODS
from ccm.methods.compressed import Trained
from ccm.methods.default import default_memory
from ccm.serving.build import build_service
from ccm.serving.options import Options
from ccm.training import TrainConfig, Trainer
from ccm.training.packed import ArrayRow
from ccm.training.targets import NONE, TEXT, Row
from ccm.training.written import Written, exchanges

SPEAKING = {"slots": 2, "sink": 2, "window": 24}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> str:
    """A T5 and its tokenizer, as from a hub."""
    found = tmp_path_factory.mktemp("models") / "t5"
    two_sided_model("t5", vocab_size=len(tokenizer)).save_pretrained(found)
    tokenizer.save_pretrained(found)
    return str(found)


@pytest.fixture
def speaking(folder):
    """A compressor and a tokenizer that fit."""
    model, words = ccm.load_model(folder)
    return scramble(ccm.Compressor(model, ccm.CompressorConfig(**SPEAKING))), words


def test_a_session_goes_on_where_it_was_saved(speaking, tmp_path):
    compressor, words = speaking
    session = ccm.Session(compressor, words, segment=24)
    session.append("My cat is called Miso, and she sleeps all day.")
    session.generate("What is she called?", max_new_tokens=6)
    assert session.memory.slots and session.turns == 3
    session.save(tmp_path / "session")
    fork, again = session.fork(), ccm.Session.load(tmp_path / "session", compressor, words)
    answers = [s.generate("And you?", max_new_tokens=6, do_sample=False) for s in (session, fork, again)]
    assert answers[0] == answers[1] == answers[2]
    fork.append("Only the fork hears of this.")
    assert fork.memory.rows[0].seen > session.memory.rows[0].seen == again.memory.rows[0].seen


def test_the_default_memory_needs_no_queries(folder, caplog):
    model, words = ccm.load_model(folder)
    assert default_memory(model) == "streaming-llm"
    session = ccm.Session.open(model, words, window=32)
    session.append("A first turn that is longer than the window of this conversation.")
    assert isinstance(session.generate("Yes?", max_new_tokens=4), str)


def test_methods_work_or_say_why_not(tokenizer):
    model = two_sided_model("t5")
    refused, other = set(), set()
    for name in ccm.list_methods():
        if issubclass(METHODS[name], Trained):
            continue  # they need an adapter
        try:
            run = get_method(name).open(model, tokenizer)
            for segment in ROWS[0][:4]:
                run.append(segment)
            assert torch.isfinite(run.logits(ROWS[0][4], begin=3)[2:]).all(), name
        except UnsupportedModelError as error:
            assert "encoder-decoder" in str(error) and "\n" not in str(error)
            refused.add(name)
        except (
            ConfigError
        ) as error:  # such as a chat template, or a set of queries that was measured on a model
            assert "\n" not in str(error)
            other.add(name)
    assert {"snapkv", "attention-matching", "retrieve"} <= refused
    assert not (refused | other) & {"none", "full", "streaming-llm", "mean-pool", "keydiff"}


def test_queries_of_all_three_kinds_are_scored(speaking):
    """What is scored is written, and what stands before it read."""
    compressor, words = speaking
    prompt, options = tuple(ROWS[0][3]), ((5, 6), (7,), (8, 9, 10))
    asked = (
        Likelihood((*prompt, 5, 6), (len(prompt), len(prompt) + 2)),
        Choice(prompt, options, 0),
        Choice(prompt, ((5,), (7,)), 0),
        Generation(prompt, ("a",), 4),
    )
    run = get_method("ccm-concat").bind(compressor, words)
    item = Item("one", tuple(map(tuple, ROWS[0][:3])), {3: asked})
    record = run_item(ccm.methods.Run(run), item, words)
    memory = None
    for segment in ROWS[0][:3]:
        memory = run.fold(memory or run.empty(), [segment])
    scores = []
    for option in options:
        logits = compressor.logits([[*prompt, *option[:-1]]], memory, begin=len(prompt))[0, len(prompt) - 1 :]
        scores.append(float(logits.log_softmax(-1)[range(len(option)), list(option)].sum()))
    likelihood, choice, short, generation = record["queries"]
    assert likelihood["nll"] == pytest.approx(-scores[0], abs=1e-3)
    assert choice["chosen"] == scores.index(max(scores)) and short["chosen"] in (0, 1)
    ids = compressor.generate([prompt], memory, max_new_tokens=4, do_sample=False)[0, len(prompt) :]
    text = words.decode(ids, skip_special_tokens=True).strip()
    assert generation["text"] == (text.splitlines() or [""])[0].strip()
    assert record["changed"]


# ---------------------------------------------------------------------- training


def row_of(lengths: list[int], scored: list[tuple[int, int]], seed: int = 0) -> ArrayRow:
    draw = random.Random(seed)
    segments = tuple(tuple(draw.randrange(3, 97) for _ in range(length)) for length in lengths)
    roles = tuple(
        tuple(TEXT if start <= t < stop else NONE for t in range(length))
        for length, (start, stop) in zip(lengths, scored, strict=True)
    )
    return ArrayRow.from_row(Row(segments, roles))


BATCH = [
    row_of([6, 5, 7, 4], [(0, 0), (3, 5), (0, 0), (2, 4)]),
    row_of([4, 9], [(0, 0), (5, 8)], seed=1),
]


def test_what_is_scored_is_written_and_what_stands_before_it_read():
    found = exchanges(BATCH[0], 0)
    ids = BATCH[0].ids.tolist()
    assert [(e.segment, e.read, e.whole, e.words) for e in found] == [
        (1, ids[6:9], ids[:9], ids[9:11]),
        (3, ids[18:20], ids[:20], ids[20:22]),
    ]


@pytest.mark.parametrize(("family", "sizes"), [("t5", {}), ("t5", {"sink": 2, "window": 8}), ("bart", {})])
def test_training_runs_what_inference_runs(family, sizes):
    compressor = compressor_for(family)
    engine = Written(compressor)
    got = engine.run(engine.prepare(BATCH, teacher=True, **sizes))
    student, teacher = (compressor.head(states).log_softmax(-1) for states in (got.student, got.teacher))
    k = 0
    for row in BATCH:
        parts = row.to_row().segments
        for exchange in exchanges(row, 0):
            memory = None
            for segment in parts[: exchange.segment]:
                memory = compressor.compress([segment], memory, **sizes)
            both, n = [*exchange.read, *exchange.words[:-1]], len(exchange.read)
            expected = compressor.logits([both], memory, begin=n)[0, n - 1 :].log_softmax(-1)
            whole, n = [*exchange.whole, *exchange.words[:-1]], len(exchange.whole)
            taught = compressor.logits([whole], begin=n)[0, n - 1 :].log_softmax(-1)
            here = slice(k, k + len(exchange.words))
            assert (student[here] - expected).abs().max() < TOLERANCE
            assert (teacher[here] - taught).abs().max() < TOLERANCE
            assert (student[here] - teacher[here]).abs().max() > 1e-2
            k += len(exchange.words)


def test_gradients_are_those_of_the_recursion():
    compressor = two_sided_compressor("t5", rule="mean")
    engine, (_, row) = Written(compressor), BATCH
    found, grads = exchanges(row, 0), []
    parts = row.to_row().segments
    for parallel in (True, False):
        compressor.zero_grad()
        if parallel:
            hidden = engine.run(engine.prepare([row])).student
        else:
            ids = torch.tensor([parts[0]])
            memory = compressor.advance(compressor.empty(), ids, torch.ones_like(ids).bool(), 2, 0, 0)
            live, none = compressor.live(memory), torch.zeros(1, dtype=torch.long)
            hidden = compressor.written(live, none, [found[0].read], [found[0].words[:-1]])[0]
        hidden.square().sum().backward()
        grads.append([p.grad.clone() for p in compressor.trainable_parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert all(grad.any() for grad in grads[0])


def test_an_adapter_is_trained_and_opens(folder, tmp_path):
    talk = [{"role": role, "content": f"{role} says {n}"} for n in range(6) for role in ("user", "assistant")]
    lines = [json.dumps({"user": f"u{k}", "messages": talk}) for k in range(60)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    config = TrainConfig(
        model=folder,
        compressor=ccm.CompressorConfig(slots=2, rank=2),
        data={"jsonl": {"path": str(tmp_path / "chats.jsonl"), "turns": [4]}},
        slot_choices=(1, 2),
        window_choices=(0, 16),
        steps=3,
        rows=2,
        eval_rows=2,
        bf16=False,
    )
    model, words = ccm.load_model(folder)
    trainer = Trainer(model, words, config, tmp_path / "run")
    report = trainer.run()
    trainer.close()
    assert report["step"] == 3 and {"recovered_share", "recovered_share_1_slots"} <= report.keys()
    session = ccm.Session.open(ccm.load_model(folder)[0], words, str(trainer.adapter))
    session.append("Hello there.")
    assert isinstance(session.generate("Yes?", max_new_tokens=4), str)


@pytest.mark.parametrize(
    "option", [{"gradient_checkpointing": True}, {"compile": True}, {"parallel": "fsdp2"}, {"stage": "base"}]
)
def test_ways_to_train_that_are_for_decoders_are_refused(folder, tmp_path, option):
    (tmp_path / "chats.jsonl").write_text(
        "\n".join(
            json.dumps({"messages": [{"role": r, "content": f"{r} {k}"} for r in ("user", "assistant") * 4]})
            for k in range(60)
        )
    )
    config = TrainConfig(
        data={"jsonl": {"path": str(tmp_path / "chats.jsonl"), "turns": [4]}}, bf16=False, **option
    )
    model, words = ccm.load_model(folder)
    with pytest.raises((ConfigError, UnsupportedModelError), match="encoder-decoder"):
        Trainer(model, words, config, tmp_path / "run")


# ---------------------------------------------------------------------- engines


def test_what_cannot_serve_it_says_so_in_one_line(folder, tmp_path):
    with pytest.raises(UnsupportedModelError, match="no engine of the server") as refused:
        build_service(Options(model=folder, memory="none:window=64", store=f"dir://{tmp_path}/store"))
    assert "\n" not in str(refused.value)
    with pytest.raises(UnsupportedModelError, match="works in Session, ccm chat, train and eval alone"):
        get_family(two_sided_model("t5"))


def test_many_conversations_are_one_batch():
    compressor = compressor_for("bart")
    memories = [compressor.compress([row[0]]) for row in ROWS[:3]]
    both = Memory.stack(memories)
    folded = compressor.compress([row[1][:3] for row in ROWS[:3]], both)
    for r, memory in enumerate(memories):
        own = compressor.compress([ROWS[r][1][:3]], memory).rows[0].slots
        torch.testing.assert_close(folded.rows[r].slots.values, own.values, rtol=1e-4, atol=1e-4)


def test_the_example_in_the_documentation_runs_as_written(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    section = page.partition("## Encoder-decoders\n")[2].partition("\n## ")[0]
    (code,), (commands,) = (
        re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "sh")
    )
    monkeypatch.chdir(tmp_path)
    talk = [{"role": role, "content": f"{role} says {n}"} for n in range(8) for role in ("user", "assistant")]
    Path("chats.jsonl").write_text(
        "\n".join(json.dumps({"user": f"u{k}", "messages": talk}) for k in range(60))
    )
    Path("chats.yaml").write_text(recipe)
    exec(compile(code, "docs/training.md", "exec"), {})
    train, chat = (shlex.split(line)[1:] for line in commands.splitlines())
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello there.\n/memory\n"))
    for words in (train, chat):
        capsys.readouterr()
        assert main(words) in (0, None)
    assert "slots" in capsys.readouterr().out
