"""Adapters and their rivals on the same held-out rows, in nats per scored token.

    python benchmarks/held_out.py rows                       make the rows (held_out_rows.py says which)
    python benchmarks/held_out.py baselines                  none, full, windows, memories that need no training
    python benchmarks/held_out.py adapter ccm-chat           an adapter at every budget
    python benchmarks/held_out.py table held_out_ccm-chat    how they compare

Every figure is stored row by row in ``results/``, as soon as it is there, under a hash of the rows; what is there is
not measured again.

    share = the recovered share                               of what the whole context tells
    told  = (foreign - own) / (full foreign - full)           of what only this context tells, in the last segment

Windows have the bytes that slots beside 4 sink tokens have at that moment, row by row. So have memories that need no
training if they are "growing"; else they have from the first segment on what those slots have at last. What is called
"a fifth" has from the first segment on a fifth of the bytes of all text in front of the last one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import held_out_rows
import numpy as np
import torch
from common import RESULTS, environment, parser
from held_out_rows import Rows, key_of

import ccm
from ccm.core import attention
from ccm.core.compressor import Compressor
from ccm.core.reader import Reader
from ccm.core.rule import get_rule
from ccm.core.segments import lay_out
from ccm.errors import DataError
from ccm.evaluation.share import recovered_share
from ccm.files.atomic import write_atomically
from ccm.files.fingerprint import base_name, model_fingerprint
from ccm.methods import Method, get_method
from ccm.methods.bits.codes import HALF, get_code
from ccm.training.engines import Engine, make_engine
from ccm.training.packed import ArrayRow
from ccm.training.targets import NONE, Row, only_last

SINK = 4
#: Summed nats and number of scored tokens of a row.
Score = tuple[float, int]
#: Tokens of a pass, on a processor and on an accelerator.
PASS, PASS_THERE = 1024, 32_768
#: Tokens of a pass through the head.
HEAD = 2048
#: Rows from one to the one whose memory is foreign to it.
AWAY = 7
DRAWS = 2000

#: Sizes of a memory by the name of its figure. The first is the one that rivals are compared with.
BUDGETS: dict[str, dict[str, Any]] = {
    "slots 4": {"slots": 4, "sink": SINK},
    "slots 2": {"slots": 2, "sink": SINK},
    "slots 1": {"slots": 1, "sink": SINK},
    "slots 4, window 64": {"slots": 4, "sink": SINK, "window": 64},
}
RULES = ("concat", "mean", "bounded")
#: How many times fewer bytes than all text in front of the last segment "a fifth" is.
FIFTH = 5
#: Of memories in fewer bits.
CODE = "int4"


# ---------------------------------------------------------------------- nats


@torch.no_grad()
def nats(engine: Engine, rows: Sequence[Row], rule: str | None = None, **sizes: int) -> list[Score]:
    """Summed nats and number of the scored tokens of each row, every earlier segment of it in the memory.

    Rows of one segment are the base model's. This is where all passes but those of the rivals go through.
    """
    scores: list[Score] = [(0.0, 0)] * len(rows)
    how = None if rule is None else get_rule(rule)
    for part in batches(rows, PASS if engine.compressor.model.device.type == "cpu" else PASS_THERE):
        found = engine.run(engine.prepare([as_arrays(rows[r]) for r in part], how, **sizes))
        each = [
            torch.nn.functional.cross_entropy(
                engine.compressor.head(hidden).float(), ids.long(), reduction="none"
            ).cpu()
            for hidden, ids in zip(found.student.split(HEAD), found.ids.split(HEAD), strict=True)
        ]
        counts = [sum(map(bool, sum(rows[r].roles, ()))) for r in part]
        for r, count, own in zip(part, counts, torch.cat(each).split(counts), strict=True):
            scores[r] = float(own.double().sum()), count
    return scores


def as_arrays(row: Row) -> ArrayRow:
    ids, roles = (sum(parts, ()) for parts in (row.segments, row.roles))
    stops = list(accumulate(map(len, row.segments)))
    return ArrayRow(np.array(ids, np.int32), np.array(roles, np.uint8), np.array(stops, np.int32))


def batches(rows: Sequence[Row], most: int) -> Iterator[list[int]]:
    """Rows of like length together, so many tokens with the padding, or one row."""
    part: list[int] = []
    for r in sorted(range(len(rows)), key=lambda r: -rows[r].tokens):
        if part and (len(part) + 1) * rows[part[0]].tokens > most:
            yield part
            part = []
        part.append(r)
    if part:
        yield part


def without_context(engine: Engine, rows: Sequence[Row]) -> list[Score]:
    """Each scored segment by itself, behind the BOS token that its row begins with."""
    places = [(r, i) for r, row in enumerate(rows) for i, roles in enumerate(row.roles) if any(roles)]
    alone = [rows[r].part(i, i + 1) for r, i in places]
    bos = engine.compressor.model.config.bos_token_id
    for at, (r, _) in enumerate(places):
        if rows[r].segments[0][0] == bos != alone[at].segments[0][0]:
            (ids,), (roles,) = alone[at].segments, alone[at].roles
            alone[at] = Row(((bos, *ids),), ((NONE, *roles),))
    scores: list[Score] = [(0.0, 0)] * len(rows)
    for (r, _), score in zip(places, nats(engine, alone), strict=True):
        scores[r] = added(scores[r], score)
    return scores


def full(engine: Engine, rows: Sequence[Row]) -> list[Score]:
    return nats(engine, [row.flat() for row in rows])


def foreign(rows: Sequence[Row]) -> list[Row]:
    """The last segment of every row behind the earlier ones of another row; it alone is scored."""
    away = AWAY % len(rows)
    others = [*rows[away:], *rows[:away]]
    return [
        only_last(other.part(0, -1).unscored() + row.part(-1))
        for row, other in zip(rows, others, strict=True)
    ]


def last(rows: Sequence[Row]) -> list[Row]:
    """The rows with their last segments scored alone."""
    return [row.part(0, -1).unscored() + row.part(-1) for row in rows]


@torch.no_grad()
def window(engine: Engine, rows: Sequence[Row], times: int = 0, **sizes: int) -> list[Score]:
    """The first tokens and the last ones, as many as a memory of these sizes has entries, segment by segment.

    With ``times`` they are a fixed number (:func:`room`). Tokens stay at their places, and what is known of them is
    what was read within the window of their time.
    """
    model = engine.compressor.model
    scores = []
    for row in rows:
        ids = torch.tensor([sum(row.segments, ())], device=model.device)
        entries = [room(row, times)] * len(row.segments) if times else entries_before(row, **sizes)
        seen = in_window(row, entries).to(model.device)
        mask = attention.additive(seen[None, None], model.dtype)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        scores.append(scored(logits, ids[0], sum(row.roles, ())))
    return scores


@torch.no_grad()
def remembered(
    engine: Engine,
    rows: Sequence[Row],
    tokenizer: Any,
    name: str,
    option: str | None,
    growing: bool = False,
    times: int = 0,
    **options: int,
) -> list[Score]:
    """Rows lived through segment by segment under a method without training.

    Its option makes it as large as :func:`room` says, or as the slots at that moment; with None it has its own size.
    """
    method = get_method(name, **options).bind(Reader(engine.compressor.model), tokenizer)
    beside = method.sink + method.window
    scores = []
    for row in rows:
        entries, most = entries_before(row, **BUDGETS["slots 4"]), room(row, times)
        limits = [*entries[1:], most] if growing else [most] * len(entries)
        scores.append(
            lived(row, [method.resized(**{option: limit - beside}) if option else method for limit in limits])
        )
    return scores


@torch.no_grad()
def packed(engine: Engine, rows: Sequence[Row], tokenizer: Any, times: int = 0) -> list[Score]:
    """Attention Matching in ``int4``, in the bytes of :func:`room` between the segments."""
    method = get_method("packed", code=CODE).bind(Reader(engine.compressor.model), tokenizer)
    return [lived(row, [method.resized(**method.sized(room(row, times)))]) for row in rows]


@torch.no_grad()
def matched(
    engine: Engine, rows: Sequence[Row], tokenizer: Any, code: str | None = None, times: int = 0
) -> list[Score]:
    """A slot a segment and fitted entries: at the end of a row both together have the bytes of :func:`room`."""
    channels = engine.compressor.kv_shape()[2]
    scores = []
    for row in rows:
        most = room(row, times) - SINK
        if code:
            most = most * channels * HALF // get_code(code).width(channels)
        sizes = {"slots": 1, "sink": SINK, "window": 0, "fitted": most - len(row.segments) + 1}
        name = "slots-and-matching"
        method = (
            get_method("packed", of=name, code=code, options=sizes) if code else get_method(name, **sizes)
        )
        scores.append(lived(row, [method.bind(engine.compressor, tokenizer)]))
    return scores


def lived(row: Row, methods: Sequence[Method]) -> Score:
    """A row segment by segment, each under its own size of a method; the last one goes on to the end."""
    score, memory = (0.0, 0), methods[0].empty()
    for t, (ids, roles) in enumerate(zip(row.segments, row.roles, strict=True)):
        method = methods[min(t, len(methods) - 1)]
        if any(roles):
            logits = method.reader.logits([ids], method.recall(memory, [ids]))[0]
            score = added(score, scored(logits, torch.tensor(ids, device=logits.device), roles))
        if t + 1 < len(row.segments):
            memory = method.fold(memory, [ids])
    return score


def scored(logits: torch.Tensor, ids: torch.Tensor, roles: Sequence[int]) -> Score:
    """Of the scored tokens of one text (T,) with logits (T, V)."""
    at = torch.tensor([t for t, role in enumerate(roles) if role], device=ids.device)
    loss = torch.nn.functional.cross_entropy(logits[at - 1].float(), ids[at], reduction="sum")
    return float(loss), len(at)


def added(first: Score, second: Score) -> Score:
    return first[0] + second[0], first[1] + second[1]


def entries_before(row: Row, **sizes: int) -> list[int]:
    """Entries that each segment finds in a memory: the canonical position of its first token."""
    layout = lay_out([row.segments], rule=get_rule("concat"), **sizes)
    return [int(layout.position[0, start]) for start, _ in layout.spans[0]]


def room(row: Row, times: int = 0) -> int:
    """Entries in front of the last segment: those of the first budget, or so many times fewer than tokens."""
    if times:
        return sum(map(len, row.segments[:-1])) // times
    return entries_before(row, **BUDGETS["slots 4"])[-1]


def in_window(row: Row, entries: Sequence[int]) -> torch.Tensor:
    """(T, T) what each token of a row sees if each segment finds so many entries."""
    order = torch.arange(row.tokens)
    visible = torch.zeros(row.tokens, row.tokens, dtype=torch.bool)
    start = 0
    for ids, count in zip(row.segments, entries, strict=True):
        stop = start + len(ids)
        recent = order >= start - max(0, count - SINK)
        visible[start:stop] = (order < min(SINK, count)) | recent
        start = stop
    return visible & (order <= order.unsqueeze(1))


# ---------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Measure:
    """One figure: how rows are changed, and what is measured of some of the changed rows."""

    of: Callable[[Engine, Sequence[Row]], list[Score]]
    change: Callable[[Sequence[Row]], list[Row]] = list


def beside(budget: str) -> Measure:
    return Measure(lambda engine, rows: window(engine, rows, **BUDGETS[budget]))


#: Methods that keep some entries as they are, and how many of these are the newest.
EVICTION = ("snapkv", "tova", "h2o", "key-norm", "keydiff", "lagkv", "kvzip")
NEWEST = 8


def baselines(tokenizer: Any = None) -> dict[str, Measure]:
    """What is measured without an adapter, in this order."""

    def kept(name: str, option: str | None, **options: Any) -> Measure:
        return Measure(lambda engine, rows: remembered(engine, rows, tokenizer, name, option, **options))

    def coded(**options: int) -> Measure:
        return Measure(lambda engine, rows: packed(engine, rows, tokenizer, **options))

    return {
        "none": Measure(without_context),
        "full": Measure(full),
        "window as slots 4": beside("slots 4"),
        "attention-matching": kept("attention-matching", "slots"),
        "attention-matching, growing": kept("attention-matching", "slots", growing=True),
        "attention-matching, its own size": kept("attention-matching", None),
        "attention-matching, int4": coded(),
        "window, a fifth": Measure(lambda engine, rows: window(engine, rows, FIFTH)),
        "attention-matching, a fifth": kept("attention-matching", "slots", times=FIFTH),
        "attention-matching, a fifth, int4": coded(times=FIFTH),
        **{name: kept(name, "tokens", window=NEWEST) for name in EVICTION},
        "streaming-llm": kept("streaming-llm", "window", window=0),
        "last, full": Measure(full, last),
        "last, full foreign": Measure(full, foreign),
        "window as slots 2": beside("slots 2"),
        "window as slots 1": beside("slots 1"),
        "window as slots 4, window 64": beside("slots 4, window 64"),
    }


#: What shares are taken of.
REFERENCES = ("none", "full", "last, full", "last, full foreign")
#: What a budget is compared with, row by row.
RIVALS = {
    "slots 4": ("attention-matching, growing", "window as slots 4"),
    "slots 2": ("window as slots 2",),
    "slots 1": ("window as slots 1",),
    "slots 4, window 64": ("window as slots 4, window 64",),
    "slots-and-matching": ("attention-matching", "slots 4"),
    "slots-and-matching, int4": ("attention-matching, int4",),
    "slots-and-matching, a fifth": ("attention-matching, a fifth", "window, a fifth"),
    "slots-and-matching, a fifth, int4": ("attention-matching, a fifth, int4", "attention-matching, a fifth"),
}


def budgets(rules: Sequence[str] = (), sizes: Sequence[str] = tuple(BUDGETS)) -> dict[str, Measure]:
    """What is measured of an adapter: its own rule at all sizes, and other rules at the first."""

    def at(rule: str | None, chosen: dict[str, Any]) -> Callable[[Engine, Sequence[Row]], list[Score]]:
        return lambda engine, rows: nats(engine, rows, rule, **chosen)

    first = at(None, BUDGETS[sizes[0]])
    return {
        **{name: Measure(at(None, BUDGETS[name])) for name in sizes},
        "last, own": Measure(first, last),
        "last, foreign": Measure(first, foreign),
        **{f"{sizes[0]}, {rule}": Measure(at(rule, BUDGETS[sizes[0]])) for rule in rules},
    }


def fitted(tokenizer: Any = None) -> dict[str, Measure]:
    """What is measured of an adapter with fitted entries beside its slots, segment by segment."""

    def of(**options: Any) -> Measure:
        return Measure(lambda engine, rows: matched(engine, rows, tokenizer, **options))

    return {
        "slots-and-matching": of(),
        "slots-and-matching, int4": of(code=CODE),
        "slots-and-matching, a fifth": of(times=FIFTH),
        "slots-and-matching, a fifth, int4": of(code=CODE, times=FIFTH),
    }


@dataclass
class Figures:
    """Nats of every row by the hash of the rows and the name of what was measured, in a file that grows.

    Attributes:
        path: of the file.
        measured: fingerprint of what was measured.
        sources: hash -> source, and figure -> nats of each of the first rows that were measured.
    """

    path: Path
    measured: str
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, measured: str | None = None) -> Figures:
        """What a file holds; nothing, if that was measured of something else."""
        stored = json.loads(path.read_text()) if path.exists() else {"measured": "", "sources": {}}
        if measured not in (None, stored["measured"]):
            return cls(path, measured)
        return cls(path, stored["measured"], stored["sources"])

    def of(self, rows: Sequence[Row]) -> dict[str, list[float]]:
        """Figures of some rows; none if they were never measured."""
        return self.sources.get(key_of(rows), {}).get("nats", {})

    def measure(
        self,
        engine: Engine,
        name: str,
        rows: Sequence[Row],
        figure: str,
        measure: Measure,
        limit: int | None = None,
    ) -> None:
        """Measure and store what is not there yet of the first rows."""
        known = self.of(rows).get(figure, [])
        part = measure.change(rows)[len(known) : limit]
        if part:
            own = self.sources.setdefault(key_of(rows), {"source": name, "nats": {}})
            own["nats"][figure] = [*known, *(round(total, 3) for total, _ in measure.of(engine, part))]
            content = {"measured": self.measured, "sources": self.sources, "environment": environment()}
            write_atomically(self.path, (json.dumps(content) + "\n").encode())


# ---------------------------------------------------------------------- comparing


def drawn(found: dict[str, list[float]], seed: int, *figures: str) -> torch.Tensor | None:
    """Sums of figures over the rows of which all are known: of all, then of rows drawn at random."""
    if not set(figures) <= found.keys():
        return None
    size = min(len(found[figure]) for figure in figures)
    nats = torch.tensor([found[figure][:size] for figure in figures], dtype=torch.float64)
    picks = torch.randint(size, (DRAWS, size), generator=torch.Generator().manual_seed(seed))
    picks = torch.cat([torch.arange(size).unsqueeze(0), picks])
    return nats[:, picks].sum(-1)


def compare(rows: Rows, stores: Sequence[Figures], figure: str, rivals: Sequence[str] = ()) -> dict[str, Any]:
    """A figure's share of each source with its 95 % interval over rows, and by how much it is ahead of others.

    The mean and its interval are over sources, each with rows drawn anew.
    """
    sources: dict[str, Any] = {}
    draws: dict[str, list[torch.Tensor]] = {}
    for number, (name, part) in enumerate(rows.items()):
        found = {k: v for store in stores for k, v in store.of(part).items()}
        values = {}
        if (sums := drawn(found, number, "none", "full", figure)) is not None:
            values["share"] = recovered_share(*sums)
        for rival in rivals:
            if (sums := drawn(found, number, "none", "full", figure, rival)) is not None:
                none, full, own, other = sums
                ahead = recovered_share(none, full, own) - recovered_share(none, full, other)
                values[f"ahead of {rival}"] = ahead
        told = ("last, foreign", "last, own", "last, full foreign", "last, full")
        if (sums := drawn(found, number, *told)) is not None:
            foreign, own, full_foreign, full = sums
            values["told"] = (foreign - own) / (full_foreign - full)
        if "share" in values:
            sources[name] = {key: interval(value) for key, value in values.items()}
            for key, value in values.items():
                draws.setdefault(key, []).append(value)
    if not sources:
        raise DataError(
            f"{figure!r} and its references were measured on none of these rows; measure them first"
        )
    worst = min(sources, key=lambda name: sources[name]["share"][0])
    mean = {key: interval(torch.stack(values).mean(0)) for key, values in draws.items()}
    return {"mean": mean, "worst": [worst, sources[worst]["share"][0]], "sources": sources}


def interval(values: torch.Tensor) -> list[float]:
    """The value of all rows, and the 95 % interval of the draws."""
    spread = values[1:].sort().values
    return [round(float(v), 3) for v in (values[0], spread[int(0.025 * DRAWS)], spread[int(0.975 * DRAWS)])]


def size_of(rows: Sequence[Row], **sizes: int) -> tuple[float, float]:
    """Entries of the memory before a scored segment, on average, and how many times more tokens of text there are."""
    entries, tokens = 0, 0
    places = [(row, i) for row in rows for i, roles in enumerate(row.roles) if any(roles)]
    for row, i in places:
        entries += entries_before(row, **sizes)[i]
        tokens += sum(map(len, row.segments[:i]))
    return entries / len(places), tokens / entries


def table(rows: Rows, stores: Sequence[Figures], figures: Sequence[str]) -> str:
    """Markdown: shares, a line a source and a column a figure; how far memories are ahead of rivals; sizes."""
    found: dict[str, Any] = {}
    for figure in figures:
        with suppress(DataError):
            found[figure] = compare(rows, stores, figure, RIVALS.get(figure, ()))
    parts = [(found, [(figure, "share") for figure in found])]
    own = {figure: result for figure, result in found.items() if figure in RIVALS}
    ahead = [(figure, f"ahead of {rival}") for figure in own for rival in RIVALS[figure]]
    parts.append((own, [*ahead, *((figure, "told") for figure in list(own)[:1])]))
    lines = []
    for results, columns in parts:
        columns = [c for c in columns if c[1] in results[c[0]]["mean"]]
        if not columns:
            continue
        lines += ["", _line(["", *(f if key == "share" else f"{f}: {key}" for f, key in columns)])]
        lines.append(_line(["---", *["---:"] * len(columns)]))
        for name in rows:
            lines.append(_line([name, *(_cell(results[f]["sources"].get(name), key) for f, key in columns)]))
        lines.append(_line(["**mean**", *(_cell(results[f]["mean"], key) for f, key in columns)]))
        if results is found:
            lines.append(_line(["**worst**", *(f"{found[f]['worst'][1]:.3f}" for f, _ in columns)]))
    lines += ["", _line(["entries, times less", *BUDGETS]), _line(["---", *["---:"] * len(BUDGETS)])]
    for name, part in rows.items():
        sizes = [size_of(part, **{"window": 0, **budget}) for budget in BUDGETS.values()]
        lines.append(_line([name, *(f"{entries:.0f}, {times:.1f}" for entries, times in sizes)]))
    return "\n".join(lines[1:])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(values: dict[str, list[float]] | None, key: str) -> str:
    if values is None or key not in values:
        return ""
    value, low, high = values[key]
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"


# ---------------------------------------------------------------------- commands


def opened(model: str | None, device: str = "cpu") -> tuple[Any, Any]:
    """A model in fp32 and its tokenizer; the embedded one by default."""
    if model is None:
        base, tokenizer = ccm.load_default_model()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
    return base.to(device).eval(), tokenizer


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("what", choices=("rows", "baselines", "adapter", "table"))
    options.add_argument("names", nargs="*", help="adapters, or stored results")
    options.add_argument("--rows", type=Path, default=held_out_rows.FILE)
    options.add_argument("--out", type=Path, default=held_out_rows.FILE)
    options.add_argument("--model", help="a folder; the embedded model if it is not given")
    options.add_argument("--figures", nargs="+", help="some of what can be measured")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "rows":
        model, tokenizer = opened(given.model)
        held_out_rows.save(held_out_rows.build(tokenizer), given.out, base_name(model))
        return
    rows = held_out_rows.load(given.rows)
    if given.what == "table":
        stores = [
            Figures.open(RESULTS / "held_out_baselines.json"),
            *(Figures.open(RESULTS / f"{name}.json") for name in given.names),
        ]
        shown = [name for name in baselines() if name not in REFERENCES]
        shown += [name for name in {**budgets(RULES), **fitted()} if not name.startswith("last")]
        sys.stdout.write(table(rows, stores, given.figures or shown) + "\n")
        return
    for name in given.names or (None,):
        model, tokenizer = opened(given.model)
        if name is None:
            compressor, wanted = Compressor(model), baselines(tokenizer)
            file = f"held_out_{Path(given.model).name if given.model else 'baselines'}.json"
            store = Figures.open(RESULTS / file, model_fingerprint(model))
        else:
            compressor, wanted = (
                Compressor.from_pretrained(model, name),
                {**budgets(RULES), **fitted(tokenizer)},
            )
            store = Figures.open(RESULTS / f"held_out_{Path(name).name}.json", compressor.fingerprint())
        for figure in given.figures or wanted:
            for source, part in rows.items():
                store.measure(make_engine(compressor), source, part, figure, wanted[figure], given.limit)


if __name__ == "__main__":
    main()
