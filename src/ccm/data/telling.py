"""Facts that people tell about themselves in a chat, and that are asked for a while later; some change in between.

    Ana: My dog is called Miso.          (told; words and values come from large pools)
    Ben: How sweet!
    …                                    (one to 64 turns of a real conversation)
    Ana: What was my dog's name again?
    Ben: Your dog's name is Miso.        (what only the earlier turn tells is marked)

Where two people talk, either may ask for what the other one told.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from . import pools
from .conversation import Split, split_of
from .formats import Said
from .notes import CHANGED
from .pools import parts


@dataclass(frozen=True)
class Told:
    """A kind of fact. Statements and answers hold ``{}`` for the value; answers are of the one who listened."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    value: Callable[[random.Random], str]


def _kind(name: str, value: Callable[[random.Random], str], statements: str, questions: str) -> Told:
    pairs = [pair.split("=>") for pair in questions.split("|")]
    return Told(name, tuple(statements.split("|")), tuple((q.strip(), a.strip()) for q, a in pairs), value)


def _of(words: str | Sequence[str]) -> Callable[[random.Random], str]:
    choices = words.split("|") if isinstance(words, str) else words
    return lambda rng: rng.choice(choices)


#: Whoever is told about; "me" has kinds of its own.
_RELATIVES = parts(
    "sister|mother|father|cousin|boss|neighbour|best friend|aunt|daughter|son|husband|wife|grandmother"
    "|flatmate|doctor|teacher"
    "|landlord|colleague|niece|godson|coach|therapist|ex|stepfather|dentist|babysitter|hairdresser|lawyer"
    "|roommate|fiancee"
)
_PETS = parts(
    "dog|horse|parrot|rabbit|hamster|turtle|goldfish|puppy|kitten|guinea pig|ferret|canary|snake|gecko|donkey"
)
_CODES = parts(
    "locker code|booking reference|door code|wifi password|gym locker number|order number|ticket number"
    "|license plate"
    "|membership number|bike lock code|voucher code|customer number|seat|flight number|garage code"
    "|alarm code|student number"
    "|case number|tracking number|invoice number"
)
_DATES = parts(
    "dentist appointment|wedding anniversary|driving test|flight|job interview|exam|moving day"
    "|concert|surgery|deadline"
)
_FAVOURITES = {
    "dish": pools.DISHES,
    "colour": pools.COLOURS,
    "hobby": pools.HOBBIES,
    "month": pools.MONTHS,
    "weekday": pools.DAYS,
}
_OWNED = parts(
    "car|bike|front door|sofa|suitcase|winter coat|kitchen|boat|backpack|guitar|phone case|umbrella"
)

