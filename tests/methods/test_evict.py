"""Which entries stay: scores by hand, and by the attention that the model itself returns."""

from __future__ import annotations

import pytest
import torch
from family_models import family_model
from tiny import tiny_tokenizer

from ccm import get_method
from ccm.core.memory import KV, Row
from ccm.errors import ConfigError
from ccm.methods import Method

#: No token comes twice: where it stands can be told by its value.
TEXT = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:40].add(5).tolist()


def row_of(window: KV | None = None) -> Row:
    none = torch.empty(1, 1, 0, 2)
    return Row(KV(none, none), KV(none, none), window or KV(none, none))


def kv(keys: list[list[float]]) -> KV:
    tensor = torch.tensor(keys)[None, None]
    return KV(tensor, torch.arange(tensor.numel(), dtype=torch.float32).view_as(tensor))


def kept(method: Method, keys: KV, window: KV | None = None) -> list[int]:
    """Which entries stay, told by their values."""
    return (method.keep(row_of(window), keys, None).values[0, 0, :, 0] / 2).int().tolist()


def test_small_keys_stay() -> None:
    entries = kv([[3, 4], [1, 0], [0, 2], [6, 8]])
    assert kept(get_method("key-norm", tokens=2), entries) == [1, 2]
    assert kept(get_method("key-norm", tokens=9), entries) == [0, 1, 2, 3]
    assert kept(get_method("key-norm", tokens=0), entries) == []


def test_keys_unlike_the_mean_stay() -> None:
    """However long they are."""
    entries = kv([[5, 0], [1, 0.1], [0, 1], [-1, 1], [9, -0.1]])
    assert kept(get_method("keydiff", tokens=2), entries) == [2, 3]


def test_of_equal_entries_the_newest_stay() -> None:
    """Also if they differ by rounding."""
    entries = kv([[1, 0], [1.0000001, 0], [0.9999999, 0], [1, 0]])
    assert kept(get_method("key-norm", tokens=2), entries) == [2, 3]


def test_lag_ranks_within_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both parts the entry with most deviation over channels, measured by the next part, and the last part."""
    method = get_method("lagkv", tokens=4)
    monkeypatch.setattr(type(method), "lag", 2)
    keys = torch.tensor([[0.0, 0], [0, 9], [5, 0], [1, 1], [0, 0], [1, 1]])[None, None]
    assert kept(method, KV(keys, torch.arange(12.0).view_as(keys))) == [1, 2, 4, 5]
    # what is still in the window measures too, and is not for this method to keep
    entries, window = (
        KV(keys, torch.arange(12.0).view_as(keys)).slice(0, 4),
        KV(keys[:, :, 4:], keys[:, :, 4:]),
    )
    assert kept(get_method("lagkv", tokens=2), entries, window) == [1, 2]


def plain_attention(method: Method, ids: list[int]) -> torch.Tensor:
    """(L, H, G, T, T) of the plain model."""
    found: list[torch.Tensor] = []
    names = method.reader.family.attention
    hooks = [
        method.reader.model.get_submodule(name).register_forward_hook(
            lambda m, i, out: found.append(out[1][0])
        )
        for name in names
    ]
    method.reader.logits([ids])
    for hook in hooks:
        hook.remove()
    return torch.stack(found).unflatten(1, (method.reader.kv_shape()[1], -1))


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in ("snapkv", "tova", "h2o") for family in ("llama", "gemma2", "phi", "gpt_oss")]
    + [("kvzip", "llama"), ("kvzip", "phi")],
)
def test_attention_says_which_stay(name: str, family: str) -> None:
    method = get_method(name, sink=0, window=0, tokens=8).bind(family_model(family, "eager"))
    n = len(TEXT)
    if name == "kvzip":  # without a tokenizer the text alone is read again
        score = plain_attention(method, TEXT + TEXT)[..., n:, :n].amax(dim=(2, 3))
    else:
        found = plain_attention(method, TEXT)
        if name == "h2o":
            score = found.sum(dim=(2, 3))
        elif name == "tova":
            score = found[..., -1, :].mean(dim=(1, 2)).unsqueeze(1).expand(-1, found.shape[1], -1)
        else:
            score = torch.nn.functional.avg_pool1d(found[..., -32:, :].mean(dim=(2, 3)), 5, 1, 2)
    full = get_method("full").bind(method.reader)
    raw = full.fold(full.empty(), [TEXT]).rows[0].window
    slots = method.fold(method.empty(), [TEXT]).rows[0].slots
    where = (slots.values.unsqueeze(3) - raw.values.unsqueeze(2)).abs().sum(-1).argmin(-1)  # (L, H, 8)
    assert torch.equal(slots.keys, raw.take(where).keys)
    best = score.topk(8, dim=2).values.sum(2)
    assert torch.allclose(score.gather(2, where).sum(2), best, rtol=2e-3)
    assert not torch.allclose(
        score[:, :, -8:].sum(2), best, rtol=2e-3
    )  # negative control: not just the newest


def test_kvzip_knows_the_text_of_its_window() -> None:
    """Its ids go with the tokens, through a file and into the next fold; the request stands before the text."""
    tokenizer = tiny_tokenizer()
    method = get_method("kvzip", sink=2, window=5, tokens=4)
    model = family_model("llama")
    bare, asked = method.bind(model), method.bind(model, tokenizer)
    assert asked.behind - bare.behind == len(tokenizer.encode(method.REQUEST, add_special_tokens=False))
    memory = bare.fold(bare.empty(), [TEXT[:9]])
    assert memory.rows[0].notes == tuple(TEXT[4:9])
    memory = bare.fold(memory, [TEXT[9:11]], answered=True)
    assert memory.rows[0].notes == tuple(TEXT[4:11])
    memory = bare.fold(memory, [TEXT[11:20]])
    assert memory.rows[0].notes == tuple(TEXT[15:20])


def test_retrieval_reads_the_blocks_that_the_newest_text_asks_for() -> None:
    """A text that comes again brings its block back; the answered question stays raw, and its choice is kept."""
    method = get_method("retrieve", sink=2, window=8, tokens=8, block=4).bind(family_model("llama"))
    memory = method.empty()
    for start in range(0, 40, 8):
        memory = method.fold(memory, [TEXT[start : start + 8]])
    assert memory.rows[0].slots.length == 30, "something is lost"
    choices = set()
    for start in range(2, 30, 4):
        asked = method.fold(memory, [TEXT[start : start + 4]], answered=True)
        row, read = asked.rows[0], method.recall(asked).rows[0]
        assert row.slots.length == 30 and row.window.length == 12
        assert len(row.notes) == 2 and list(row.notes) == sorted(row.notes)
        taken = [row.slots.slice(4 * n, 4 * n + 4) for n in row.notes]
        assert torch.equal(read.slots.keys, KV.cat(taken).keys)
        prompted = method.recall(memory, [TEXT[start : start + 4]]).rows[0]
        assert torch.equal(prompted.slots.keys, read.slots.keys)
        choices.add(row.notes)
    assert len(choices) > 1, "whatever is asked, the same is read"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snapkv", {"tokens": -1}),
        ("h2o", {"tokens": -2}),
        ("retrieve", {"block": 0}),
        ("retrieve", {"tokens": 15}),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"method {name}: .*at least"):
        get_method(name, **options)
