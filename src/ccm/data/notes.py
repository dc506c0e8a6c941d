"""Notes: what one person tells, one message a segment, some of it told anew with another value, and questions.

    told    My sister lives in Paris.                                   folded, not learned
    told    The badge number of Adam Porter is 48213.
    asked   Where does my sister live? - Your sister lives in Paris.    one segment; its answer is learned
    told    That has changed: My sister lives in Rome.
    asked   Where does my sister live now? - Now your sister lives in Rome.

Kinds of facts are those that are planted into conversations, and others: numbers of five digits, people who share
their names, and events whose order is asked for. Whole kinds are held out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

from ..chat.turns import render
from ..errors import ConfigError
from .conversation import check_split, unit
from .facts import TEST, TRAIN, Fact, Kind, read_kind
from .planting import render_answer
from .rows import ConversationRow
from .sources import HeldOut, Source, numbers, register_source, share

_VALUES = {kind.name: " ".join(kind.values) for kind in TRAIN}
_NAMES, _TOWNS, _DOGS = _VALUES["sister"], _VALUES["town of sister"], _VALUES["dog"]
_NUMBERS = " ".join(map(str, random.Random(0).sample(range(10_000, 100_000), 500)))

OWN = (
    *TRAIN,
    read_kind(
        "member number",
        "My member number is {}.|They gave me the member number {}.",
        "What is my member number?=>Your member number is {}",
        _NUMBERS,
    ),
    read_kind(
        "door code",
        "The code of my front door is {}.|My front door opens with {}.",
        "Which code opens my front door?=>Your front door opens with {}",
        _NUMBERS,
    ),
    read_kind(
        "parcel",
        "My parcel has the number {}.|I am waiting for parcel {}.",
        "Which number does my parcel have?=>Your parcel has the number {}",
        _NUMBERS,
    ),
)
#: Of somebody with a name, which stands for WHO.
OF_PEOPLE = (
    read_kind(
        "badge of WHO",
        "The badge number of WHO is {}.|WHO has badge {}.",
        "What is the badge number of WHO?=>The badge number of WHO is {}",
        _NUMBERS,
    ),
    read_kind("town of WHO", "WHO comes from {}.", "Where does WHO come from?=>WHO comes from {}", _TOWNS),
    read_kind(
        "dog of WHO", "The dog of WHO is {}.", "What is the dog of WHO called?=>The dog of WHO is {}", _DOGS
    ),
    read_kind("boss of WHO", "WHO works for {}.", "Who does WHO work for?=>WHO works for {}", _NAMES),
    read_kind(
        "instrument of WHO",
        "WHO plays the {}.|WHO has taken up the {}.",
        "Which instrument does WHO play?=>WHO plays the {}",
        _VALUES["instrument"],
    ),
)
#: What happens more than once; its order is asked for, with what came just before in place of BEFORE.
EVENTS = (
    read_kind(
        "guests",
        "{} has just come in.|Now {} is here as well.",
        "Who came in first?=>The first to come in was {}|Who came in right after BEFORE?=>Right after BEFORE came {}",
        _NAMES,
    ),
    read_kind(
        "purchases",
        "I have just bought a {}.|Next I bought a {}.",
        "What did I buy first?=>The first thing you bought was a {}"
        "|What did I buy after the BEFORE?=>After the BEFORE you bought a {}",
        _VALUES["gift"],
    ),
)
#: Around a statement that takes the place of an older one.
CHANGED = (
    "That has changed: {}",
    "Things are different now. {}",
    "I have news. {}",
    "Correction: {}",
    "Forget what I said about that. {}",
    "{} That is new.",
)
#: Messages of a row; the held-out kinds have values for a few more.
MOST = 64
_FIRST = "Adam Alice Carl Clara Diana Frank Grace Hugo Ivan Joan Keith Laura Nina Oliver Simon Wendy"
_LAST = "Carter Collins Cooper Porter Parker Palmer Fisher Foster"


@register_source
class Notes(Source):
    """Facts and nothing else, told in short messages; the answers to questions about them are scored.

    Args:
        messages: told in a row, drawn from these; held-out rows have the most.
        changed: share of the messages that replace what was told before.
        asked: questions in a row, as a share of its messages.
    """

    name, title = "notes", "Facts told in short messages, some of which change, and questions (made up)"
    size, licence, origin = "without end", "Apache-2.0 (made up)", "generated, seeded"

    def __init__(
        self,
        tokenizer: Any,
        messages: int | Sequence[int] = (8, 16),
        changed: float = 0.4,
        asked: float = 0.5,
    ):
        super().__init__(tokenizer)
        self.messages = numbers("messages", messages, 4)
        if max(self.messages) > MOST:
            raise ConfigError(
                f"messages is {messages!r}: expected at most {MOST}, so that nothing is told twice"
            )
        self.changed, self.asked = share("changed", changed), share("asked", asked)

    def draw(self, rng: random.Random) -> ConversationRow:
        return self._row("notes", "train", rng.choice(self.messages), rng)

    def held_out(self, split: HeldOut, limit: int) -> list[ConversationRow]:
        check_split(split)
        return [
            self._row(f"notes {split} {k}", split, max(self.messages), random.Random(f"notes {split} {k}"))
            for k in range(limit)
        ]

    def _row(self, name: str, split: str, messages: int, rng: random.Random) -> ConversationRow:
        subjects = [_Subject(kind, kind in EVENTS) for kind in _kinds(split, messages, rng)]
        told: list[_Subject] = []
        segments: list[tuple[int, ...]] = []
        content: list[tuple[int, int]] = []
        recall: list[tuple[int, int, int]] = []
        # a question comes at the end, others wherever there is something that was not asked for yet
        asked = sorted(rng.choices(range(2, messages), k=max(1, round(self.asked * messages)) - 1))
        for count in range(1, messages + 1):
            again = [s for s in told if len(s.told) < len(s.kind.values)]
            subject = (
                rng.choice(again)
                if again and (rng.random() < self.changed or not subjects)
                else subjects.pop()
            )
            past = "user" if segments else ""
            segments.append(render(self.tokenizer, "user", subject.tell(rng), past).ids)
            content.append((0, 0))
            if subject not in told:
                told.append(subject)
            for _ in range(asked.count(count) + (count == messages)):
                unasked = [s for s in told if not s.asked]
                if not unasked and count < messages:
                    continue
                fact = rng.choice(unasked or told).ask(rng)
                question = render(self.tokenizer, "user", fact.question).ids
                answer, (start, stop) = render_answer(self.tokenizer, fact)
                recall.append((len(segments), len(question) + start, len(question) + stop))
                segments.append((*question, *answer.ids))
                content.append((len(question) + answer.content[0], len(question) + answer.content[1]))
        return ConversationRow(name, tuple(segments), tuple(content), tuple(recall))


class _Subject:
    """What is known of one kind of fact, in the order in which it was told."""

    def __init__(self, kind: Kind, events: bool):
        self.kind, self.events = kind, events
        self.told: list[str] = []
        self.asked = False

    def tell(self, rng: random.Random) -> str:
        """A value that was not told yet."""
        value = rng.choice([v for v in self.kind.values if v not in self.told])
        statement = rng.choice(self.kind.statements).format(value)
        if self.told and not self.events:
            statement = rng.choice(CHANGED).format(statement)
        self.told.append(value)
        self.asked = False
        return statement

    def ask(self, rng: random.Random) -> Fact:
        """For what holds now; of events for the first, or for the one that came right after another."""
        self.asked = True
        value = self.told[-1]
        question, answer = rng.choice(self.kind.questions)
        if self.events:
            place = rng.randrange(len(self.told))
            value, before = self.told[place], self.told[place - 1]
            question, answer = (text.replace("BEFORE", before) for text in self.kind.questions[place > 0])
        elif len(self.told) > 1 and rng.random() < 0.5:
            first = answer if answer[0] == "{" else answer[0].lower() + answer[1:]
            question, answer = f"{question[:-1]} now?", f"Now {first}"
        return Fact("", question, answer, value, ())


def _kinds(split: str, count: int, rng: random.Random) -> list[Kind]:
    """Kinds of a row, as many as it has messages, easily confused ones among them; those told first come last."""
    if split == "test":
        return rng.sample(TEST, len(TEST))
    own, of_people, events = (
        [kind for kind in kinds if (unit(f"notes {kind.name}") < 0.12) == (split == "validation")]
        for kinds in (OWN, OF_PEOPLE, EVENTS)
    )
    names = [" ".join(pair) for pair in product(rng.sample(_FIRST.split(), 2), rng.sample(_LAST.split(), 2))]
    about = [_about(kind, who) for kind in of_people for who in names]
    confusing = round(rng.choice((0.0, 0.0, 0.5, 1.0)) * count)
    some = rng.sample(about, min(len(about), confusing))
    some += [kind for kind in events if rng.random() < 0.5]
    some += rng.sample(own, min(len(own), max(0, count - len(some))))
    return rng.sample(some, len(some))


def _about(kind: Kind, who: str) -> Kind:
    """The kind for somebody with a name."""

    def put(text: str) -> str:
        return text.replace("WHO", who)

    return Kind(
        put(kind.name),
        tuple(map(put, kind.statements)),
        tuple((put(question), put(answer)) for question, answer in kind.questions),
        kind.values,
    )