_ME = (
    _kind(
        "name",
        pools.first_name,
        "My name is {}.|I'm {}, by the way.|Hi, I'm {}.|You can call me {}.|Everyone calls me {}.",
        "What is my name?=>Your name is {}|Do you remember my name?=>Yes, your name is {}|Who am I?=>You are {}"
        "|What was my name again?=>{}, right?",
    ),
    _kind(
        "full name",
        pools.full_name,
        "My full name is {}.|I signed the form as {}, that's me.",
        "What is my full name?=>Your full name is {}|Which name did I sign with?=>You signed as {}",
    ),
    _kind(
        "town",
        pools.town,
        "I live in {}.|I moved to {} last year.|I'm writing from {}, where I live.|Home is {} for me.",
        "Where do I live?=>You live in {}|Which town do I live in?=>You live in {}"
        "|What was the place called where I live?=>It is called {}|Where is my home?=>{}, you said",
    ),
    _kind(
        "birthplace",
        pools.town,
        "I was born in {}.|I grew up in {}.|Originally I'm from {}.",
        "Where was I born?=>You were born in {}|Where do I come from originally?=>You come from {}",
    ),
    _kind(
        "allergy",
        _of(pools.FOODS),
        "I'm allergic to {}.|Careful, I have an allergy: {}.|I can't have {}, I'm allergic."
        "|The test says that I am allergic to {}.",
        "What am I allergic to?=>You are allergic to {}|Which allergy do I have?=>You are allergic to {}"
        "|What was my allergy again?=>{}",
    ),
    _kind(
        "job",
        _of(pools.JOBS),
        "I work as a {}.|I'm a {} by trade.|For a living I'm a {}.|I just got a job as a {}!",
        "What do I do for a living?=>You work as a {}|What is my job?=>You are a {}"
        "|What do I work as?=>You work as a {}",
    ),
    _kind(
        "employer",
        lambda rng: (
            f"{pools.rare(rng)} "
            f"{rng.choice(('Ltd', 'Labs', 'Foods', 'Group', 'Motors', 'Bank', 'Studio', '& Sons'))}"
        ),
        "I work for {}.|My company is {}.|I have a contract with {} now.",
        "Who do I work for?=>You work for {}|What is my company called?=>Your company is called {}",
    ),
    _kind(
        "hobby",
        _of(pools.HOBBIES),
        "In my free time I'm into {}.|I've taken up {}.|My hobby is {}.",
        "What is my hobby?=>Your hobby is {}|What do I do in my free time?=>You are into {}",
    ),
    _kind(
        "age",
        lambda rng: str(rng.randrange(18, 95)),
        "I'm {} years old.|I turned {} last week.",
        "How old am I?=>You are {}|What is my age?=>You are {}",
    ),
    _kind(
        "phone",
        lambda rng: f"{pools.digits(rng, (3,))}-{pools.digits(rng, (3, 4))}",
        "My phone number is {}.|You can reach me at {}.|Call me at {}.",
        "What is my phone number?=>Your phone number is {}"
        "|Which number can I be reached at?=>You can be reached at {}",
    ),
    _kind(
        "email",
        pools.email,
        "My email is {}.|Write to me at {}.",
        "What is my email address?=>Your email address is {}|Which address should be written to?=>{}",
    ),
    _kind(
        "budget",
        lambda rng: f"{rng.randrange(2, 99) * 50}",
        "My budget is {} euros.|I can spend {} euros at most.",
        "How many euros can I spend?=>You can spend {}|What is my budget in euros?=>Your budget is {}",
    ),
    _kind(
        "instrument",
        _of(
            "oboe|ukulele|bassoon|cello|accordion|drums|harp|trombone|banjo|clarinet|viola|saxophone|flute"
            "|tuba|sitar"
        ),
        "I play the {}.|I'm learning the {}.",
        "Which instrument do I play?=>You play the {}|What instrument am I learning?=>You are learning the {}",
    ),
    _kind(
        "parking",
        lambda rng: f"{rng.choice('ABCDEFGH')}{rng.randrange(1, 99)}",
        "I parked in {}.|My car is in spot {}.",
        "Where did I park?=>You parked in {}|Which spot is my car in?=>Your car is in spot {}",
    ),
)


