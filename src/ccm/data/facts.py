"""Planted facts: a speaker says something about themselves, and is asked about it any number of turns later.

Kinds of facts with several wordings and many values each. Kinds, wordings and values of the test split never occur
in the train split, so that what is measured is memory and not the list of names.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kind:
    """What can be told and asked. Statements and answers hold ``{}`` for the value; an answer ends with it."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]  # (question, answer)
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
        """What is said if the value is ``value``."""
        return self.answer.format(value)


def read_kind(name: str, statements: str, questions: str, values: str) -> Kind:
    """Statements are separated by "|", questions too, each with its answer behind "=>"."""
    pairs = [pair.split("=>") for pair in questions.split("|")]
    return Kind(
        name,
        tuple(statement.strip() for statement in statements.split("|")),
        tuple((question.strip(), answer.strip()) for question, answer in pairs),
        tuple(values.split()),
    )


_NAMES = (
    "Anna Mary Emma Laura Susan Julia Karen Helen Alice Sarah Nina Clara Diana Lucy Peter Frank Steve Kevin Brian "
    "Henry Simon Jack Adam Oliver Ryan Justin Scott Linda Grace Rachel Megan Victor Leon Hugo Ivan Carl Amy Jane "
    "Walter Bruce Tina Monica Sandra Roger Keith Neil Dennis Wendy Joan Carol"
)
_PEOPLE = (
    "sister mother father cousin roommate boss teacher doctor landlord coach wife husband daughter son "
    "grandmother colleague dentist aunt nephew tailor lawyer partner barber gardener"
)
_ANIMALS = "dog horse parrot rabbit hamster pony goat donkey"
_ANIMAL_NAMES = (
    "Rex Bella Rocky Daisy Buddy Lucky Ginger Shadow Rusty Pepper Bruno Coco Oscar Toby Molly Duke Snowy Bandit "
    "Max Sam Teddy Honey Zeus Apollo Rosie Sandy"
)
_TOWNS = (
    "London Paris Berlin Boston Chicago Madrid Rome Vienna Dublin Denver Seattle Tokyo Moscow Toronto Sydney "
    "Mumbai Munich Lyon Milan Detroit Phoenix Portland Glasgow Geneva Havana Manila Delhi"
)
_COUNTRIES = (
    "Spain Italy France Germany Brazil Canada Mexico India China Japan Norway Sweden Greece Egypt Poland Chile "
    "Kenya Turkey Ireland Peru Cuba Iran Finland Denmark"
)
_COLOURS = "red blue green yellow orange purple black white brown pink gray silver gold"
_COUNTS = "two three four five six seven eight nine ten eleven twelve twenty"
_BELONGINGS = "bike house door jacket hat sofa kitchen phone boat bag"
_FAVOURITES = {
    "colour": _COLOURS,
    "season": "spring summer autumn winter",
    "animal": "lion elephant wolf dolphin eagle bear fox owl penguin giraffe zebra shark",
    "flower": "rose tulip daisy orchid lavender sunflower violet iris poppy",
    "food": "pizza pasta sushi soup steak rice bread cheese salad chocolate chicken curry noodles tacos",
    "sport": "tennis football golf hockey baseball basketball volleyball rugby cricket boxing",
    "kind of film": "comedies westerns thrillers musicals cartoons documentaries horror romance",
    "number": _COUNTS,
    "game": "chess poker checkers dominoes bingo bridge darts tag",
}


def _people() -> Iterator[Kind]:
    for who in _PEOPLE.split():
        yield read_kind(
            who,
            f"My {who}'s name is {{}}.|I went to see my {who} {{}} yesterday.|{{}} is my {who}, you know."
            f"|Let me tell you about {{}}, my {who}.",
            f"What is my {who}'s name?=>Your {who}'s name is {{}}|Who is my {who}?=>Your {who} is {{}}"
            f"|What was the name of my {who} again?=>The name of your {who} is {{}}",
            _NAMES,
        )
        yield read_kind(
            f"town of {who}",
            f"My {who} lives in {{}}.|Last week I went to {{}} to visit my {who}.|My {who} has moved to {{}}.",
            f"Where does my {who} live?=>Your {who} lives in {{}}"
            f"|In which town is my {who}?=>The town of your {who} is {{}}",
            _TOWNS,
        )


def _animals() -> Iterator[Kind]:
    for animal in _ANIMALS.split():
        yield read_kind(
            animal,
            f"By the way, my {animal} is called {{}}.|I have to feed my {animal} {{}} now."
            f"|I have a {animal} and I named it {{}}.",
            f"What is my {animal} called?=>Your {animal} is called {{}}"
            f"|What name did I give my {animal}?=>The name you gave your {animal} is {{}}",
            _ANIMAL_NAMES,
        )


def _favourites() -> Iterator[Kind]:
    for thing, values in _FAVOURITES.items():
        yield read_kind(
            f"favourite {thing}",
            f"My favourite {thing} is {{}}.|I like {{}} most, that is my favourite {thing}."
            f"|If you ask me for my favourite {thing}: {{}}!",
            f"What is my favourite {thing}?=>Your favourite {thing} is {{}}"
            f"|Which {thing} do I like most?=>The {thing} you like most is {{}}",
            values,
        )


def _colours() -> Iterator[Kind]:
    for thing in _BELONGINGS.split():
        yield read_kind(
            f"colour of {thing}",
            f"My {thing} is {{}}.|I have painted my {thing} {{}}.|I have a {{}} {thing}.",
            f"What colour is my {thing}?=>Your {thing} is {{}}"
            f"|Which colour does my {thing} have?=>The colour of your {thing} is {{}}",
            _COLOURS,
        )


