"""Slots in fewer bits beside fewer slots in floats, at the same bytes: facts told, questions, conversation.

    python benchmarks/packed.py               measure what results/packed.json lacks, and say how they compare
    python benchmarks/packed.py --limit 4     of the first rows of each source

Rows are those of held_out.py, lived through segment by segment. Bytes are those of the slots between the turns; a
number of a plain slot counts as float16. As many coded slots are kept as fit into the bytes of the plain ones.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import held_out_rows
import torch
from common import RESULTS, parser
from held_out import Figures, Measure, Score, drawn, interval, opened, remembered

from ccm.core.compressor import Compressor
from ccm.files.fingerprint import model_fingerprint
from ccm.methods.bits.codes import get_code
from ccm.training.engines import Engine, make_engine
from ccm.training.targets import Row

#: How many rows of each source, at most.
ROWS = {"facts": 16, "coqa": 16, "chitchat": 16}
#: Plain slots, of which coded ones have the bytes; and of a segment, of an adapter.
SLOTS, LEARNED = 16, 1
ADAPTER = "ccm-concat"
SIZE = 64  # channels of a head of the embedded model
FLOAT = SIZE * torch.float16.itemsize


def as_many(code: str, slots: int) -> int:
    """Coded slots with the bytes of so many plain ones."""
    return slots * FLOAT // get_code(code).width(SIZE)


def memories() -> dict[str, tuple[str, dict[str, Any]]]:
    """Method and options by the name of a figure; of each "A, B" the rival is "A, plain"."""

    def fitted(slots: int) -> dict[str, int]:
        return {"slots": slots, "sink": 1, "window": 0}

    def learned(slots: int) -> dict[str, int]:
        return {"slots": slots, "sink": 4, "window": 0}

    def coded(of: str, code: str, options: dict[str, int]) -> tuple[str, dict[str, Any]]:
        return "packed", {"of": of, "code": code, "options": options}

    found: dict[str, tuple[str, dict[str, Any]]] = {"fitted, plain": ("attention-matching", fitted(SLOTS))}
    for code in ("int8", "int4"):
        found[f"fitted, {code}"] = coded("attention-matching", code, fitted(as_many(code, SLOTS)))
    found["learned, plain"] = ADAPTER, learned(LEARNED)
    found["learned, int4"] = coded(ADAPTER, "int4", learned(as_many("int4", LEARNED)))
    for code in ("int8", "int4"):  # what the rounding costs
        found[f"fitted, as many in {code}"] = coded("attention-matching", code, fitted(SLOTS))
    found["fitted, sparse"] = coded("attention-matching", "sparse", fitted(as_many("sparse", SLOTS)))
    return found


def compared(rows: dict[str, list[Row]], own: Figures, baselines: Figures) -> dict[str, Any]:
    """By source: nats a row, and how many fewer than the plain memory needs, with a 95 % interval over rows."""
    found: dict[str, Any] = {}
    for number, source in enumerate(ROWS):
        mine = own.of(rows[source])
        ends = {name: nats for name, nats in baselines.of(rows[source]).items() if name in ("none", "full")}
        count = min(map(len, mine.values()))
        found[source] = {"rows": count} | {
            name: round(sum(nats[:count]) / count, 2) for name, nats in ends.items()
        }
        for figure, nats in mine.items():
            values: dict[str, Any] = {"nats": round(sum(nats) / len(nats), 2)}
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
        def of(engine: Engine, part: Any) -> list[Score]:
            return remembered(engine, part, tokenizer, name, None, **options)

        return Measure(of)

    for count in range(1, 1 + (given.limit or max(ROWS.values()))):  # stored row by row, sources in turn
        for source, most in ROWS.items():
            for figure, (name, chosen) in memories().items():
                own.measure(engine, source, rows[source], figure, measure(name, chosen), min(count, most))
    baselines = Figures.open(RESULTS / "held_out_baselines.json")
    sys.stdout.write(json.dumps(compared(rows, own, baselines), indent=1) + "\n")


if __name__ == "__main__":
    main()
