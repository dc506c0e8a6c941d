"""The methods that CCM is compared with: each is what it says, and runs the same in both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import runs
import torch
import yaml
from tiny import CASES, pad, random_rows, scramble, tiny_compressor, tiny_model, tiny_tokenizer
from torch import Tensor

from ccm import get_method
from ccm.chat.turns import render
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.memory import Memory
from ccm.errors import ConfigError, MismatchError
from ccm.methods.base import METHODS
from ccm.methods.baselines import BASELINES as COMPRESSORS
from ccm.methods.baselines.pooling import TAPS, Pooling, bounds, chunks
from ccm.methods.synthesis.mean_pool import pooled
from ccm.methods.text.summary import OPENING, ROLE
from ccm.training import TrainConfig, load_recipe
from ccm.training.recursion import parallel_losses

TOLERANCE = 1e-4
BROKEN = 0.1
ROWS = random_rows([[5, 4, 7, 3, 8], [2, 11, 3, 13, 4], [4, 6, 3], [9]])
RULE = {"gisting": "replace"}
BASELINES = list(COMPRESSORS)
KINDS = ["ccm", *BASELINES]
#: Kinds with every rule that means something for them.
BOTH = [
    ("gisting-online", "concat"),
    ("gisting-online", "mean"),
    ("gisting", "replace"),
    ("compressive", "concat"),
    ("compressive", "mean"),
    ("autocompressor", "concat"),
    ("autocompressor", "replace"),
]
RECIPES = Path(__file__).parents[2] / "recipes" / "baselines"


def baseline(kind: str, family: str = "llama", backend: str = "sdpa", **config) -> Compressor:
    """A compressor of a kind with weights that matter, those of a pooling included."""
    compressor = tiny_compressor(family, backend, kind=kind, **{"rule": RULE.get(kind, "concat"), **config})
    if kind == "compressive":
        with torch.no_grad():
            compressor.pooling.curve.normal_(0, 2, generator=torch.Generator().manual_seed(3))
    return compressor


def parallel(compressor: Compressor, **sizes: int) -> list[list[Tensor]]:
    with torch.no_grad():
        out = compressor(ROWS, **sizes)
    return [[out.segment_logits(r, j) for j in range(len(row))] for r, row in enumerate(ROWS)]


def remember(compressor: Compressor, memory: Memory | None, row: list[list[int]], j: int, **sizes) -> Memory:
    """Mem(j) of a row, from Mem(j-1) or from the whole history."""
    if compressor.kind == "gisting":
        return compressor.compress([[*chain(*row[: j + 1])]], **sizes)
    return compressor.compress([row[j]], memory, **sizes)


def recurrent(compressor: Compressor, **sizes: int) -> list[list[Tensor]]:
    result = []
    for row in ROWS:
        memory, logits = None, []
        for j, segment in enumerate(row):
            logits.append(compressor.logits([segment], memory)[0])
            memory = remember(compressor, memory, row, j, **sizes)
        result.append(logits)
    return result


def distance(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    return max(
        (x - y).abs().max().item() for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


# ---------------------------------------------------------------------- the contract


@pytest.mark.parametrize(
    ("family", "backend", "kind", "rule"),
    [("llama", "sdpa", *both) for both in BOTH]
    + [(*case, kind, RULE.get(kind, "concat")) for case in CASES[1:] for kind in BASELINES],
)
def test_parallel_equals_recurrent(family, backend, kind, rule, record_property):
    compressor = baseline(kind, family, backend, rule=rule)
    expected, got = recurrent(compressor), parallel(compressor)
    record_property("largest_error", error := distance(expected, got))
    # a summary goes through the whole depth of the model at every fold, and so do its rounding errors
    assert error < (20 * TOLERANCE if kind == "autocompressor" else TOLERANCE)
    for row, logits in zip(ROWS, expected, strict=True):
        for segment, with_memory in zip(row[1:], logits[1:], strict=True):
            assert (with_memory - compressor.logits([segment])[0]).abs().max() > 1e-2, (
                "the memory does not matter"
            )


@pytest.mark.parametrize("kind", ["gisting-online", "compressive", "autocompressor"])
def test_a_ragged_batch_equals_its_rows(kind):
    compressor = baseline(kind)
    expected, memory = recurrent(compressor)[:2], None
    for j, segments in enumerate(zip(*ROWS[:2], strict=True)):
        ids, mask = pad(segments, ("left", "right")[j % 2])
        logits = compressor.logits(ids, memory, mask)
        for r in range(2):
            assert (logits[r][mask[r].bool()] - expected[r][j]).abs().max() < TOLERANCE
        memory = compressor.compress(ids, memory, mask)


@pytest.mark.parametrize("kind", BASELINES)
def test_fewer_slots_than_trained(kind):
    compressor = baseline(kind, slots=4)
    assert distance(recurrent(compressor, slots=1), parallel(compressor, slots=1)) < TOLERANCE
    assert distance(parallel(compressor, slots=1), parallel(compressor)) > 1e-2


@pytest.mark.parametrize("kind", BASELINES)
def test_what_is_compressed_is_what_its_kind_says(kind, monkeypatch):
    """Negative control: training with the blocks of CCM is not the recursion of a baseline."""
    compressor = baseline(kind)
    expected = recurrent(compressor)
    compressor.comp_embeddings = tiny_compressor("llama").comp_embeddings  # those that are pooled have none
    monkeypatch.setattr(type(compressor), "blocks", Compressor.blocks)
    monkeypatch.setattr(type(compressor), "whole", False)
    assert distance(expected, parallel(compressor)) > BROKEN


# ---------------------------------------------------------------------- the base model stays as it is


@pytest.mark.parametrize("kind", BASELINES)
def test_text_goes_through_the_base_model_bit_for_bit(kind):
    compressor, untouched = baseline(kind, target_modules="all"), tiny_model()
    ids = torch.tensor([ROWS[1][1]])
    parallel(compressor)
    recurrent(compressor)
    with torch.no_grad():
        assert torch.equal(compressor.model(ids).logits, untouched(ids).logits)
        assert torch.equal(compressor.logits(ids), untouched(ids).logits)
        # with a memory too: the adapter takes part in making it, not in reading it
        memory = compressor.compress([ROWS[0][0]])
        before = compressor.logits(ids, memory)
        scramble(compressor, seed=9)
        read = replace(memory, fingerprint=compressor.fingerprint())
        assert torch.equal(compressor.logits(ids, read), before)
        assert (compressor.logits(ids, compressor.compress([ROWS[0][0]])) - before).abs().max() > BROKEN


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", BASELINES)
def test_every_parameter_that_is_read_gets_a_gradient(kind):
    compressor = baseline(kind, target_modules="all")
    names = {id(p): name for name, p in compressor.named_parameters()}
    compressor(ROWS).loss.backward()
    adapter = {id(p) for p in compressor.trainable_parameters()}
    assert all(p.grad is None for p in compressor.parameters() if id(p) not in adapter)
    for parameter in compressor.trainable_parameters():
        name = names[id(parameter)]
        # of the last layer only keys and values are read, unless its output is
        unread = "layers.2." in name and not any(part in name for part in ("k_proj", "v_proj"))
        unread &= kind != "autocompressor"
        assert (parameter.grad is not None and bool(parameter.grad.abs().max() > 1e-7)) != unread, name


@pytest.mark.parametrize("kind", BASELINES)
def test_the_gradient_is_the_slope_of_the_loss(kind, monkeypatch):
    monkeypatch.setattr(COMPRESSORS[kind], "truncate", 0)
    compressor = baseline(kind)
    parameter = compressor.slot_parameter
    compressor(ROWS).loss.backward()
    at = int(parameter.grad.abs().argmax())
    step = torch.zeros_like(parameter).view(-1)
    step[at] = 1e-3
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter += sign * step.view_as(parameter)
            losses.append(float(compressor(ROWS).loss))
            parameter -= sign * step.view_as(parameter)
    slope = (losses[0] - losses[1]) / 2e-3
    assert float(parameter.grad.view(-1)[at]) == pytest.approx(slope, rel=0.05, abs=1e-4)


def test_soft_prompts_are_trained_through_two_folds(monkeypatch):
    """Rows of three segments have the whole gradient, longer ones a part of it; the loss is the same."""

    def gradient(rows, truncate):
        monkeypatch.setattr(COMPRESSORS["autocompressor"], "truncate", truncate)
        compressor = baseline("autocompressor")
        loss = compressor(rows).loss
        loss.backward()
        return float(loss.detach()), compressor.comp_embeddings.grad

    short, long = [row[:3] for row in ROWS], ROWS
    for rows, same in ((short, True), (long, False)):
        (cut, part), (whole, full) = gradient(rows, 2), gradient(rows, 0)
        assert cut == pytest.approx(whole)
        assert (float((part - full).abs().max()) < 1e-6 * float(full.abs().max())) == same
    assert not torch.allclose(gradient(short, 1)[1], gradient(short, 2)[1])  # one fold is less than two


@pytest.mark.parametrize("kind", BASELINES)
def test_training_lowers_the_loss(kind):
    from ccm.data.rows import ConversationRow

    rows = [
        ConversationRow(str(r), tuple(map(tuple, row)), tuple((1, len(segment)) for segment in row))
        for r, row in enumerate(ROWS[:3])
    ]
    compressor = tiny_compressor("llama", kind=kind, rule=RULE.get(kind, "concat"), target_modules="all")
    optimizer = torch.optim.AdamW(compressor.trainable_parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        loss, count = parallel_losses(compressor, rows, "ce")
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()) / count)
    assert losses[-1] < 0.9 * losses[0]


# ---------------------------------------------------------------------- pooling


def test_chunks_cover_a_text_evenly():
    assert bounds(8, 4) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert bounds(10, 4) == [(0, 3), (2, 5), (5, 8), (7, 10)]
    assert bounds(1, 3) == [(0, 1)] * 3
    start, stop = torch.tensor(bounds(10, 4)).unbind(-1)
    near, inside = chunks(start, stop, 10)
    assert inside.sum(-1).tolist() == [3, 3, 3, 3]
    assert torch.allclose(near.sum(-1)[inside], torch.tensor(1.0))


def test_a_flat_curve_is_the_mean_and_a_learned_one_is_not():
    pooling, keys = Pooling(1, 2), torch.randn(2, 24, 8)
    start, stop = torch.tensor(bounds(24, 3)).unbind(-1)
    got, values = pooling(0, chunks(start, stop, 24), keys, 2 * keys)
    expected = keys.unflatten(1, (3, 8)).mean(2)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(values, 2 * expected)
    with torch.no_grad():
        pooling.curve[0, 0, 1, TAPS - 1] = 50.0  # keys of the second head: only the end of a chunk counts
    got, values = pooling(0, chunks(start, stop, 24), keys, 2 * keys)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], keys[1, 7::8])
    torch.testing.assert_close(values, 2 * expected)


def test_an_untrained_compressive_memory_is_mean_pooling(tmp_path):
    model = tiny_model()
    COMPRESSORS["compressive"](model, CompressorConfig(kind="compressive", slots=2)).save_pretrained(tmp_path)
    segments = random_rows([[6, 8, 4, 5]])[0]
    untrained = get_method("compressive", adapter=str(tmp_path)).open(tiny_model())
    mean = get_method("mean-pool", slots=2).open(tiny_model())
    for segment in segments[:3]:
        untrained.append(segment)
        mean.append(segment)
    torch.testing.assert_close(untrained.logits(segments[3]), mean.logits(segments[3]), rtol=0, atol=1e-4)
    scramble(untrained.reader)
    again = untrained.reader.compress([segments[0]])
    first = get_method("mean-pool", slots=2).open(tiny_model())
    first.append(segments[0])
    assert not torch.allclose(again.rows[0].slots.keys, first.memory.rows[0].slots.keys, atol=BROKEN)


# ---------------------------------------------------------------------- methods without training


def test_mean_pool_averages_what_the_base_model_read():
    run, full = (get_method(name).open(tiny_model()) for name in ("mean-pool", "full"))
    segment = random_rows([[12]])[0][0]
    run.append(segment)
    full.append(segment)
    raw, slots = full.memory.rows[0].window, run.memory.rows[0].slots
    for means, states in zip(slots, raw, strict=True):
        torch.testing.assert_close(means, states.unflatten(2, (4, 3)).mean(3))
    assert torch.equal(pooled(raw.keys, 12), raw.keys)


def test_mean_pool_with_a_slot_for_every_token_is_full_context():
    segments = ROWS[0]
    for slots, same in ((99, True), (2, False)):
        run, full = (
            get_method("mean-pool", slots=slots).open(tiny_model()),
            get_method("full").open(tiny_model()),
        )
        for segment in segments[:4]:
            run.append(segment)
            full.append(segment)
        gap = (run.logits(segments[4]) - full.logits(segments[4])).abs().max()
        assert (gap < TOLERANCE) == same and (same or gap > BROKEN)
        assert run.memory.rows[0].steps == 4 and run.memory.tokens == sum(map(len, segments[:4]))


TOKENIZER = tiny_tokenizer()
TURNS = [
    list(render(TOKENIZER, role, text).ids)
    for role, text in (
        ("user", "hello"),
        ("assistant", "yes?"),
        ("user", "I am Ann"),
        ("assistant", "Hi Ann"),
    )
]


def written_and_recent(run):
    """What a summary's run has written, and the token ids that it holds behind it."""
    length, *notes = run.memory.rows[0].notes
    return TOKENIZER.decode(notes[:length]), notes[length:]