def _kinds() -> tuple[Told, ...]:
    made = list(_ME)
    for pet in _PETS:
        made.append(
            _kind(
                pet,
                pools.pet_name,
                f"My {pet} is called {{}}.|I have a {pet}, {{}}.|I named my {pet} {{}}."
                f"|{{}} is the name of my {pet}.",
                f"What is my {pet} called?=>Your {pet} is called {{}}"
                f"|What was my {pet}'s name again?=>Your {pet}'s name is {{}}"
                f"|Do you remember what I named my {pet}?=>Yes, you named your {pet} {{}}"
                f"|What's the name of my {pet}?=>The name of your {pet} is {{}}|My {pet}'s name?=>{{}}",
            )
        )
    for who in _RELATIVES:
        made += [
            _kind(
                who,
                pools.first_name,
                f"My {who} is called {{}}.|My {who}'s name is {{}}.|I'm meeting my {who} {{}} tonight."
                f"|{{}} is my {who}.",
                f"What is my {who} called?=>Your {who} is called {{}}"
                f"|What was my {who}'s name again?=>Your {who}'s name is {{}}"
                f"|Who is my {who}?=>Your {who} is {{}}",
            ),
            _kind(
                f"town of {who}",
                pools.town,
                f"My {who} lives in {{}}.|My {who} has moved to {{}}.|I visited my {who} in {{}}, at home.",
                f"Where does my {who} live?=>Your {who} lives in {{}}"
                f"|Which town is my {who} in?=>Your {who} is in {{}}",
            ),
            _kind(
                f"job of {who}",
                _of(pools.JOBS),
                f"My {who} works as a {{}}.|My {who} is a {{}}.",
                f"What does my {who} do for a living?=>Your {who} works as a {{}}"
                f"|What is my {who}'s job?=>Your {who} is a {{}}",
            ),
            _kind(
                f"allergy of {who}",
                _of(pools.FOODS),
                f"My {who} is allergic to {{}}.|Don't give my {who} any {{}}, it's an allergy.",
                f"What is my {who} allergic to?=>Your {who} is allergic to {{}}",
            ),
        ]
    for thing in _CODES:
        made.append(
            _kind(
                thing,
                lambda rng: pools.code(rng) if rng.random() < 0.5 else pools.digits(rng),
                f"My {thing} is {{}}.|Note my {thing}: {{}}.|The {thing} that I got is {{}}.",
                f"What is my {thing}?=>Your {thing} is {{}}"
                f"|What was my {thing} again?=>Your {thing} is {{}}|My {thing}?=>{{}}",
            )
        )
    for event in _DATES:
        made += [
            _kind(
                f"date of {event}",
                pools.date,
                f"My {event} is on {{}}.|I have my {event} on {{}}.",
                f"When is my {event}?=>Your {event} is on {{}}"
                f"|What date is my {event}?=>Your {event} is on {{}}",
            ),
            _kind(
                f"time of {event}",
                pools.clock,
                f"My {event} is at {{}}.|My {event} starts at {{}}.",
                f"At what time is my {event}?=>Your {event} is at {{}}",
            ),
        ]
    for thing, values in _FAVOURITES.items():
        made.append(
            _kind(
                f"favourite {thing}",
                _of(values),
                f"My favourite {thing} is {{}}.|I like {{}} best, of any {thing}.",
                f"What is my favourite {thing}?=>Your favourite {thing} is {{}}"
                f"|Which {thing} do I like best?=>You like {{}} best",
            )
        )
    for thing in _OWNED:
        made.append(
            _kind(
                f"colour of {thing}",
                _of(pools.COLOURS),
                f"My {thing} is {{}}.|I got my {thing} in {{}}.",
                f"What colour is my {thing}?=>Your {thing} is {{}}"
                f"|Which colour did I get my {thing} in?=>You got it in {{}}",
            )
        )
    return tuple(made)


KINDS = _kinds()
_SMALL_TALK = parts(
    "Oh, nice.|I see!|Good to know.|Got it.|Okay, noted.|How interesting.|Thanks for telling me."
    "|Ah, really?|Cool!|That's lovely."
    "|I'll keep that in mind.|Sure.|Alright.|Sounds good.|Haha, great.|Noted, thank you.|Oh wow.|Understood."
)
_ASKING = (
    "{}",
    "{}",
    "{}",
    "By the way: {}",
    "Quick question. {}",
    "Sorry, I forgot. {}",
    "Tell me: {}",
    "One more thing: {}",
)
_ANSWERING = (
    "{}.",
    "{}.",
    "{}.",
    "{}!",
    "{}, I think.",
    "Let me think. {}.",
    "Sure. {}.",
    "{}. Why do you ask?",
)
_BEFORE = (
    "{}",
    "{}",
    "{}",
    "Okay. {}",
    "Just so you know: {}",
    "{} Anyway.",
    "{} What about you?",
    "Oh, before I forget. {}",
)
_SWAPPED = {"am i": "are you", "you are": "I am", "you were": "I was", "was i": "were you"}
_SWAPPED |= {"my": "your", "your": "my", "i": "you", "you": "I"}
_PERSONS = re.compile(r"\b(am i|was i|you are|you were|my|your|i|you)\b", re.IGNORECASE)


def swapped(text: str) -> str:
    """The same, said by the other one: "your dog" for "my dog"."""

    def other(found: re.Match[str]) -> str:
        word = _SWAPPED[found.group().lower()]
        return word[0].upper() + word[1:] if found.group()[0].isupper() and found.group() != "I" else word

    return _PERSONS.sub(other, text)


