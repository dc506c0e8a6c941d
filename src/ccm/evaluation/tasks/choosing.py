"""What tasks share: checked time steps, the order of items, and questions as token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from ...chat.turns import turns_of
from ...errors import ConfigError
from ..items import Choice, Ids

_T = TypeVar("_T")


def check_steps(steps: Any, least: int = 0, option: str = "steps") -> None:
    """Refuse numbers (of time steps, most often) that are not whole, growing and at least ``least``.

    Raises:
        ConfigError: they are not, or there are none.
    """
    good = isinstance(steps, tuple) and all(type(t) is int and t >= least for t in steps)
    if not good or not steps or list(steps) != sorted(set(steps)):
        raise ConfigError(
            f"{option} is {steps!r}: expected growing whole numbers of at least {least}, such as 1, 2, 4, 8, 16"
        )


def spread(items: Iterable[_T], owners: Callable[[_T], Iterable[Hashable]]) -> list[_T]:
    """The same items, one of every owner before the second of any; otherwise the order stays."""
    seen: Counter[Hashable] = Counter()
    rounds = []
    for item in items:
        mine = list(owners(item))
        rounds.append((max((seen[owner] for owner in mine), default=0), item))
        seen.update(mine)
    return [item for _, item in sorted(rounds, key=lambda pair: pair[0])]


def by_length(
    items: Iterable[_T], long: Callable[[_T], bool], owners: Callable[[_T], Iterable[Hashable]]
) -> list[_T]:
    """The items that are long enough for every step before the others, both spread over their owners."""
    items = list(items)
    return spread(filter(long, items), owners) + spread((i for i in items if not long(i)), owners)


def encode(tokenizer: Any, text: str) -> Ids:
    """Token ids of the text alone."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def shortly(question: str) -> str:
    """The question, as it is put to a chat model that shall answer briefly."""
    return f"{question.rstrip(' ?.')}? Answer with a few words."


def ask(tokenizer: Any, question: str, stem: str = "") -> Ids:
    """A question as the user's turn, the header of the assistant's, and the beginning of its answer."""
    return (*turns_of(tokenizer).asked(question), *encode(tokenizer, stem))


def choice(
    prompt: Sequence[int],
    options: Sequence[Sequence[int]],
    answer: int,
    blank: Sequence[int] = (),
    groups: tuple[int, ...] = (),
    tag: str = "",
) -> Choice:
    """A choice between the places where the options differ: what all of them begin with joins the prompt."""
    shared = 0
    while min(map(len, options)) > shared + 1 and len({option[shared] for option in options}) == 1:
        shared += 1
    head = tuple(options[0][:shared])
    return Choice(
        (*prompt, *head),
        tuple(tuple(option[shared:]) for option in options),
        answer,
        (*blank, *head) if blank else (),
        groups,
        tag,
    )