def test_a_summary_is_written_by_the_model_and_read_as_text():
    run = get_method("summary", every=2, max_tokens=9).open(runs.model(), TOKENIZER)
    run.append(TURNS[0])
    run.append(TURNS[1])
    full = get_method("full").open(runs.model())
    full.append(TURNS[0])
    full.append(TURNS[1])
    assert written_and_recent(run)[0] == "" and torch.allclose(
        run.logits(TURNS[3]), full.logits(TURNS[3]), atol=TOLERANCE
    )
    asked: list[str] = []
    generate = run.reader.generate
    run.reader.generate = lambda ids, *args, **options: (
        asked.append(TOKENIZER.decode(ids[0])) or generate(ids, *args, **options)
    )
    twin = run.fork()
    run.append(TURNS[2])
    assert "hello" in asked[0] and "yes?" in asked[0] and "Ann" not in asked[0]
    summary, recent = written_and_recent(run)
    assert summary and recent == list(TURNS[2]) and run.memory.tokens == len(TURNS[0] + TURNS[1])
    # what is read is the base model over [summary turn | newest segment]
    text = [*render(TOKENIZER, ROLE, OPENING + summary).ids, *TURNS[2]]
    whole = runs.model()(torch.tensor([text + TURNS[3]])).logits[0, len(text) :]
    torch.testing.assert_close(run.logits(TURNS[3]), whole, rtol=0, atol=TOLERANCE)
    # greedy: the same again; and the next summary is made from this one
    twin.append(TURNS[2])
    assert written_and_recent(twin) == written_and_recent(
        run
    ) and twin.memory.length == run.memory.length == len(text)
    run.append(TURNS[3])
    run.append(TURNS[0])
    assert OPENING + summary in asked[-1] and "Ann" in asked[-1]
    assert written_and_recent(twin) == (summary, list(TURNS[2]))


