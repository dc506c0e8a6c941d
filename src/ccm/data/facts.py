"""Planted facts: a speaker says something about themselves, and is asked about it any number of turns later.

A few kinds of facts with many values each. Kinds, wordings and values of the test split never occur in the
train split, so that what is measured is memory and not the list of names.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kind:
    """``statement`` and ``answer`` hold ``{}`` for the value; the answer ends with it."""

    name: str
    statement: str
    question: str
    answer: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One planted fact. ``candidates`` are values of the same kind, the true one included."""

    statement: str
    question: str
    answer: str
    value: str
    candidates: tuple[str, ...]

    def answer_with(self, value: str) -> str:
        return self.answer.format(value)


def _kind(name: str, statement: str, question: str, answer: str, values: str) -> Kind:
    return Kind(name, statement, question, answer, tuple(values.split()))


TRAIN = (
    _kind(
        "dog",
        "By the way, my dog is called {}.",
        "What is my dog called?",
        "Your dog is called {}",
        "Rex Bella Rocky Daisy Buddy Lucky Ginger Shadow Rusty Pepper Bruno Coco Oscar Toby Molly Duke",
    ),
    _kind(
        "colour",
        "My favourite colour is {}.",
        "Which colour do I like most?",
        "The colour you like most is {}",
        "red blue green yellow orange purple black white brown pink gray silver gold",
    ),
    _kind(
        "city",
        "I grew up in {}.",
        "Where did I grow up?",
        "You grew up in {}",
        "London Paris Berlin Boston Chicago Madrid Rome Vienna Dublin Denver Seattle Tokyo Moscow Toronto",
    ),
    _kind(
        "job",
        "I work as a {}.",
        "What do I do for a living?",
        "You work as a {}",
        "teacher nurse lawyer farmer chef pilot writer painter driver doctor engineer dentist baker singer",
    ),
    _kind(
        "food",
        "The food I love most is {}.",
        "What food do I love?",
        "The food you love is {}",
        "pizza pasta sushi soup steak rice bread cheese salad chocolate chicken curry noodles tacos",
    ),
    _kind(
        "instrument",
        "I play the {}.",
        "Which instrument do I play?",
        "The instrument you play is the {}",
        "piano guitar violin flute drums trumpet cello harp organ banjo clarinet",
    ),
    _kind(
        "sister",
        "My sister's name is {}.",
        "What is the name of my sister?",
        "The name of your sister is {}",
        "Anna Mary Emma Laura Susan Julia Karen Helen Alice Sarah Nina Clara Diana Lucy",
    ),
    _kind(
        "sport",
        "I have started to play {}.",
        "What sport did I start?",
        "The sport you started is {}",
        "tennis football golf hockey baseball basketball volleyball rugby cricket boxing",
    ),
    _kind(
        "day",
        "My lesson is always on {}.",
        "On which day is my lesson?",
        "Your lesson is on {}",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    ),
    _kind(
        "country",
        "Next year I will move to {}.",
        "Where will I move next year?",
        "Next year you will move to {}",
        "Spain Italy France Germany Brazil Canada Mexico India China Japan Norway Sweden Greece Egypt",
    ),
    _kind(
        "friend",
        "My best friend is called {}.",
        "Who is my best friend?",
        "Your best friend is {}",
        "Peter Frank Steve Kevin Brian Henry Simon Jack Adam Oliver Ryan Justin Scott",
    ),
    _kind(
        "pet",
        "I have a pet {} at home.",
        "What pet do I have?",
        "The pet you have is a {}",
        "rabbit snake parrot turtle hamster lizard mouse goat horse duck pig",
    ),
)

TEST = (
    _kind(
        "cat",
        "You should meet my cat, her name is {}.",
        "Do you remember the name of my cat?",
        "Yes, the name of your cat is {}",
        "Luna Milo Felix Smokey Tiger Oreo Ruby Lily Willow Jasper",
    ),
    _kind(
        "brother",
        "I have one brother and he is called {}.",
        "How is my brother called?",
        "Your brother is called {}",
        "David Paul Mark George Eric Thomas Daniel Martin Robert Philip",
    ),
    _kind(
        "fruit",
        "I could eat {} all day long.",
        "Which fruit could I eat all day?",
        "The fruit you could eat all day is {}",
        "apples bananas grapes cherries peaches pears strawberries melons plums mangoes",
    ),
    _kind(
        "drink",
        "I only ever order {} when I go out.",
        "What do I order when I go out?",
        "When you go out you order {}",
        "coffee tea beer wine milk water juice lemonade whiskey soda",
    ),
    _kind(
        "month",
        "My birthday is in {}.",
        "In which month is my birthday?",
        "Your birthday is in {}",
        "January February March April May June July August September October November December",
    ),
    _kind(
        "subject",
        "At school I was best at {}.",
        "What was I best at in school?",
        "In school you were best at {}",
        "history math biology chemistry physics geography music art Spanish Latin",
    ),
    _kind(
        "uncle",
        "My uncle has a house in {}.",
        "Where is the house of my uncle?",
        "The house of your uncle is in {}",
        "Miami Houston Dallas Austin Oslo Zurich Prague Lisbon Athens Cairo",
    ),
    _kind(
        "car",
        "My neighbour drives an old {}.",
        "What car does my neighbour have?",
        "The car of your neighbour is a {}",
        "Ford Honda Toyota Volvo Audi Tesla Jeep Fiat Nissan Mazda",
    ),
)


def draw_facts(
    rng: random.Random, split: Literal["train", "test"], count: int, candidates: int = 8
) -> list[Fact]:
    """``count`` facts of different kinds."""
    facts = []
    for kind in rng.sample(TRAIN if split == "train" else TEST, count):
        options = rng.sample(kind.values, min(candidates, len(kind.values)))
        value = rng.choice(options)
        facts.append(Fact(kind.statement.format(value), kind.question, kind.answer, value, tuple(options)))
    return facts