def _counts() -> Iterator[Kind]:
    for things in [
        "cousins",
        "cats",
        "books",
        "plants",
        "keys",
        "guitars",
        "chairs",
        "watches",
        "neighbours",
        "bikes",
    ]:
        yield read_kind(
            f"number of {things}",
            f"I have {{}} {things}.|There are {{}} {things} in my house, all mine.",
            f"How many {things} do I have?=>The number of your {things} is {{}}",
            _COUNTS,
        )


TRAIN = (
    *_people(),
    *_animals(),
    *_favourites(),
    *_colours(),
    *_counts(),
    read_kind(
        "home",
        "I grew up in {}.|I come from {}.|I was born in {}.",
        "Where did I grow up?=>You grew up in {}|Where am I from?=>You are from {}",
        _TOWNS,
    ),
    read_kind(
        "job",
        "I work as a {}.|I am a {} by trade.|I have a new job as a {}.",
        "What do I do for a living?=>You work as a {}|What is my job?=>You are a {}",
        "teacher nurse lawyer farmer chef pilot writer painter driver doctor engineer dentist baker singer "
        "plumber judge sailor soldier",
    ),
    read_kind(
        "instrument",
        "I play the {}.|I practise the {} every day.|I bought myself a {}.",
        "Which instrument do I play?=>The instrument you play is the {}|What do I practise?=>You practise the {}",
        "piano guitar violin flute drums trumpet cello harp organ banjo clarinet",
    ),
    read_kind(
        "day",
        "My lesson is always on {}.|I have my class every {}.",
        "On which day is my lesson?=>Your lesson is on {}|When is my class?=>Your class is on {}",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    ),
    read_kind(
        "country",
        "Next year I will move to {}.|I am going to live in {} soon.|We are moving to {}.",
        "Where will I move?=>You will move to {}|Which country will I live in?=>You will live in {}",
        _COUNTRIES,
    ),
    read_kind(
        "holiday",
        "Last summer I went to {}.|I spent my holidays in {}.|I am just back from {}.",
        "Where was I on holiday?=>Your holiday was in {}|Which country did I visit?=>You visited {}",
        _COUNTRIES,
    ),
    read_kind(
        "language",
        "I am learning {}.|I speak {} at home.|I take evening classes in {}.",
        "Which language do I learn?=>The language you learn is {}|What do I speak?=>You speak {}",
        "German French Italian Dutch Russian Chinese Japanese Korean Arabic Greek Turkish Polish Hindi",
    ),
    read_kind(
        "fear",
        "I am afraid of {}.|I can not stand {}.|{} scare me to death.",
        "What am I afraid of?=>You are afraid of {}|What scares me?=>You are scared of {}",
        "spiders snakes heights dogs ghosts storms clowns rats bees sharks crowds needles",
    ),
    read_kind(
        "hobby",
        "I spend my weekends {}.|My hobby is {}.|These days I enjoy {}.",
        "What is my hobby?=>Your hobby is {}|How do I spend my weekends?=>You spend your weekends {}",
        "painting fishing swimming hiking cooking reading dancing sailing skiing knitting gardening climbing",
    ),
    read_kind(
        "lost",
        "I have lost my {}.|I can not find my {} anywhere.|Someone stole my {}.",
        "What did I lose?=>You lost your {}|What am I looking for?=>You are looking for your {}",
        "wallet keys phone passport ring glasses umbrella camera watch bag laptop gloves",
    ),
    read_kind(
        "gift",
        "For my wedding I got a {}.|They gave me a {} as a present.",
        "What present did I get?=>The present you got was a {}",
        "lamp clock mirror vase blanket carpet kettle toaster table painting bottle basket",
    ),
)

TEST = (
    read_kind(
        "cat",
        "You should meet my cat, her name is {}.",
        "Do you remember the name of my cat?=>Yes, the name of your cat is {}",
        "Luna Milo Felix Smokey Tiger Oreo Ruby Lily Willow Jasper",
    ),
    read_kind(
        "brother",
        "I have one brother and he is called {}.",
        "How is my brother called?=>Your brother is called {}",
        "David Paul Mark George Eric Thomas Daniel Martin Robert Philip",
    ),
    read_kind(
        "fruit",
        "I could eat {} all day long.",
        "Which fruit could I eat all day?=>The fruit you could eat all day is {}",
        "apples bananas grapes cherries peaches pears strawberries melons plums mangoes",
    ),
    read_kind(
        "drink",
        "I only ever order {} when I go out.",
        "What do I order when I go out?=>When you go out you order {}",
        "coffee tea beer wine milk water juice lemonade whiskey soda",
    ),
    read_kind(
        "month",
        "My birthday is in {}.",
        "In which month is my birthday?=>Your birthday is in {}",
        "January February March April May June July August September October November December",
    ),
    read_kind(
        "subject",
        "At school I was best at {}.",
        "What was I best at in school?=>In school you were best at {}",
        "history math biology chemistry physics geography music art Spanish Latin",
    ),
    read_kind(
        "uncle",
        "My uncle has a house in {}.",
        "Where is the house of my uncle?=>The house of your uncle is in {}",
        "Miami Houston Dallas Austin Oslo Zurich Prague Lisbon Athens Cairo",
    ),
    read_kind(
        "car",
        "My neighbour drives an old {}.",
        "What car does my neighbour have?=>The car of your neighbour is a {}",
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
        statement, (question, answer) = rng.choice(kind.statements), rng.choice(kind.questions)
        facts.append(Fact(statement.format(value), question, answer, value, tuple(options)))
    return facts