def test_a_blank_summary_leaves_the_one_before(monkeypatch):
    run = get_method("summary", every=1).open(runs.model(), TOKENIZER)
    written = iter(["Ann is here.", "", "never"])
    monkeypatch.setattr(type(run.method), "_write", lambda self, *given: next(written))
    for turn in TURNS[:3]:
        run.append(turn)
    assert written_and_recent(run) == ("Ann is here.", list(TURNS[2]))


def test_a_summary_needs_a_chat_model():
    plain = tiny_tokenizer()
    plain.chat_template = None
    for tokenizer, words in ((None, "no tokenizer"), (plain, "without a chat template")):
        with pytest.raises(ConfigError, match=words):
            get_method("summary").open(runs.model(), tokenizer)


# ---------------------------------------------------------------------- trained methods


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for kind in KINDS:
        baseline(kind, slots=3).save_pretrained(folder / kind, dtype=torch.float32)
    return {kind: folder / kind for kind in KINDS}


def loaded_from(kind: str, folder: Path) -> Compressor:
    return COMPRESSORS.get(kind, Compressor).from_pretrained(tiny_model(), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_makes_the_same_memory(kind, adapters):
    settings = json.loads((adapters[kind] / "ccm_config.json").read_text())
    assert settings["kind"] == kind
    loaded, made = loaded_from(kind, adapters[kind]), baseline(kind, slots=3)
    assert loaded.config == made.config and loaded.fingerprint() == made.fingerprint()
    ours, theirs = (c.compress([ROWS[0][0]]).rows[0].slots for c in (loaded, made))
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_kinds_do_not_read_each_others_memories(adapters):
    prints = {loaded_from(kind, folder).fingerprint() for kind, folder in adapters.items()}
    assert len(prints) == len(KINDS)


@pytest.mark.parametrize("kind", BASELINES)
def test_a_method_takes_adapters_of_its_kind_alone(kind, adapters):
    run = get_method(kind, adapter=str(adapters[kind])).open(tiny_model())
    assert run.reader.config.kind == kind
    for name, other in ((kind, "ccm"), ("ccm-concat", kind)):
        with pytest.raises(MismatchError, match=f"adapter .* is of kind '{other}', expected "):
            get_method(name, adapter=str(adapters[other])).open(tiny_model())
        with pytest.raises(ConfigError, match=f"method {name}: got a compressor of kind '{other}'"):
            get_method(name).bind(loaded_from(other, adapters[other]))


def test_adapters_from_before_there_were_kinds_are_ccm(adapters, tmp_path):
    for file in adapters["ccm"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "ccm_config.json").read_text())
    del settings["kind"]
    (tmp_path / "ccm_config.json").write_text(json.dumps(settings))
    old, new = (Compressor.from_pretrained(tiny_model(), folder) for folder in (tmp_path, adapters["ccm"]))
    assert old.fingerprint() == new.fingerprint()


