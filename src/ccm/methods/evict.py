"""Eviction: of the entries beside sink and window the best scored ones stay, and the others are let go.

What differs from method to method is the score. It is made anew whenever text leaves the window, for the entries kept
so far and the leaving ones, and every layer and key head keeps entries of its own. Entries stay as they were computed
and stand in the order of the text. Attention is that of the pass that read the newest text (``ccm.methods.scores``),
which methods of one long prompt took from their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, cosine_similarity, normalize

from ..core.memory import KV, Memory, Row
from ..core.reader import Ids
from .base import Method, register, texts
from .scores import weights


@dataclass(frozen=True, kw_only=True)
class Evict(Method):
    """A fixed number of entries between sink and window.

    Attributes:
        tokens: entries that stay beside them.
    """

    made: ClassVar[str] = "chosen"
    sink: int = 4
    window: int = 64
    tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(tokens=0)

    def keep(self, row: Row, leaving: KV, queries: Tensor | None) -> KV:
        held = KV.cat((row.slots, leaving.to(torch.float32)))
        if held.length <= self.tokens:
            return held
        # of equal ones the newest; a token that comes twice differs by rounding
        mantissa, exponent = self.score(row, held, queries).frexp()
        worst_first = (mantissa * 2**12).round().ldexp(exponent).argsort(dim=2, stable=True)
        return held.take(worst_first[:, :, held.length - self.tokens :].sort(dim=2).values)

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        """(L, H, N) of N entries between the row's sink and its window: the larger, the better."""
        raise NotImplementedError

    def grown(self, slots: int, leaving: int, folds: int) -> int:
        return min(slots + leaving, self.tokens)

    @property
    def limit(self) -> int:
        return self.sink + self.tokens + self.window


@register("key-norm")
@dataclass(frozen=True, kw_only=True)
class KeyNorm(Evict):
    """Small keys are attended to (Devoto et al., EMNLP 2024, arXiv 2406.11430)."""

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        return -held.keys.norm(dim=-1)


@register("keydiff")
@dataclass(frozen=True, kw_only=True)
class KeyDiff(Evict):
    """Keys unlike the mean key stay (Park et al., 2025, arXiv 2504.15364), here compared off their places."""

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        mean = normalize(held.keys, dim=-1).mean(dim=2, keepdim=True)
        return -cosine_similarity(held.keys, mean, dim=-1)


@register("lagkv")
@dataclass(frozen=True, kw_only=True)
class LagKV(Evict):
    """Entries that vary most, measured by what comes next (Liang et al., 2025, arXiv 2504.04704).

    Entries are cut into parts of ``lag``. Channels of a part are scaled to the range that they have in the next part;
    the deviation over channels ranks the entries of a part, and equal ranks stay in all of them. The last part stays.
    """

    lag: ClassVar[int] = 16

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        rank = torch.full(held.keys.shape[:3], float(self.lag), device=held.keys.device)
        parts = KV.cat((held, row.window.to(torch.float32)))
        if (count := parts.length // self.lag) > 1:
            deviation = self._deviation(parts.keys, count) + self._deviation(parts.values, count)
            ranked = deviation.argsort(-1).argsort(-1).flatten(2)[:, :, : held.length]
            rank[:, :, : ranked.shape[2]] = ranked.float()
        return rank

    def _deviation(self, states: Tensor, count: int) -> Tensor:
        """(L, H, N, D) -> (L, H, count - 1, lag)."""
        parts = states[:, :, : count * self.lag].unflatten(2, (count, self.lag))
        low, high = parts[:, :, 1:].aminmax(dim=3, keepdim=True)
        return ((parts[:, :, :-1] - low) / (high - low).clamp_min(1e-6)).std(-1).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class Attended(Evict):
    """What attention says."""

    def seen(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        """Attention weights (L, H, G, w, N) that the newest queries give to the entries."""
        assert queries is not None  # the method asks for them
        keys = torch.cat([row.sink.keys.float(), held.keys, row.window.keys.float()], dim=2)
        before = row.sink.length
        found = weights(self.reader, queries, keys, memory=before + row.slots.length)
        return found[..., before : before + held.length]


@register("snapkv")
@dataclass(frozen=True, kw_only=True)
class SnapKV(Attended):
    """What the last 32 queries attend to, smoothed over neighbours (Li et al., NeurIPS 2024, arXiv 2404.14469)."""

    queries: ClassVar[int] = 32
    kernel: ClassVar[int] = 5

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        mean = self.seen(row, held, queries).mean(dim=(2, 3))
        return avg_pool1d(mean, self.kernel, stride=1, padding=self.kernel // 2)


@register("tova")
@dataclass(frozen=True, kw_only=True)
class TOVA(Attended):
    """What the last query attends to (Oren et al., EMNLP 2024, arXiv 2401.06104).

    A mean over all heads of a layer, asked once for every text rather than after every token.
    """

    queries: ClassVar[int] = 1

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        return self.seen(row, held, queries).mean(dim=(1, 2, 3)).unsqueeze(1).expand(held.keys.shape[:3])


@register("h2o")
@dataclass(frozen=True, kw_only=True)
class H2O(Attended):
    """Heavy hitters: the attention that entries have gathered (Zhang et al., NeurIPS 2023, arXiv 2306.14048).

    Gathered over the queries of the newest text alone, so that nothing but keys and values has to be kept.
    """

    queries: ClassVar[int] = -1

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        return self.seen(row, held, queries).sum(dim=(2, 3))


@register("kvzip")
@dataclass(frozen=True, kw_only=True)
class KVzip(Evict):
    """What is needed to repeat the text (Kim et al., NeurIPS 2025, arXiv 2505.23416).

    Leaving text is read once more behind a request to repeat it. An entry counts as much as the query that attends to
    it most. Simplified: only leaving text is repeated, so entries of older text count by what they do for that. The
    ids of the window are in the row's notes.
    """

    REQUEST: ClassVar[str] = "\n\nRepeat the previous context exactly.\n\n"

    def fold(self, memory: Memory, ids: Ids, mask: Tensor | None = None, *, answered: bool = False) -> Memory:
        said = [
            replace(row, notes=(*row.notes, *text))
            for row, text in zip(memory.rows, texts(ids, mask), strict=True)
        ]
        folded = super().fold(replace(memory, rows=tuple(said)), ids, mask, answered=answered)
        rows = [replace(row, notes=row.notes[len(row.notes) - row.window.length :]) for row in folded.rows]
        return replace(folded, rows=tuple(rows))

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        left = len(row.notes) - row.window.length
        request = self._request()
        whole = replace(row, slots=held)
        again = [[*request, *row.notes[left - (held.length - row.slots.length) : left]]]
        ((text, asked),) = self.reader.watch(again, Memory((whole,), self.fingerprint()))
        parts = (whole.sink.keys, held.keys, whole.window.keys, text.keys)
        before = whole.sink.length
        keys = torch.cat([part.float() for part in parts], dim=2)
        found = weights(self.reader, asked[:, :, len(request) :], keys, memory=before + held.length)
        return found[..., before : before + held.length].amax(dim=(2, 3))

    def _request(self) -> Sequence[int]:
        """Nothing without a tokenizer: then the text is read twice."""
        return self.tokenizer.encode(self.REQUEST, add_special_tokens=False) if self.tokenizer else ()

    @property
    def behind(self) -> int:
        return len(self._request()) + 2 * self.longest
