"""Slots and words beside the adapter alone in the same bytes: facts told, questions about stories, conversation.

    python benchmarks/hybrid.py               measure what results/hybrid.json lacks, and say how they compare
    python benchmarks/hybrid.py --limit 4     of the first rows of each source

Rows are those of held_out.py, and so are the figures of the adapter (4 slots a segment) and of memories that need no
training. The hybrid has 2 slots and 2 words for each segment. Of a scored segment it knows what stands in front of
the first scored token. Slots of the rule "concat" stay as they are, so one pass over a row makes the memory in front
of every segment of it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import held_out_rows
import torch
from common import RESULTS, parser
from held_out import BUDGETS, SINK, Figures, Measure, Score, added, drawn, interval, opened, scored

from ccm.core.compressor import Compressor
from ccm.core.memory import Memory
from ccm.core.onward import Turn
from ccm.methods import get_method
from ccm.methods.hybrid.slots_and_words import SlotsAndWords
from ccm.training.engines import Engine, make_engine
from ccm.training.targets import Row

#: How many rows of each source.
ROWS = {"facts": 24, "coqa": 24, "chitchat": 24}
FIGURE = "2 slots and 2 words"
SIZES = {"slots": 2, "words": 2}
ADAPTER, BESIDE = "ccm-concat", "slots 4"
#: Segments that are taken in with one pass.
TOGETHER = 8


def lived(method: SlotsAndWords, row: Row) -> Score:
    """Nats and number of the scored tokens of a row, each segment behind the memory of all before it."""
    compressor, segments, memory = method.reader, row.segments[:-1], method.reader.empty()
    for k in range(0, len(segments), TOGETHER):
        part = segments[k : k + TOGETHER]
        memory = compressor.take_in(
            memory, [Turn(part, [0] * len(part))], slots=method.slots, sink=method.sink
        )
    (whole,) = memory.rows
    score = (0.0, 0)
    for t, (ids, roles) in enumerate(zip(row.segments, row.roles, strict=True)):
        if not any(roles):
            continue
        first = next(k for k, role in enumerate(roles) if role)
        notes = [2 * token + (i == 0) for segment in row.segments[:t] for i, token in enumerate(segment)]
        slots = whole.slots.slice(0, t * (method.slots or 0))
        read = method.reading(replace(whole, slots=slots, steps=t, notes=(0, *notes)), ids[:first])
        assert read.length <= SINK + t * BUDGETS[BESIDE]["slots"], "more bytes than the adapter alone"
        logits = compressor.logits([ids], Memory((read,), compressor.fingerprint()))[0]
        score = added(score, scored(logits, torch.tensor(ids), roles))
    return score


def compared(rows: dict[str, list[Row]], own: Figures, stores: list[Figures]) -> dict[str, Any]:
    """By source: nats a row, and how many fewer than each rival needs, with a 95 % interval over rows."""
    found = {}
    for number, name in enumerate(ROWS):
        figures = {k: v for store in [*stores, own] for k, v in store.of(rows[name]).items()}
        values: dict[str, Any] = {}
        for rival in ("none", "full", BESIDE, "attention-matching"):
            if (sums := drawn(figures, number, FIGURE, rival)) is None:
                continue
            count = min(len(figures[FIGURE]), len(figures[rival]))
            mine, other = sums / count
            ahead = interval(other - mine)
            values[rival] = {"rows": count, "nats": round(float(other[0]), 2), "ahead": ahead}
        found[name] = {
            "rows": len(figures[FIGURE]),
            "nats": round(sum(figures[FIGURE]) / len(figures[FIGURE]), 2),
        } | {"beside": values}
    return found


@torch.no_grad()
def main() -> None:
    options = parser(__doc__.splitlines()[0])
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    rows = held_out_rows.load(held_out_rows.FILE)
    model, tokenizer = opened(None)
    compressor = Compressor.from_pretrained(model, ADAPTER)
    method = get_method("slots-and-words", sink=SINK, window=0, **SIZES).bind(compressor, tokenizer)
    own = Figures.open(RESULTS / "hybrid.json", compressor.fingerprint())
    engine = make_engine(compressor)

    def of(_: Engine, part: Any) -> list[Score]:
        return [lived(method, row) for row in part]

    for count in range(1, 1 + (given.limit or max(ROWS.values()))):  # stored row by row, sources in turn
        for name, most in ROWS.items():
            own.measure(engine, name, rows[name], FIGURE, Measure(of), min(count, most))
    stores = [Figures.open(RESULTS / f"held_out_{name}.json") for name in ("baselines", "ccm-chat")]
    sys.stdout.write(json.dumps(compared(rows, own, stores), indent=1) + "\n")


if __name__ == "__main__":
    main()
