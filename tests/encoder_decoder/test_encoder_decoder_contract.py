"""The contract on encoder-decoders: one parallel pass gives the same logits as folding segment by segment."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import transformers
from tiny import history, pad, random_rows, scramble, two_sided_compressor, two_sided_model
from torch import Tensor

from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.memory import Memory
from ccm.core.rule import Concat
from ccm.encoder_decoder import carrier, passes
from ccm.errors import ConfigError, MismatchError, UnsupportedModelError
from ccm.methods import get_method
from ccm.methods.baselines import BASELINES

TOLERANCE, BROKEN = 1e-4, 0.05
ROWS = random_rows([[5, 4, 7, 3, 8], [2, 11, 3, 13, 4], [4, 6, 3], [9]])
IDS = torch.tensor([ROWS[0][4], ROWS[1][1][:8]])
WORDS = torch.tensor([[0, *ROWS[0][1]], [0, *ROWS[1][4]]])
RULES = ["concat", "mean", "ema", "replace", "bounded-merge", "bounded-drop"]
CASES = [
    *(("t5", "sdpa", rule) for rule in RULES),
    *((family, "eager", "concat") for family in ("t5", "bart")),
    *((family, "sdpa", rule) for family in ("mt5", "umt5", "bart") for rule in ("concat", "mean")),
]


@lru_cache(maxsize=2)  # neighbours share one
def compressor_for(family: str, backend: str = "sdpa", rule: str = "concat") -> Compressor:
    name, _, overflow = rule.partition("-")
    options = {"blocks": 2, "overflow": overflow} if name == "bounded" else {}
    return two_sided_compressor(family, backend, rule=name, rule_options=options)


def parallel(compressor: Compressor, sink: int = 0, window: int = 0, begin: int = 1) -> list[list[Tensor]]:
    with torch.no_grad():
        out = compressor(ROWS, sink=sink, window=window, begin=begin)
    return [[out.segment_logits(r, j) for j in range(len(row))] for r, row in enumerate(ROWS)]


def recurrent(compressor: Compressor, sink: int = 0, window: int = 0, begin: int = 1) -> list[list[Tensor]]:
    result = []
    for row in ROWS:
        memory, logits = None, []
        for segment in row:
            logits.append(compressor.logits([segment], memory, begin=begin)[0])
            memory = compressor.compress([segment], memory, sink=sink, window=window)
        result.append(logits)
    return result


def recurrent_batch(compressor: Compressor, sink: int, window: int, begin: int) -> list[list[Tensor]]:
    """The rows of five segments as one ragged batch, padded now at the left, now at the right."""
    memory, result = None, [[], []]
    for j, segments in enumerate(zip(*ROWS[:2], strict=True)):
        ids, mask = pad(segments, ("left", "right")[j % 2])
        logits = compressor.logits(ids, memory, mask, begin=begin)
        for r in range(2):
            result[r].append(logits[r][mask[r].bool()])
        memory = compressor.compress(ids, memory, mask, sink=sink, window=window)
    return result


def distance(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    """The largest difference of any logit; those that there are none of are none in both."""
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    assert all(torch.equal(x.isnan(), y.isnan()) for x, y in pairs)
    return max(float((x - y).nan_to_num().abs().max()) for x, y in pairs)


@pytest.mark.parametrize(("sink", "window", "begin"), [(0, 0, 1), (2, 12, 2)])
@pytest.mark.parametrize(("family", "backend", "rule"), CASES)
def test_parallel_equals_recurrent(family, backend, rule, sink, window, begin, record_property):
    compressor = compressor_for(family, backend, rule)
    expected = recurrent(compressor, sink, window, begin)
    errors = [
        distance(expected, parallel(compressor, sink, window, begin)),
        distance(expected[:2], recurrent_batch(compressor, sink, window, begin)),
    ]
    record_property("largest_error", max(errors))
    assert max(errors) < TOLERANCE
    for row, logits in zip(ROWS, expected, strict=True):
        for segment, with_memory in zip(row[1:], logits[1:], strict=True):
            alone = compressor.logits([segment], begin=begin)[0]
            assert (with_memory - alone).nan_to_num().abs().max() > 1e-2, "the memory does not matter"


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_fewer_slots_than_trained(family):
    """The first k of n COMP tokens give what k alone give: a COMP token does not see those behind it."""
    compressor = compressor_for(family)
    memory = history(compressor, ROWS[0][:3], slots=1)
    with torch.no_grad():
        got = compressor(ROWS[:1], slots=1).segment_logits(0, 3)
    assert (got - compressor.logits([ROWS[0][3]], memory)[0]).abs().max() < TOLERANCE
    first = compressor.compress([ROWS[0][0]]).rows[0].slots.slice(0, 1)
    alone = compressor.compress([ROWS[0][0]], slots=1).rows[0].slots
    torch.testing.assert_close(first, alone)


# ---------------------------------------------------------------------- negative controls


@pytest.mark.parametrize("family", ["t5", "umt5", "bart"])
def test_a_shifted_position_breaks_it(family, monkeypatch):
    """T5 knows how far a slot is, BART at which position a text begins."""
    compressor = compressor_for(family)
    expected = recurrent(compressor)
    if family == "bart":
        own = passes.Rows.raw_position
        monkeypatch.setattr(passes.Rows, "raw_position", lambda rows: own(rows) + (rows.layout.segment > 0))
    else:
        own = passes.Rows.distance
        front = lambda rows: rows.front.shape[1]  # noqa: E731
        monkeypatch.setattr(
            passes.Rows,
            "distance",
            lambda rows: torch.cat([own(rows)[..., : front(rows)] + 2, own(rows)[..., front(rows) :]], dim=2),
        )
    assert distance(expected, parallel(compressor)) > BROKEN


def test_a_dropped_slot_breaks_it(monkeypatch):
    compressor = compressor_for("t5")
    expected = recurrent(compressor)
    own = Concat.placed

    def placed(rule: Concat, groups: int, n: int):
        columns = own(rule, groups, n)
        return columns._replace(first=columns.first.clone().index_fill_(0, torch.tensor([0]), groups + 1))

    monkeypatch.setattr(Concat, "placed", placed)
    assert distance(expected, parallel(compressor)) > BROKEN


def test_an_open_gate_breaks_it(monkeypatch):
    compressor = compressor_for("t5")
    expected = recurrent(compressor)
    own = carrier.EncoderDecoder._encoded

    def wide(self, embeds, place, visible, distance, front, gate):
        return own(self, embeds, place, visible, distance, front, slice(0, None))

    monkeypatch.setattr(carrier.EncoderDecoder, "_encoded", wide)
    assert distance(expected, parallel(compressor)) > BROKEN


def test_text_that_sees_its_comp_tokens_breaks_it(monkeypatch):
    compressor = compressor_for("t5")
    expected = recurrent(compressor)
    own = passes.Rows.__init__

    def seeing(rows, layout, rule):
        own(rows, layout, rule)
        same = layout.segment.unsqueeze(-1) == layout.segment.unsqueeze(1)
        rows.visible[..., rows.front.shape[1] :] |= same.unsqueeze(1)

    monkeypatch.setattr(passes.Rows, "__init__", seeing)
    assert distance(expected, parallel(compressor)) > BROKEN


# ---------------------------------------------------------------------- the base model


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5", "bart"])
def test_a_closed_gate_is_the_base_model_bit_for_bit(family):
    compressor, untouched = compressor_for(family), two_sided_model(family)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False}
    compressor(ROWS[:1])  # opens the gate for one pass, and leaves it closed
    with torch.no_grad():
        for call in ({}, {"attention_mask": mask}):
            own, other = (
                m(IDS, decoder_input_ids=WORDS, **call).logits for m in (compressor.model, untouched)
            )
            assert torch.equal(own, other)
        assert torch.equal(compressor.model.generate(IDS, **options), untouched.generate(IDS, **options))
        own = untouched(IDS, decoder_input_ids=WORDS).logits
    both = torch.cat([IDS, WORDS[:, 1:]], dim=1)
    got = compressor.logits(both, begin=IDS.shape[1])[:, IDS.shape[1] - 1 :]
    assert (got - own).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_full_context_is_one_pass_of_the_encoder(family):
    untouched = two_sided_model(family)
    run = get_method("full").open(compressor_for(family).model)
    for segment in ROWS[0][:3]:
        run.append(segment)
    read = [token for segment in ROWS[0][:4] for token in segment]
    with torch.no_grad():
        expected = untouched(torch.tensor([read]), decoder_input_ids=WORDS[1:]).logits[0]
    both = [*ROWS[0][3], *WORDS[1, 1:].tolist()]
    got = run.logits(both, begin=len(ROWS[0][3]))[len(ROWS[0][3]) - 1 :]
    assert (got - expected).abs().max() < TOLERANCE
    raw = get_method("streaming-llm", window=256).open(compressor_for(family).model)  # segment by segment
    for segment in ROWS[0][:3]:
        raw.append(segment)
    assert (raw.logits(both, begin=len(ROWS[0][3]))[-1] - expected[-1]).abs().max() > 1e-2


# ---------------------------------------------------------------------- writing


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("window", [0, 12])
def test_generate_with_its_cache_writes_what_logits_say_without(family, window):
    compressor, prompt = compressor_for(family), ROWS[0][3]
    memory = history(compressor, ROWS[0][:3], sink=2, window=window)
    ids = compressor.generate([prompt], memory, max_new_tokens=5, do_sample=False)[0]
    assert ids[: len(prompt)].tolist() == prompt and len(ids) == len(prompt) + 5
    for k in range(len(prompt), len(ids)):
        logits = compressor.logits([ids[:k].tolist()], memory, begin=len(prompt))[0]
        assert int(logits[-1].argmax()) == int(ids[k])


def test_generate_for_several_conversations_and_beams():
    compressor = compressor_for("t5")
    memories = [history(compressor, row[:2]) for row in ROWS[:2]]
    ids, mask = pad([ROWS[0][2], ROWS[1][2]], "left")
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    both = compressor.generate(ids, Memory.stack(memories), mask, **options)
    for r, memory in enumerate(memories):
        (own,) = compressor.generate([ROWS[r][2]], memory, **options)
        assert own.tolist() == both[r, ids.shape[1] - len(ROWS[r][2]) :].tolist()
    several = compressor.generate(ids, Memory.stack(memories), mask, num_return_sequences=2, **options)
    assert torch.equal(several[::2], both)


def test_stopping_criteria_see_the_prompt_in_front():
    compressor, seen = compressor_for("t5"), []

    def stop(ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        seen.append(ids[0].tolist())
        return torch.full((len(ids),), len(seen) == 2)

    ids = compressor.generate([[5, 6, 7]], max_new_tokens=9, do_sample=False, stopping_criteria=[stop])
    assert ids[0].tolist() == seen[-1] and seen[0][:3] == [5, 6, 7] and [len(s) for s in seen] == [4, 5]


# ---------------------------------------------------------------------- files, and what is refused


def test_memories_and_adapters_are_saved_and_loaded(tmp_path):
    compressor = compressor_for("t5")
    memory = history(compressor, ROWS[0][:3], sink=2, window=8)
    memory.save(tmp_path / "memory")
    loaded, _ = Memory.load(tmp_path / "memory")
    expected = compressor.logits([ROWS[0][3]], memory)
    assert torch.equal(compressor.logits([ROWS[0][3]], loaded), expected)
    compressor.save_pretrained(tmp_path / "adapter", dtype=torch.float32)
    again = Compressor.from_pretrained(two_sided_model("t5"), tmp_path / "adapter")
    assert again.fingerprint() == compressor.fingerprint()
    assert torch.equal(again.logits([ROWS[0][3]], loaded), expected)
    for other in (two_sided_compressor("mt5"), two_sided_compressor("t5", seed=1)):
        with pytest.raises(MismatchError):
            other.logits([ROWS[0][3]], loaded)
    with pytest.raises(MismatchError):
        Compressor.from_pretrained(two_sided_model("umt5"), tmp_path / "adapter")


def test_the_decoder_has_no_adapter():
    for family in ("t5", "bart"):
        for targets in ("attention", "all"):
            compressor = Compressor(two_sided_model(family), CompressorConfig(target_modules=targets))
            adapted = [name for name, _ in compressor.model.named_parameters() if "lora_" in name]
            assert adapted and all(name.startswith(compressor.family.body + ".") for name in adapted)
            feed_forward = [name for name in adapted if "Dense" in name or ".fc" in name]
            assert bool(feed_forward) == (targets == "all")


def test_an_adapter_of_the_feed_forward_passes_the_contract():
    compressor = two_sided_compressor("mt5", target_modules="all")
    assert distance(recurrent(compressor), parallel(compressor)) < TOLERANCE


def test_bytes_of_full_context_are_those_that_the_decoder_reads():
    compressor = compressor_for("t5")
    assert compressor.kv_bytes_per_token() == 2 * 2 * 3 * 8 * 4  # decoder layers, heads, size, fp32
    assert compressor.compress([ROWS[0][0]]).nbytes == 2 * 5 * 3 * 8 * 4 * 2  # all layers, two slots


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: two_sided_model("bart", encoder_attention_heads=2), "2 heads in the encoder and 4"),
        (lambda: transformers.T5Model(two_sided_model("t5").config), "no head that writes"),
        (lambda: _other("pegasus"), "family 'pegasus' is not supported"),
    ],
)
def test_models_that_cannot_be_had_are_refused(make, words):
    with pytest.raises(UnsupportedModelError, match=words):
        Compressor(make())


def _other(kind: str):
    small = {"vocab_size": 97, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.AutoConfig.for_model(kind, **small)
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def test_where_the_decoder_begins_is_checked():
    compressor = compressor_for("t5")
    for begin in (0, 6, [1, 2]):
        with pytest.raises(ConfigError, match="begin"):
            compressor.logits([ROWS[0][0]], begin=begin)
    with pytest.raises(ConfigError, match="begin"):
        compressor(ROWS, begin=3)  # a segment has two tokens
    with pytest.raises(ConfigError, match="use_cache"):
        compressor.generate([[5]], use_cache=False)


def test_kinds_of_baselines_are_for_decoders():
    for kind, made_by in BASELINES.items():
        with pytest.raises(UnsupportedModelError, match=kind):
            made_by(
                two_sided_model("t5"),
                CompressorConfig(kind=kind, rule="replace" if kind == "gisting" else "concat"),
            )


def test_several_adapters_on_one_model_do_not_mix():
    first = compressor_for("t5")
    expected = recurrent(first)
    second = scramble(Compressor(first.model, CompressorConfig(slots=2, sink=0)), seed=7)
    assert distance(recurrent(second), expected) > BROKEN
    assert distance(recurrent(first), expected) == 0