def test_gisting_reads_the_whole_history_again(adapters):
    run = get_method("gisting", adapter=str(adapters["gisting"])).open(tiny_model())
    passed: list[int] = []
    base = run.reader.model.base_model
    hook = base.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for segment in ROWS[0][:3]:
        run.append(segment)
        assert run.memory.length == 3
    assert passed == [5 + 3, 9 + 3, 16 + 3]  # tokens so far, and three COMP tokens
    hook.remove()
    at_once = run.reader.compress([[*chain(*ROWS[0][:3])]])
    assert torch.equal(run.memory.rows[0].slots.keys, at_once.rows[0].slots.keys)
    with pytest.raises(ConfigError, match="whole history at once"):
        run.reader.compress([ROWS[0][3]], run.memory)
    before = run.logits(ROWS[0][3])
    with pytest.raises(ConfigError, match="context of 256"):
        run.append(random_rows([[250]])[0][0])
    assert torch.equal(run.logits(ROWS[0][3]), before)
    run.append(ROWS[0][3])  # and goes on


@pytest.mark.parametrize("kind", BASELINES)
def test_baselines_have_slots_only(kind, adapters):
    rule = RULE.get(kind, "concat")
    for change in ({"window": 8}, {"sink": 2}):
        with pytest.raises(ConfigError, match=kind):
            COMPRESSORS[kind](tiny_model(), CompressorConfig(kind=kind, rule=rule, **change))
    compressor = loaded_from(kind, adapters[kind])
    with pytest.raises(ConfigError, match="slots only"):
        compressor.compress([ROWS[0][0]], window=8)
    with pytest.raises(ConfigError, match="slots only"):
        compressor(ROWS, sink=2)
    with pytest.raises(ConfigError, match="window_choices"):
        TrainConfig(compressor=CompressorConfig(kind=kind, rule=rule), window_choices=(0, 64))
    with pytest.raises(ConfigError, match="rule_choices"):
        TrainConfig(compressor=CompressorConfig(kind=kind, rule=rule), rule_choices=("concat",))


