"""Held-out conversations, turn by turn, through every method.

Each turn is scored by the base model reading what the method holds of the turns before, then taken in. The
targets are the turns from the fifth on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from ..data import chitchat
from ..data.rows import ConversationRow, held_out_rows
from ..errors import ConfigError
from ..files.fingerprint import base_name
from ..methods import Method, get_method
from ..methods.base import METHODS
from ..methods.compressed import Compressed
from ..methods.default import ADAPTER, UNTRAINED, default_memory, named
from ..methods.selection.streaming import StreamingLLM
from ..methods.spec import parse
from .protocol import State, run_item
from .share import Nll, bootstrap_share, gain, recovered_share
from .tasks.conversation import row_item

FIRST = 4  # index of the first target turn
#: Beside the ends of the yardstick and a window: what plays on the embedded model.
ADAPTERS = ("ccm-concat", "ccm-merge")


@dataclass(frozen=True)
class Player:
    """A method under a name; with ``same_bytes_as`` it gets as many KV bytes as that player holds, turn by turn."""

    name: str
    method: Method
    same_bytes_as: str | None = None


@dataclass
class Trace:
    """What was measured of one method: a record of :func:`run_item` for each conversation, the last one may grow."""

    records: list[Mapping[str, Any]] = field(default_factory=list)

    def targets(self, other: Trace | None = None) -> Nll:
        """NLL of the target turns, a row per conversation that has reached them; as far as another trace goes."""
        counts = [len(record["queries"]) for record in (other or self).records]
        scored = [r["queries"][FIRST:n] for r, n in zip(self.records, counts, strict=False) if n > FIRST]
        return Nll(
            tuple(sum(turn["nll"] for turn in row) for row in scored),
            tuple(sum(turn["tokens"] for turn in row) for row in scored),
        )

    def nll_at(self, turn: int) -> float:
        """Nats per scored token at a turn, over all conversations."""
        turns = [record["queries"][turn] for record in self.records]
        return float(sum(turn["nll"] for turn in turns) / sum(turn["tokens"] for turn in turns))

    def kv_bytes_at(self, turn: int) -> float:
        """Bytes held at a turn, the mean over conversations."""
        return float(sum(record["steps"][turn]["kv_bytes"] for record in self.records) / len(self.records))

    @property
    def seconds(self) -> float:
        """Of folding and of first tokens, in all."""
        steps = (step for record in self.records for step in record["steps"])
        return float(sum(step["fold_seconds"] + step["ttft_seconds"] for step in steps))


def choose_players(names: Sequence[str]) -> list[Player]:
    """Players by memories as they are written; "none" and "full" always play, the share needs them.

    "window" becomes one player for each other one, at its KV bytes: ``window`` for the first, and ``window-merge``
    for ``ccm-merge`` after it, ``window-am`` for ``attention-matching``.

    Raises:
        UnknownNameError: a name that is neither a method nor an adapter.
        ConfigError: an option that cannot be used.
    """
    players = [Player(name, get_method(name)) for name in ("none", "full")]
    for name in dict.fromkeys(names):
        if name in ("none", "full", "window"):
            continue
        spec = parse(name)
        short = Path(spec.name).name + name[len(spec.name) :]
        taken = any(player.name == short for player in players)
        players.append(Player(name if taken else short, spec.method()))
    if "window" in names:
        compressed = [player.name for player in players[2:] if not isinstance(player.method, StreamingLLM)]
        for index, name in enumerate(compressed):
            short = min(
                (other for other, m in METHODS.items() if m is METHODS.get(name)), key=len, default=name
            )
            row = f"window-{short.removeprefix('ccm-')}" if index else "window"
            players.append(Player(row, get_method("window"), same_bytes_as=name))
        if not compressed:
            players.append(Player("window", get_method("window")))
    return players


def play(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[ConversationRow],
    players: Sequence[Player],
    on_turn: Callable[[str, int, dict[str, Trace]], None] = lambda name, turn, traces: None,
) -> dict[str, Trace]:
    """Score every turn of every row under every player; a player comes after the one whose bytes it gets.

    Args:
        on_turn: called with (player, turn, traces so far) when a turn is played.
    """
    traces = {player.name: Trace() for player in players}
    for r, row in enumerate(rows):
        item = row_item(row, range(len(row.segments)))
        for name, method, other in ((p.name, p.method, p.same_bytes_as) for p in players):

            def on_step(state: State, name: str = name, place: int = r) -> None:
                traces[name].records[place:] = [state.measured]
                on_turn(name, state.step, traces)

            entries = traces[other].records[r]["entries"] if other else ()
            run_item(method.open(model, tokenizer), item, entries=entries, on_step=on_step)
    return traces


def demo(
    model: PreTrainedModel,
    tokenizer: Any,
    console: Console,
    conversations: int = 8,
    turns: int = 10,
    methods: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Play held-out test conversations with a live table on ``console``.

    Args:
        methods: as they are written; by default none, full, and beside windows of equal bytes the adapters of the
            embedded model, if it is that, and the best memory that needs no training.
        tell: hears when a conversation begins.

    Returns:
        ``{"task", "turns", "gain", "methods": {name: {"nll", "perplexity", "recovered_share", "kv_bytes",
        "seconds", ...}}, ...}``: NLL in nats per target token; ``gain`` what full context is worth, and its
        interval; the share is None where that holds 0: there is nothing to keep. ``kv_bytes`` is the mean over
        conversations of what is read at the last turn; ``seconds`` the total of taking in and scoring all turns.

    Raises:
        ConfigError: too few turns to have a target, or fewer conversations than asked for.
        UnknownNameError: an unknown method.
    """
    if turns <= FIRST:
        raise ConfigError(
            f"turns: got {turns}, expected at least {FIRST + 1}, because turn {FIRST + 1} is scored"
        )
    if conversations < 1:
        raise ConfigError(f"conversations: got {conversations}, expected at least 1")
    if not methods:
        trained = ADAPTERS if default_memory(model) == ADAPTER else ()
        methods = ("window", *trained, UNTRAINED)
    players = choose_players([named(parse(name), model).text for name in methods])
    rows = held_out_rows(chitchat.load_chitchat("test"), tokenizer, turns)
    if len(rows) < conversations:
        raise ConfigError(
            f"conversations: got {conversations}, but {len(rows)} held-out ones have {turns} turns; ask for fewer"
        )
    rows = rows[:conversations]
    for player in players:
        player.method.open(
            model, tokenizer
        )  # loads adapters, so that seconds and errors do not come mid-play
    view = _View(players, rows, tokenizer)

    def on_turn(name: str, turn: int, traces: dict[str, Trace]) -> None:
        if name == players[0].name and turn == 0:
            tell(f"conversation {len(traces[name].records)} of {len(rows)}, {len(players)} methods")
        view.on_turn(name, turn, traces)

    with Live(view, console=console, refresh_per_second=4, transient=True):
        traces = play(model, tokenizer, rows, players, on_turn)
    console.print(_table(players, traces, final=True))
    return {
        "task": "chitchat",
        "split": "test",
        "conversations": conversations,
        "turns": turns,
        "first_target_turn": FIRST + 1,
        "target_tokens": sum(traces["none"].targets().tokens),
        "gain": gain(traces["none"].targets(), traces["full"].targets()),
        "model": base_name(model),
        "methods": {player.name: _summary(player, traces, turns) for player in players},
    }


