"""Memories made for one text, and polished slots: a story or facts are told, then each question is asked alone.

    python benchmarks/made.py               measure what results/made.json lacks, and say how they compare
    python benchmarks/made.py --limit 1     of the first rows of each source

Stories and facts are those of held_out.py, without the rows that options were chosen on. All memories have the bytes
of 4 slots a segment beside 4 sink tokens. What is trained or fitted gets the text at once, an adapter by segments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import held_out_rows
import torch
from common import RESULTS, parser
from held_out import SINK, Figures, Measure, Score, added, drawn, interval, opened, scored

from ccm.core.compressor import Compressor
from ccm.core.reader import Reader
from ccm.methods import Method, get_method
from ccm.methods.base import left_padded
from ccm.training.engines import Engine, make_engine
from ccm.training.targets import Row

#: Rows that options were chosen on.
SEEN = 4
SLOTS = 4
ADAPTER = "ccm-chat"
#: How many rows of each source, by method and its options.
ROWS: dict[str, int] = {
    "none": 8,
    "full": 8,
    "streaming-llm": 8,
    "ccm-concat": 8,
    "polished": 8,
    "attention-matching": 4,
    "cartridge": 1,
}
#: Sources, and whether a question and its answer are a segment each.
SOURCES = {"coqa": True, "facts": False}


def method_of(figure: str, entries: int, compressor: Compressor, tokenizer: Any) -> Method:
    """A method that holds so many entries once a text is told."""
    name, _, option = figure.partition(":")
    options: dict[str, Any] = {option.partition("=")[0]: float(option.partition("=")[2])} if option else {}
    if name in ("ccm-concat", "polished"):
        own = get_method(name, adapter=ADAPTER, sink=SINK, window=0, slots=SLOTS, **options)
        return own.bind(compressor, tokenizer)
    if name == "streaming-llm":
        options |= {"sink": SINK, "window": entries - SINK}
    elif name in ("attention-matching", "cartridge"):
        options |= {"sink": 1, "slots": entries - 1}
    return get_method(name, **options).bind(Reader(compressor.model), tokenizer)


def parts(row: Row, apart: bool) -> tuple[list[list[int]], list[tuple[list[int], list[int]]]]:
    """What is told, and each question with its answer and the roles of its tokens; the answer alone is scored.

    Args:
        row: of a source.
        apart: question and answer are a segment each.
    """
    pairs = list(zip(row.segments, row.roles, strict=True))
    told = [list(ids) for ids, roles in pairs if not any(roles)]
    asked = [(list(ids), list(roles)) for ids, roles in pairs if any(roles)]
    if apart:
        both = zip(asked[::2], asked[1::2], strict=True)
        asked = [(ids + more, [0] * len(ids) + roles) for (ids, _), (more, roles) in both]
    return told, asked


@torch.no_grad()
def answered(figure: str, row: Row, apart: bool, compressor: Compressor, tokenizer: Any) -> Score:
    told, asked = parts(row, apart)
    entries = SINK + SLOTS * len(told)
    method = method_of(figure, entries, compressor, tokenizer)
    memory = method.empty()
    for segment in told if method.whole else [list(chain(*told))]:
        memory = method.fold(memory, [segment])
    assert memory.length <= entries or figure == "full", "more bytes than the others"
    ids, mask = left_padded([ids for ids, _ in asked], compressor.model.device)
    logits = method.reader.logits(ids, replace(memory, rows=memory.rows * len(asked)), mask)
    score: Score = (0.0, 0)
    for own, text, shown, (_, roles) in zip(logits, ids, mask, asked, strict=True):
        score = added(score, scored(own[shown], text[shown], roles))
    return score


def compared(rows: dict[str, list[Row]], own: Figures) -> dict[str, Any]:
    """By source and method: nats a row, and by how many it is ahead of rivals, with a 95 % interval over rows."""
    found: dict[str, Any] = {}
    for number, name in enumerate(SOURCES):
        figures = own.of(rows[name])
        found[name] = {}
        for figure, nats in figures.items():
            values: dict[str, Any] = {"rows": len(nats), "nats": round(sum(nats) / len(nats), 2)}
            for rival in ("ccm-concat", "attention-matching", "streaming-llm"):
                if figure != rival and (sums := drawn(figures, number, figure, rival)) is not None:
                    count = min(len(nats), len(figures[rival]))
                    values[f"ahead of {rival}"] = interval((sums[1] - sums[0]) / count)
            found[name][figure] = values
    return found


def main() -> None:
    given = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(given.threads)
    rows = {name: list(part)[SEEN:] for name, part in held_out_rows.load(held_out_rows.FILE).items()}
    model, tokenizer = opened(None)
    compressor = Compressor.from_pretrained(model, ADAPTER)
    own = Figures.open(RESULTS / "made.json", compressor.fingerprint())
    engine = make_engine(compressor)
    for figure, most in ROWS.items():
        for count in range(1, 1 + min(given.limit or most, most)):
            for name, apart in SOURCES.items():

                def of(
                    _: Engine, part: Sequence[Row], figure: str = figure, apart: bool = apart
                ) -> list[Score]:
                    return [answered(figure, row, apart, compressor, tokenizer) for row in part]

                own.measure(engine, name, rows[name], figure, Measure(of), count)
    sys.stdout.write(json.dumps(compared(rows, own), indent=1) + "\n")


if __name__ == "__main__":
    main()