def test_bad_kinds_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"unknown compressor\.kind 'gist' \(did you mean gisting\?\): expected one of autocompressor, ccm",
    ):
        TrainConfig(compressor=CompressorConfig(kind="gist"))
    for made_by, kind in ((Compressor, "gisting"), (COMPRESSORS["gisting"], "ccm")):
        with pytest.raises(ConfigError, match=f"kind: got '{kind}', expected '{made_by.kind}'"):
            made_by(tiny_model(), CompressorConfig(kind=kind, sink=0, rule="replace"))
    for kind, rule in (("gisting", "concat"), ("autocompressor", "mean")):
        with pytest.raises(ConfigError, match=f"got '{rule}', expected .*replace with kind '{kind}'"):
            COMPRESSORS[kind](tiny_model(), CompressorConfig(kind=kind, rule=rule))
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        TrainConfig(compressor=CompressorConfig(kind="autocompressor"), gradient_checkpointing=True)


# ---------------------------------------------------------------------- training by recipe


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_logs(tmp_path_factory.mktemp("logs"))


@pytest.mark.parametrize("kind", BASELINES)
def test_the_trainer_makes_an_adapter_for_the_method(kind, logs, tmp_path):
    settings = {"slots": 2, "kind": kind, "rule": RULE.get(kind, "concat")}
    run = runs.trainer(tmp_path, logs, compressor=settings, window_choices=(), steps=4)
    before = [p.clone() for p in run.parameters]
    report = run.run()
    assert report["loss"] > 0 and "recovered_share_1_slots" in report
    assert any(not torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
    record = json.loads((run.adapter / "training.json").read_text())
    assert record["parameters"] == sum(p.numel() for p in run.parameters)
    opened = get_method(kind, adapter=str(run.adapter)).open(runs.model(), runs.TOKENIZER)
    opened.append(TURNS[0])
    assert opened.memory.slots == 2
    resumed = runs.trainer(tmp_path, logs, compressor=settings, window_choices=(), steps=6)
    assert resumed.step == 4 and resumed.run()["step"] == 6
    with pytest.raises(
        ConfigError, match=f"init_from: adapter .* is of kind '{kind}', compressor.kind is 'ccm'"
    ):
        runs.trainer(
            tmp_path / "other", logs, compressor={**settings, "kind": "ccm"}, init_from=str(run.adapter)
        )


def test_a_run_from_before_there_were_kinds_goes_on(logs, tmp_path):
    runs.trainer(tmp_path, logs, steps=2).run()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    saved = json.loads(state["config"])
    del saved["compressor.kind"]
    saved |= {"compressor.comp_positions": "after", "compressor.conditional": True}  # options of the past
    torch.save({**state, "config": json.dumps(saved)}, tmp_path / "checkpoint.pt")
    assert runs.trainer(tmp_path, logs, steps=3).step == 2
    torch.save(
        {**state, "config": json.dumps({**saved, "compressor.conditional": False})},
        tmp_path / "checkpoint.pt",
    )
    with pytest.raises(ConfigError, match=r"compressor\.conditional: it has False"):
        runs.trainer(tmp_path, logs, steps=3)
    torch.save({**state, "config": json.dumps(saved)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match=r"compressor\.kind: it has ccm, got compressive"):
        settings = {"slots": 2, "kind": "compressive", "rule": "mean"}
        runs.trainer(tmp_path, logs, compressor=settings, window_choices=())


def test_the_recipes_differ_in_the_compressor_alone():
    recipes = {path.stem: load_recipe(path) for path in sorted(RECIPES.glob("*.yaml"))}
    assert set(recipes) == {*BASELINES, "ccm-concat", "ccm-merge"}
    shared = recipes["ccm-concat"]
    for name, config in recipes.items():
        assert replace(config, compressor=shared.compressor) == shared
        ours = config.compressor
        assert ours.kind == METHODS[name].made_by.kind
        assert replace(ours, kind="ccm", rule="concat") == shared.compressor
    assert shared.objective == "distill" and shared.data == {"chitchat": {"turns": [10]}}


def test_the_recipes_train_as_many_parameters_as_they_say():
    """On the attention of the embedded model."""
    counts = {}
    for path in RECIPES.glob("*.yaml"):
        model = tiny_model(
            hidden_size=576,
            intermediate_size=8,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
        config = load_recipe(path).compressor
        compressor = COMPRESSORS.get(config.kind, Compressor)(model, config)
        counts[path.stem] = sum(p.numel() for p in compressor.trainable_parameters())
        assert f"{counts[path.stem]:,} parameters" in path.read_text()
    assert max(counts.values()) < 1.01 * min(counts.values())


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 7\nrows: 2\ncompressor: {slots: 8, rank: 2}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\ncompressor: {rank: 3}\n")
    (tmp_path / "c.yaml").write_text("extends: b.yaml\nrows: 5\n")
    config = load_recipe(tmp_path / "c.yaml", ["steps=9"])
    assert (config.steps, config.rows) == (9, 5)
    assert config.compressor == CompressorConfig(rank=3)  # a key counts as a whole


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("none.yaml", ["none.yaml", "No such file"]),
        ("loop.yaml", ["extends", "loop.yaml", "another recipe"]),
        ("back.yaml", ["extends", "loop.yaml", "another recipe"]),
        ("../loop.yaml", ["extends", "same folder"]),
        ("3", ["extends", "3"]),
        ("wrong.yaml", ["stpes", "did you mean steps?"]),
    ],
)
def test_a_recipe_that_cannot_be_extended(value, words, tmp_path):
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({"extends": 3 if value == "3" else value}))
    (tmp_path / "back.yaml").write_text("extends: loop.yaml\n")
    (tmp_path / "wrong.yaml").write_text("stpes: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / "loop.yaml")
    for word in words:
        assert word in str(caught.value)