def kinds_of(split: Split) -> list[Told]:
    """The kinds of facts of a split; those of held-out rows are never trained on."""
    return [kind for kind in KINDS if split_of(f"told {kind.name}") == split]


@dataclass
class _Fact:
    """One kind in one conversation: whose it is, and what was told of it so far."""

    kind: Told
    teller: str
    values: list[str] = field(default_factory=list)

    def tell(self, rng: random.Random) -> str:
        value = self.kind.value(rng)
        while value in self.values:
            value = self.kind.value(rng)
        text = rng.choice(self.kind.statements).format(value)
        if self.values:
            text = rng.choice(CHANGED).format(text)
        self.values.append(value)
        return text

    def ask(self, rng: random.Random, people: bool) -> tuple[Said, Said]:
        """The question for what holds now, and the answer."""
        question, answer = rng.choice(self.kind.questions)
        if len(self.values) > 1 and rng.random() < 0.4 and question.endswith("?"):
            question = f"{question.removesuffix('?').removesuffix(' again')} now?"
        asker, other = self.teller, _other(self.teller)
        if people and rng.random() < 0.5:  # the one who listened asks, and the one who told it answers
            asker, other = other, asker
            question, answer = swapped(question), swapped(answer)
        text = rng.choice(_ANSWERING).replace("{}", answer)
        if text.endswith("{}.") and rng.random() < 0.1:
            text = text[:-1]
        start = text.index("{}")
        value = self.values[-1]
        return (
            Said(asker, rng.choice(_ASKING).format(question)),
            Said(other, text.replace("{}", value), (start, start + len(value))),
        )


def _other(role: str) -> str:
    return "assistant" if role == "user" else "user"


def plant_told(
    said: Sequence[Said],
    rng: random.Random,
    count: int,
    changed: float = 0.3,
    people: bool = False,
    split: Split = "train",
) -> list[Said]:
    """The conversation with ``count`` facts told in it, each asked for once later on.

    Args:
        said: turns whose speakers alternate.
        rng: what is told and asked, where, and how far apart.
        count: facts.
        changed: share of them that are told anew with another value before they are asked for.
        people: whether both tell of themselves and ask each other; else the user tells and the assistant answers.
        split: whose kinds of facts are taken.
    """
    kinds = kinds_of(split)
    moments: list[tuple[float, int, _Fact]] = []  # place in the conversation, told (0) or asked (1), of what
    for kind in rng.sample(kinds, min(count, len(kinds))):
        fact = _Fact(kind, rng.choice(("user", "assistant")) if people else "user")
        apart = min(len(said) or 1, 64 ** rng.random())
        asked = rng.uniform(apart, max(apart, len(said)))
        told = asked - apart
        moments += [(told, 0, fact), (asked, 1, fact)]
        while rng.random() < changed:
            moments.append((rng.uniform(told, asked), 0, fact))
    moments.sort(key=lambda moment: moment[:2])
    made: list[Said] = []
    rest = list(said)
    for at, (place, asking, fact) in enumerate(moments):
        while rest and len(said) - len(rest) < place:
            made.append(rest.pop(0))
        if asking:
            question, answer = fact.ask(rng, people)
            made += [question, answer]
        else:
            told = rng.choice(_BEFORE).format(fact.tell(rng))
            follows = moments[at + 1] if at + 1 < len(moments) else None
            made.append(Said(fact.teller, told))
            if not follows or follows[0] > place + 0.5 or rng.random() < 0.6:
                made.append(Said(_other(fact.teller), rng.choice(_SMALL_TALK)))
    return _alternating([*made, *(rest if rng.random() < 0.3 else [])])


def _alternating(said: Sequence[Said]) -> list[Said]:
    """Turns of one speaker that follow each other become one."""
    made = list(said[:1])
    for before, one in pairwise(said):
        last = made[-1]
        if one.role == before.role == last.role and not (one.recall[1] and last.recall[1]):
            shift = len(last.text) + 1
            recall = last.recall if last.recall[1] else tuple(at + shift for at in one.recall)
            made[-1] = Said(
                one.role,
                f"{last.text}\n{one.text}",
                (recall[0], recall[1]) if one.recall[1] or last.recall[1] else (0, 0),
            )
        else:
            made.append(one)
    return made