def _summary(player: Player, traces: dict[str, Trace], turns: int) -> dict[str, Any]:
    trace = traces[player.name]
    none, full, own = (t.targets() for t in (traces["none"], traces["full"], trace))
    kept = gain(none, full)[1] > 0
    result = {
        "nll": own.mean,
        "perplexity": math.exp(own.mean),
        "recovered_share": recovered_share(none.mean, full.mean, own.mean) if kept else None,
        "share_ci": bootstrap_share(none, full, own) if kept and len(own.total) > 1 else None,
        "kv_bytes": trace.kv_bytes_at(turns - 1),
        "seconds": trace.seconds,
        "nll_by_turn": [trace.nll_at(turn) for turn in range(turns)],
        "kv_bytes_by_turn": [trace.kv_bytes_at(turn) for turn in range(turns)],
    }
    return result | ({"same_bytes_as": player.same_bytes_as} if player.same_bytes_as else {})


class _View:
    """What is on the screen while conversations play."""

    def __init__(self, players: Sequence[Player], rows: Sequence[ConversationRow], tokenizer: Any):
        self.players, self.rows, self.tokenizer = players, rows, tokenizer
        self.progress = Progress(
            TextColumn("turns"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self.task = self.progress.add_task("", total=len(players) * sum(len(row.segments) for row in rows))
        self.traces: dict[str, Trace] = {}
        self.panel = Panel("")

    def on_turn(self, name: str, turn: int, traces: dict[str, Trace]) -> None:
        r = len(traces[name].records) - 1
        row = self.rows[r]
        ids, (start, stop) = row.segments[turn], row.content[turn]
        speaker, text = (
            self.tokenizer.decode(list(part), skip_special_tokens=True).strip()
            for part in (ids[:start], ids[start:stop])
        )
        where = f"conversation {r + 1} of {len(self.rows)} · {name} · turn {turn + 1} of {len(row.segments)}"
        line = Text.assemble(
            (f"{speaker} ", "bold cyan"), " ".join(text.split()), overflow="ellipsis", no_wrap=True
        )
        self.panel = Panel(line, title=where + (" · scored" if turn >= FIRST else ""), title_align="left")
        self.traces = traces
        self.progress.advance(self.task)

    def __rich__(self) -> Group:
        if not self.traces:
            return Group(self.progress)
        return Group(self.panel, _table(self.players, self.traces), self.progress)


def _table(players: Sequence[Player], traces: dict[str, Trace], final: bool = False) -> Table:
    windows = [(p.name, p.same_bytes_as) for p in players if p.same_bytes_as]
    notes = _items(traces) if final else []
    notes += [f"{name} = sink + recent tokens, same KV bytes as {other}" for name, other in windows]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        caption="\n".join(notes) or None,
        caption_justify="left",
    )
    table.add_column("method", overflow="fold")  # long names give way, figures do not
    interval = ("95 % CI",) if final else ()
    columns = ("NLL", "per-\nplexity", "recovered\nshare", *interval, "KV bytes", "times\nless", "sec.")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for player in players:
        trace, full = traces[player.name], traces["full"]
        if not trace.records:
            continue
        cells = ["", "", "", *("" for _ in interval)]
        none, whole, own = (t.targets(trace) for t in (traces["none"], full, trace))
        if len(own.total) == len(whole.total) > 0:
            kept = gain(none, whole)[1] > 0
            share = f"{recovered_share(none.mean, whole.mean, own.mean):.3f}" if kept else "nothing\nto keep"
            cells[:3] = f"{own.mean:.3f}", f"{math.exp(own.mean):.2f}", share
            # one conversation has no spread
            if final and kept and len(own.total) > 1 and player.name not in ("none", "full"):
                low, high = bootstrap_share(none, whole, own)
                cells[3] = f"{low:.2f}, {high:.2f}"
        held, most = (_bytes_now(t, trace, final) for t in (trace, full))
        table.add_row(
            player.name,
            *cells,
            decimal(round(held)) if held else "0",
            f"{most / held:.1f}×" if held and most else "",
            f"{trace.seconds:.1f}",
            style="bold" if isinstance(player.method, Compressed) else None,
        )
    return table


def _items(traces: dict[str, Trace]) -> list[str]:
    """On how much the figures stand, and what there is to keep."""
    none, full = traces["none"].targets(), traces["full"].targets()
    count, (worth, low, high) = len(none.total), gain(none, full)
    ends = f" ({low:+.2f} to {high:+.2f})" if count > 1 else ""
    return [
        f"n = {count} conversation{'s' if count > 1 else ''}, {sum(none.tokens):,} scored tokens",
        f"{'' if low > 0 else 'nothing to keep: '}full context gains {worth:.2f} nats a token over none{ends}",
    ]


def _bytes_now(trace: Trace, other: Trace, final: bool) -> float:
    """At the end the mean over conversations at their last turn, before that what is held where another trace is."""
    if final:
        return trace.kv_bytes_at(-1)
    place, turn = len(other.records) - 1, len(other.records[-1]["steps"]) - 1
    steps = trace.records[place]["steps"] if place < len(trace.records) else ()
    return float(steps[turn]["kv_bytes"]) if turn < len(steps) else 0.0
