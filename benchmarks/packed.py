"""Slots in fewer bits beside fewer slots in floats, at the same bytes: facts told, questions, conversation.

    python benchmarks/packed.py               measure what results/packed.json lacks, and say how they compare
    python benchmarks/packed.py --limit 4     of the first rows of each source

Rows are those of held_out.py, lived through segment by segment, some at a time. Bytes are those of the slots between
the turns; a number of a plain slot counts as float16. As many coded slots are kept as fit into the bytes of the plain
ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import held_out_rows
import torch
from common import RESULTS, parser
from held_out import Figures, Measure, Score, added, drawn, interval, opened, scored

from ccm.core.compressor import Compressor
from ccm.core.memory import Memory
from ccm.core.reader import Reader
from ccm.core.segments import left_padded
from ccm.files.fingerprint import model_fingerprint
from ccm.methods import Method, get_method
from ccm.methods.bits.codes import get_code
from ccm.training.engines import Engine, make_engine
from ccm.training.targets import Row

#: How many rows of each source, at most.
ROWS = {"facts": 12, "coqa": 12, "chitchat": 12}
#: Plain slots that are fitted, of which coded ones have the bytes; an adapter has one or two for each segment.
SLOTS = 16
ADAPTER = "ccm-concat"
#: Rows that are lived through at a time.
TOGETHER = 4
SIZE = 64  # channels of a head of the embedded model
FLOAT = SIZE * torch.float16.itemsize


def as_many(code: str, slots: int) -> int:
    """Coded slots with the bytes of so many plain ones."""
    return slots * FLOAT // get_code(code).width(SIZE)


def memories() -> list[dict[str, tuple[str, dict[str, Any]]]]:
    """Method and options by the name of a figure, first what matters most; of each "A, B" the rival is "A, plain"."""

    def fitted(slots: int) -> dict[str, int]:
        return {"slots": slots, "sink": 1, "window": 0}

    def learned(slots: int) -> dict[str, int]:
        return {"slots": slots, "sink": 4, "window": 0}

    def coded(of: str, code: str, options: dict[str, int]) -> tuple[str, dict[str, Any]]:
        return "packed", {"of": of, "code": code, "options": options}

    few = {
        "one learned, plain": (ADAPTER, learned(1)),
        "one learned, int4": coded(ADAPTER, "int4", learned(as_many("int4", 1))),
    }
    found: dict[str, tuple[str, dict[str, Any]]] = {"fitted, plain": ("attention-matching", fitted(SLOTS))}
    more = {
        "two learned, plain": (ADAPTER, learned(2)),
        "two learned, int8": coded(ADAPTER, "int8", learned(as_many("int8", 2))),
        "fitted, sparse": coded("attention-matching", "sparse", fitted(as_many("sparse", SLOTS))),
    }
    for code in ("int4", "int8"):
        found[f"fitted, {code}"] = coded("attention-matching", code, fitted(as_many(code, SLOTS)))
        more[f"fitted, as many in {code}"] = coded(
            "attention-matching", code, fitted(SLOTS)
        )  # what rounding costs
    return [few, found, more]


def lived(method: Method, rows: Sequence[Row]) -> list[Score]:
    """Nats and number of the scored tokens of rows, each segment behind the memory of all before it."""
    memories = [method.empty()] * len(rows)
    scores: list[Score] = [(0.0, 0)] * len(rows)
    for t in range(max(len(row.segments) for row in rows)):
        some = [r for r, row in enumerate(rows) if t < len(row.segments)]
        ids, mask = left_padded([rows[r].segments[t] for r in some], method.reader.model.device)
        memory = Memory.stack([memories[r] for r in some])
        if any(any(rows[r].roles[t]) for r in some):
            logits = method.reader.logits(ids, method.recall(memory), mask)
            for r, own in zip(some, logits, strict=True):
                said = torch.tensor(rows[r].segments[t])
                if any(rows[r].roles[t]):
                    scores[r] = added(scores[r], scored(own[-len(said) :], said, rows[r].roles[t]))
        memory = method.fold(memory, ids, mask)
        for k, r in enumerate(some):
            memories[r] = memory[k]
    return scores


def compared(rows: dict[str, list[Row]], own: Figures, baselines: Figures) -> dict[str, Any]:
    """By source: nats a row, and how many fewer than the plain memory needs, with a 95 % interval over rows."""
    found: dict[str, Any] = {}
    for number, source in enumerate(ROWS):
        mine = own.of(rows[source])
        ends = {name: nats for name, nats in baselines.of(rows[source]).items() if name in ("none", "full")}
        count = max(map(len, mine.values()))
        found[source] = {name: round(sum(nats[:count]) / count, 2) for name, nats in ends.items()}
        for figure, nats in mine.items():
            values: dict[str, Any] = {"rows": len(nats), "nats": round(sum(nats) / len(nats), 2)}
            plain = f"{figure.partition(',')[0]}, plain"
            if figure != plain and (sums := drawn(mine, number, figure, plain)) is not None:
                few = min(len(nats), len(mine[plain]))
                values["ahead"] = interval((sums[1] - sums[0]) / few)
            found[source][figure] = values
    return found


@torch.no_grad()
def main() -> None:
    options = parser(__doc__.splitlines()[0])
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    rows = held_out_rows.load(held_out_rows.FILE)
    model, tokenizer = opened(None)
    own = Figures.open(RESULTS / "packed.json", model_fingerprint(model))
    engine = make_engine(Compressor.from_pretrained(model, ADAPTER))

    def measure(name: str, options: dict[str, Any]) -> Measure:
        def of(engine: Engine, part: Sequence[Row]) -> list[Score]:
            return lived(get_method(name, **options).bind(Reader(model), tokenizer), part)

        return Measure(of)

    counts = range(TOGETHER, 1 + (given.limit or max(ROWS.values())), TOGETHER)
    for part, count, source in product(memories(), counts, ROWS):  # stored as it goes, sources in turn
        for figure, (name, chosen) in part.items():
            own.measure(engine, source, rows[source], figure, measure(name, chosen), min(count, ROWS[source]))
    baselines = Figures.open(RESULTS / "held_out_baselines.json")
    sys.stdout.write(json.dumps(compared(rows, own, baselines), indent=1) + "\n")


if __name__ == "__main__":
    main()
