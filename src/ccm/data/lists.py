"""Lists, tables, records and results of tools, made up, and questions about them in a conversation.

    user        Here is my shopping list: …          (a list, as bullets, a table, CSV, JSON, …)
    assistant   Got it.
    …
    user        How much is the kettle?
    assistant   It is 24.90.                         (known from the list alone)

Or a tool is called, and its result asked about later. Whole subjects are held out.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UnknownNameError
from . import pools
from .conversation import Split, check_split
from .formats import Said, draw_style, read_formats, write
from .rows import ConversationRow, row
from .sources import HeldOut, Source, numbers, register_source, share

Maker = Callable[[random.Random], str]
Entry = dict[str, str]


@dataclass(frozen=True)
class Subject:
    """What lists are about.

    Attributes:
        name: of the subject.
        key: the field that names an entry, and what makes one up.
        fields: the others.
        titles: what the owner calls the list.
        tool: name of a tool that looks it up.
    """

    name: str
    key: tuple[str, Maker]
    fields: Mapping[str, Maker]
    titles: tuple[str, ...]
    tool: str


def _of(values: Sequence[str]) -> Maker:
    return lambda rng: rng.choice(values)


def _count(low: int, high: int, unit: str = "") -> Maker:
    return lambda rng: f"{rng.randrange(low, high)}{unit}"


_STATES = _of(["open", "done", "waiting", "cancelled", "in progress", "blocked"])
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "shopping",
            ("item", _of(pools.GROCERIES)),
            {
                "amount": _count(1, 13),
                "price": pools.price,
                "shop": lambda rng: f"{pools.rare(rng)} {rng.choice(('Market', 'Foods', 'Corner'))}",
            },
            ("my shopping list", "what we need for the weekend", "the groceries"),
            "get_shopping_list",
        ),
        Subject(
            "tasks",
            ("task", _of(pools.CHORES)),
            {"due": pools.date, "who": pools.first_name, "status": _STATES, "minutes": _count(5, 180)},
            ("my to-do list", "the tasks of this week", "what has to be done"),
            "list_tasks",
        ),
        Subject(
            "contacts",
            ("name", pools.full_name),
            {
                "phone": lambda rng: f"{pools.digits(rng, (3,))}-{pools.digits(rng, (4,))}",
                "email": pools.email,
                "town": pools.town,
                "job": _of(pools.JOBS),
            },
            ("the people on the team", "my contacts", "everybody who has signed up"),
            "find_contacts",
        ),
        Subject(
            "stock",
            ("product", _of(pools.THINGS)),
            {
                "sku": pools.code,
                "price": pools.price,
                "in stock": _count(0, 300),
                "colour": _of(pools.COLOURS),
            },
            ("what we have in stock", "the inventory", "the price list"),
            "search_products",
        ),
        Subject(
            "orders",
            ("order", lambda rng: pools.digits(rng, (5, 6))),
            {
                "customer": pools.full_name,
                "total": pools.price,
                "status": _of(["paid", "shipped", "returned", "pending", "lost", "delivered"]),
                "placed": pools.iso_date,
            },
            ("the orders of today", "the open orders", "my last orders"),
            "get_orders",
        ),
        Subject(
            "calendar",
            (
                "event",
                lambda rng: (
                    f"{rng.choice(('call', 'lunch', 'meeting', 'coffee', 'review'))} with "
                    f"{pools.first_name(rng)}"
                ),
            ),
            {"day": _of(pools.DAYS), "time": pools.clock, "place": pools.town, "minutes": _count(10, 120)},
            ("my calendar", "the appointments of next week", "my week"),
            "read_calendar",
        ),
        Subject(
            "servers",
            ("host", lambda rng: f"{pools.rare(rng).lower()}-{rng.randrange(1, 30):02}"),
            {
                "ip": lambda rng: ".".join(str(rng.randrange(1, 255)) for _ in range(4)),
                "load": _count(0, 100),
                "status": _of(["up", "down", "degraded", "rebooting", "unreachable"]),
                "uptime": _count(1, 900, " days"),
            },
            ("the machines", "the state of our servers", "the monitoring report"),
            "check_servers",
        ),
        Subject(
            "weather",
            ("town", pools.town),
            {
                "temperature": _count(-15, 40, " °C"),
                "wind": _count(0, 90, " km/h"),
                "sky": _of(
                    ["clear", "overcast", "light rain", "snow", "fog", "thunderstorm", "hail", "sunny spells"]
                ),
            },
            ("the forecast", "the weather at our offices", "what the weather will be like"),
            "get_weather",
        ),
        Subject(
            "expenses",
            (
                "purpose",
                lambda rng: (
                    f"{rng.choice(('hotel', 'taxi', 'dinner', 'train', 'parking', 'flight'))} in "
                    f"{pools.town(rng)}"
                ),
            ),
            {"amount": pools.price, "date": pools.iso_date, "paid by": pools.first_name},
            ("my expenses", "the receipts of the trip", "what we spent"),
            "list_expenses",
        ),
        Subject(
            "books",
            (
                "title",
                lambda rng: (
                    f"The {pools.rare(rng)} {rng.choice(('Affair', 'Garden', 'Letters', 'Machine', 'Winter'))}"
                ),
            ),
            {
                "author": pools.full_name,
                "pages": _count(90, 900),
                "year": _count(1890, 2026),
                "shelf": pools.code,
            },
            ("the reading list", "the books of the club", "what the library has"),
            "search_books",
        ),
        Subject(
            "scores",
            ("player", pools.first_name),
            {
                "points": _count(0, 400),
                "rank": _count(1, 60),
                "team": lambda rng: f"{pools.town(rng)} {rng.choice(('Owls', 'Rovers', 'United'))}",
            },
            ("the standings", "the scores after the last round", "the results"),
            "get_standings",
        ),
        Subject(
            "flights",
            (
                "flight",
                lambda rng: (
                    f"{rng.choice('ABCDEFGHKLMNSTUX')}{rng.choice('ABCDEFGHKLMNSTUX')}{rng.randrange(10, 9999)}"
                ),
            ),
            {
                "to": pools.town,
                "departs": pools.clock,
                "gate": lambda rng: f"{rng.choice('ABCDE')}{rng.randrange(1, 60)}",
                "seats": _count(0, 200),
            },
            ("the departures", "the flights that I found", "tonight's flights"),
            "search_flights",
        ),
    )
}
#: Subjects that are held out: flights for tests, the weather for validation.
HELD_OUT: dict[str, Split] = {"flights": "test", "weather": "validation"}


# ---------------------------------------------------------------------- how a list is written


def _bullets(key: str, entries: Sequence[Entry], rng: random.Random) -> str:
    mark, sep = rng.choice(("- ", "* ", "", "• ")), rng.choice((", ", "; ", " | "))
    return "\n".join(
        f"{mark}{entry[key]}: {sep.join(f'{k} {v}' for k, v in entry.items() if k != key)}"
        for entry in entries
    )


def _numbered(key: str, entries: Sequence[Entry], rng: random.Random) -> str:
    mark = rng.choice((".", ")", ":"))
    return "\n".join(
        f"{k}{mark} {entry[key]} ({', '.join(f'{f}: {v}' for f, v in entry.items() if f != key)})"
        for k, entry in enumerate(entries, 1)
    )


def _table(key: str, entries: Sequence[Entry], rng: random.Random) -> str:
    fields = list(entries[0])
    lines = [fields, ["---"] * len(fields), *([entry[field] for field in fields] for entry in entries)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv(key: str, entries: Sequence[Entry], rng: random.Random) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=rng.choice(",;\t"), lineterminator="\n")
    writer.writerow(entries[0])
    writer.writerows(entry.values() for entry in entries)
    return file.getvalue().strip()


def _json(key: str, entries: Sequence[Entry], rng: random.Random) -> str:
    indent = rng.choice((None, None, 1, 2))
    typed = [
        {k: int(v) if v.isdigit() and v[0] != "0" and k != key else v for k, v in e.items()} for e in entries
    ]
    whole: Any = rng.choice((typed, {"results": typed, "count": len(typed)}))
    if rng.random() < 0.3:
        whole = {e[key]: {k: v for k, v in e.items() if k != key} for e in entries}
    return json.dumps(whole, indent=indent, ensure_ascii=False)


def _json_lines(key: str, entries: Sequence[Entry], rng: random.Random) -> str:
    return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)


def _blocks(key: str, entries: Sequence[Entry], rng: random.Random) -> str:
    sep = rng.choice((": ", " = ", " - "))
    return "\n\n".join("\n".join(f"{k}{sep}{v}" for k, v in entry.items()) for entry in entries)


def _yaml(key: str, entries: Sequence[Entry], rng: random.Random) -> str:
    return "\n".join(
        f"{entry[key]}:\n" + "\n".join(f"  {k}: {v}" for k, v in entry.items() if k != key)
        for entry in entries
    )


def _log(key: str, entries: Sequence[Entry], rng: random.Random) -> str:
    minute, lines = rng.randrange(1380), []
    for entry in entries:
        minute = min(1439, minute + rng.randrange(1, 9))
        rest = " ".join(
            f"{k.replace(' ', '_')}={v!r}" if " " in v else f"{k.replace(' ', '_')}={v}"
            for k, v in entry.items()
        )
        lines.append(
            f"{minute // 60:02}:{minute % 60:02}:{rng.randrange(60):02} "
            f"{rng.choice(('INFO', 'WARN', 'DEBUG'))} {rest}"
        )
    return "\n".join(lines)


def _prose(key: str, entries: Sequence[Entry], rng: random.Random) -> str:
    return " ".join(
        f"{entry[key][0].upper()}{entry[key][1:]} has {', '.join(f'{k} {v}' for k, v in entry.items() if k != key)}."
        for entry in entries
    )


_WRITERS = (
    _bullets,
    _bullets,
    _numbered,
    _table,
    _csv,
    _json,
    _json,
    _json_lines,
    _blocks,
    _yaml,
    _log,
    _prose,
)
_HERE = (
    "Here is {title}:\n{list}",
    "{list}\n\nThis is {title}.",
    "Please keep {title} in mind.\n\n{list}",
    "{list}",
    "I copied {title} for you:\n\n{list}",
    "{title}\n\n{list}",
)
_CALLS = (
    '<tool_call>\n{{"name": "{tool}", "arguments": {arguments}}}\n</tool_call>',
    "[call of {tool}] {arguments}",
    "Action: {tool}\nAction Input: {arguments}",
    '```json\n{{"tool": "{tool}", "input": {arguments}}}\n```',
    "{tool}({arguments})",
)
_RESULTS = (
    "<tool_response>\n{list}\n</tool_response>",
    "[result of {tool}] {list}",
    "Observation: {list}",
    "```\n{list}\n```",
    "Result:\n{list}",
)
_QUESTIONS = (
    ("What is the {field} of {key}?", "The {field} of {key} is {{}}."),
    ("{key}: {field}?", "{{}}"),
    ("Which {field} does {key} have?", "{key} has the {field} {{}}."),
    ("Can you look up the {field} for {key}?", "Sure, it is {{}}."),
    ("I need the {field} of {key} again.", "{field} of {key}: {{}}"),
    ("What did it say about {key}, {field}?", "It said {{}}."),
)
_REVERSED = (
    ("Which {name} has the {field} {value}?", "That is {{}}."),
    ("Whose {field} is {value}?", "The {name} with the {field} {value} is {{}}."),
    ("{field} {value}, which {name} is that?", "{{}}."),
)
_NOTED = (
    "Got it.",
    "Okay.",
    "Thanks, I have read it.",
    "Noted.",
    "Alright, what would you like to know?",
    "I see.",
)
_BETWEEN = (
    ("Thank you!", "You are welcome."),
    ("Give me a second.", "Of course."),
    ("How are you today?", "I am fine, thank you. What can I do for you?"),
    ("That is a lot.", "It is. Ask me for whatever you need."),
    ("Let us go on later.", "As you like."),
    ("I was interrupted, sorry.", "No problem at all."),
)


@register_source
class Lists(Source):
    """Lists, tables and results of tools in a conversation, and questions about them.

    Args:
        kinds: subjects of :data:`SUBJECTS`; all that are not held out by default. Held-out rows are always about
            the held-out subjects.
        entries: of a list, drawn from these.
        lists: in a row, drawn from these; held-out rows have the most.
        tools: share of the lists that are results of tools.
        formats: see :class:`~ccm.data.conversational.ConversationSource`.
    """

    name, title = "lists", "Lists, tables and results of tools, and questions about them (made up)"
    size, licence, origin = "without end", "Apache-2.0 (made up)", "generated, seeded"

    def __init__(
        self,
        tokenizer: Any,
        kinds: Sequence[str] | None = None,
        entries: int | Sequence[int] = (3, 4, 6, 10),
        lists: int | Sequence[int] = (1, 2, 3),
        tools: float = 0.4,
        formats: Any = "template",
    ):
        super().__init__(tokenizer)
        for kind in kinds or ():
            if kind not in SUBJECTS:
                raise UnknownNameError("kind", kind, list(SUBJECTS))
        self.kinds = tuple(kinds or (name for name in SUBJECTS if name not in HELD_OUT))
        self.entries, self.lists = numbers("entries", entries, 2), numbers("lists", lists, 1)
        self.tools, self.formats = share("tools", tools), read_formats("formats", formats)

    def draw(self, rng: random.Random) -> ConversationRow:
        return self._row("lists", self.kinds, rng.choice(self.lists), rng)

    def held_out(self, split: HeldOut, limit: int) -> list[ConversationRow]:
        check_split(split)
        kinds = [kind for kind, home in HELD_OUT.items() if home == split]
        names = [f"lists {split} {k}" for k in range(limit)]
        return [self._row(name, kinds, max(self.lists), random.Random(name)) for name in names]

    def _row(self, name: str, kinds: Sequence[str], lists: int, rng: random.Random) -> ConversationRow:
        said: list[Said] = []
        asked: list[tuple[Said, Said]] = []
        for _ in range(lists):
            subject = SUBJECTS[rng.choice(kinds)]
            entries = _entries(subject, rng.choice(self.entries), rng)
            said += _shown(subject, entries, rng.random() < self.tools, rng)
            questions = [_asked(subject, entries, rng) for _ in range(rng.choice((1, 2, 3)))]
            for pair in questions:
                if rng.random() < 0.3:
                    said += pair
                else:
                    asked.append(pair)
            for question, answer in rng.sample(_BETWEEN, rng.choice((0, 1, 3))):
                said += [Said("user", question), Said("assistant", answer)]
        if not asked:
            asked.append(_asked(subject, entries, rng))
        for pair in rng.sample(asked, len(asked)):
            said += pair
        part, recall = write(said, draw_style(self.formats, self.tokenizer, rng), max_turn_tokens=1024)
        return row(name, part, recall)


def _entries(subject: Subject, count: int, rng: random.Random) -> list[Entry]:
    """Entries with some of the fields; no two have the same key."""
    key, make = subject.key
    fields = rng.sample(list(subject.fields), rng.randrange(1, len(subject.fields) + 1))
    entries: dict[str, Entry] = {}
    while len(entries) < count:
        name = make(rng)
        entries[name] = {key: name, **{field: subject.fields[field](rng) for field in fields}}
    return list(entries.values())


def _shown(subject: Subject, entries: Sequence[Entry], tool: bool, rng: random.Random) -> list[Said]:
    text = rng.choice(_WRITERS)(subject.key[0], entries, rng)
    title = rng.choice(subject.titles)
    if not tool:
        return [
            Said("user", rng.choice(_HERE).replace("{title}", title).replace("{list}", text)),
            Said("assistant", rng.choice(_NOTED)),
        ]
    kind = rng.randrange(len(_CALLS))
    arguments = json.dumps(
        rng.choice(({}, {"limit": len(entries)}, {"query": title}, {"user": pools.digits(rng)}))
    )
    return [
        Said(
            "user", rng.choice((f"Please show me {title}.", f"Can you check {title}?", f"Look up {title}."))
        ),
        Said("assistant", _CALLS[kind].format(tool=subject.tool, arguments=arguments)),
        Said("user", _RESULTS[kind].replace("{tool}", subject.tool).replace("{list}", text)),
        Said("assistant", rng.choice((f"I have found {len(entries)}.", *_NOTED))),
    ]


def _asked(subject: Subject, entries: Sequence[Entry], rng: random.Random) -> tuple[Said, Said]:
    """A question about one entry, and the answer, which only the list tells."""
    key = subject.key[0]
    entry = rng.choice(entries)
    field = rng.choice([field for field in entry if field != key])
    told = {"name": key, "key": entry[key], "field": field, "value": entry[field]}
    alone = [other[field] for other in entries].count(entry[field]) == 1
    back = alone and rng.random() < 0.25
    question, answer = rng.choice(_REVERSED if back else _QUESTIONS)
    answer = answer.format(**told)
    value = entry[key] if back else entry[field]
    start = answer.index("{}")
    return (
        Said("user", question.format(**told)),
        Said("assistant", answer.replace("{}", value), (start, start + len(value))),
    )
