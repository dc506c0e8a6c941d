"""Names, words and numbers to make things up from; names put together from syllables are hardly ever alike."""

from __future__ import annotations

import random


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def parts(text: str) -> tuple[str, ...]:
    """The parts of a text between "|"."""
    return tuple(text.split("|"))


FIRST_NAMES = words(
    "Ana Ben Aisha Akira Amara Amelie Anders Andrea Anil Anton Arjun Astrid Aurora Bao Beatriz Bilal "
    "Birgit Bjorn Bogdan "
    "Camila Carlos Chen Chiara Chloe Ciaran Dagmar Dalia Damian Darius Deepa Diego Dimitri Dorothy Ebba "
    "Edgar Eduardo "
    "Eleni Elif Elijah Elsa Emeka Enzo Erik Esther Fatima Felipe Fiona Florence Freya Gabriel Gerda Giulia "
    "Gregory Gustav "
    "Habib Hana Harriet Hassan Heidi Hiroshi Ibrahim Ida Igor Ines Ingrid Irina Isaac Ishaan Ivy Jakub "
    "Jamal Jasmine Joao "
    "Johanna Jonas Jorge Josefina Kaito Kamal Katarina Keiko Kofi Kwame Lars Laszlo Leila Lena Liam Lior "
    "Lotte Lucia Luis "
    "Magda Malik Manuel Marcel Maren Mariam Marek Mateo Matilda Maxine Mei Mila Mina Mohammed Nadia Naomi "
    "Natalia Nikhil "
    "Noah Nora Obi Olga Omar Oskar Paloma Pavel Pedro Petra Priya Quentin Rafael Rania Ravi Rebecca Renata "
    "Rosa Ruben Ruth "
    "Sabine Salma Samira Sanjay Santiago Selma Sergei Shreya Sofia Soren Stella Sunil Svetlana Tamar Tariq "
    "Tatiana Teresa "
    "Theo Thandi Tomas Tove Uma Ursula Valentina Vera Vikram Viola Wanda Wei Xavier Yara Yasmin Yosef Yuki "
    "Yusuf Zainab "
    "Zelda Zoe Zofia Bob Alice Tom Mike Jenny Kate Dave Sam Lisa Joe Emily Chris Jess Matt Rob Sue Ted Meg"
)
_FAMILY = words(
    "Abara Almeida Andersen Bauer Becker Bianchi Brandt Castillo Chaudhry Costa Dubois Eriksen Farah "
    "Ferrari Fischer "
    "Fontaine Garcia Gomes Haddad Hansen Hoffmann Horvat Ibanez Ito Jansen Jimenez Kapoor Kaya Keller Kim "
    "Kowalski Kruger "
    "Larsen Lehmann Lindqvist Lopez Marino Mensah Mitchell Moreau Mueller Nakamura Nguyen Novak Nowak "
    "Okafor Olsen Ortega "
    "Osei Papadakis Patel Pereira Petrov Quinn Rahman Ramos Reyes Ricci Rossi Sato Schmidt Silva Singh "
    "Sorensen Suzuki Tanaka "
    "Torres Van-Dyke Vasquez Vogel Wagner Walsh Weber Wright Yamada Yilmaz Zhang Zimmermann"
)
_ONSETS = words("b br c ch cr d dr f fl g gr h j k kr l m n p pr qu r s sh sk sl st t th tr v w y z")
_VOWELS = words("a e i o u a e i o ai ea ee ie oo ou")
_CODAS = ["", "", "", "", *words("b ck d l ll m n nd nn r rn rt s sk st t v x zz")]
_TOWN_ENDS = words(
    "ford ham ton wick bury dale field mouth port stead burg ville by minster haven gate bridge wood"
)
_TOWNS = words(
    "Aarhus Accra Adelaide Agadir Almaty Ankara Antwerp Austin Baku Bangkok Basel Bath Belgrade Bergen "
    "Bilbao Bogota Bologna "
    "Bordeaux Bremen Brighton Brno Bruges Bucharest Budapest Calgary Cardiff Casablanca Cologne Colombo "
    "Cordoba Cork Cracow "
    "Dakar Dresden Durban Edinburgh Faro Florence Fukuoka Gdansk Genoa Ghent Girona Graz Halifax Hamburg "
    "Hanoi Harbin Helsinki "
    "Innsbruck Izmir Jaipur Kampala Kyoto Lagos Lahore Leeds Leipzig Lima Limerick Ljubljana Lucerne "
    "Lusaka Malmo Marseille "
    "Medellin Melbourne Montreal Nagoya Nairobi Nantes Naples Nice Odessa Osaka Ottawa Oxford Palermo "
    "Perth Pisa Porto Quito "
    "Reykjavik Riga Rotterdam Salzburg Santiago Sapporo Seville Sofia Split Stavanger Tallinn Tampere "
    "Tbilisi Turin Utrecht "
    "Valencia Vancouver Verona Warsaw Wellington York Zagreb"
)
JOBS = parts(
    "glazier|tax adviser|bus driver|midwife|beekeeper|web designer|night porter|florist|crane operator"
    "|translator|chemist"
    "|park ranger|paramedic|piano tuner|data analyst|locksmith|vet|pastry chef|roofer|librarian|bookbinder"
    "|ski instructor"
    "|train driver|flight attendant|welder|cartographer|stage manager|tattoo artist|shepherd|brewer|coroner"
    "|sound engineer|potter|social worker|game designer|surveyor|speech therapist|butcher|journalist|fishmonger"
    "|pharmacist|wedding planner|goldsmith|postman|radio host|tour guide|cheesemaker|statistician|bartender"
)
FOODS = parts(
    "peanuts|shellfish|strawberries|celery|sesame|soy|walnuts|kiwi|mustard|eggs|gluten|mango|lupins"
    "|tomatoes|almonds|garlic"
    "|cow's milk|paprika|hazelnuts|squid|lentils|buckwheat|pineapple|cinnamon|penicillin|latex|cat hair"
    "|birch pollen|wasp stings"
    "|dust mites|aspirin|nickel|wool|goose feathers|ibuprofen|cashews|chickpeas|peaches|mushrooms|corn"
)
HOBBIES = parts(
    "bouldering|origami|birdwatching|fencing|baking sourdough|collecting stamps|playing the oboe|pottery"
    "|salsa dancing|chess"
    "|restoring clocks|surfing|embroidery|orienteering|astronomy|archery|calligraphy|judo|wood carving"
    "|kayaking|beekeeping"
    "|model trains|improv theatre|growing orchids|photography|caving|crosswords|darts|brewing beer|rowing"
    "|quilting|parkour"
)
DISHES = parts(
    "lasagne|pad thai|goulash|ramen|shakshuka|moussaka|tacos|pierogi|paella|biryani|borscht|gnocchi"
    "|falafel|dumplings|risotto"
    "|fish and chips|jollof rice|ratatouille|pho|schnitzel|feijoada|couscous|bibimbap|chili|pancakes|curry"
    "|ceviche|quiche"
)
COLOURS = parts(
    "red|dark blue|green|yellow|orange|purple|black|white|brown|pink|grey|silver|turquoise|beige|olive|maroon"
    "|gold|teal"
)
_PET_NAMES = words(
    "Miso Waffles Biscuit Nacho Pretzel Olive Mochi Tofu Maple Hazel Pickle Noodle Clover Sprout Juniper Socks "
    "Marble Pumpkin Cosmo Domino Figaro Gizmo Kiwi Nutmeg Pebbles Truffle Ziggy Bramble Cinder Echo"
)
THINGS = parts(
    "lamp|kettle|backpack|bicycle pump|desk chair|rain jacket|tent|drill|notebook|blender|headphones"
    "|umbrella|toaster|mirror"
    "|carpet|bookshelf|hammer|thermos|webcam|yoga mat|coffee grinder|watering can|ladder|suitcase"
    "|phone case|wok|candle|scarf"
    "|extension cord|paint roller|sleeping bag|keyboard|router|flashlight|fan|picture frame|cutting board"
    "|doormat|helmet"
)
GROCERIES = parts(
    "milk|eggs|flour|butter|rice|apples|bananas|onions|garlic|carrots|potatoes|yoghurt|coffee|tea|bread"
    "|cheese|olive oil|salt"
    "|sugar|tomatoes|spinach|chicken|tofu|pasta|lemons|honey|oats|lentils|peppers|cucumber|salmon|beans"
    "|soap|toilet paper|batteries"
    "|dog food|orange juice|basil|ginger|mushrooms|cream|almonds|dark chocolate|mineral water|dish soap"
    "|avocados|raisins"
)
CHORES = parts(
    "call the plumber|water the plants|pay the rent|return the library books|book the dentist"
    "|clean the oven|fix the bike"
    "|write the report|pick up the parcel|renew the passport|walk the dog|buy a birthday present"
    "|cancel the gym|wash the car"
    "|change the light bulb|answer the landlord|print the tickets|order new glasses|empty the bins"
    "|iron the shirts|mow the lawn"
    "|back up the laptop|send the invoice|sharpen the knives|update the slides|file the taxes"
    "|visit grandma|descale the kettle"
)
MONTHS = words("January February March April May June July August September October November December")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

_WHO = parts(
    "a careful assistant|a friendly assistant|a customer service agent of a phone company"
    "|a tutor for school children|an old sailor"
    "|a travel agent|a librarian|a doctor's receptionist|an expert on wine|a coach who motivates people"
    "|a grumpy neighbour"
    "|a pirate|a helper for people who learn English|a museum guide|a software engineer|a chef|a gardener"
    "|a good friend"
    "|the voice of a smart home|a poet|a historian|an insurance adviser|a game master|a radio presenter"
    "|a bookseller|a mechanic"
)
_NAMES = words("Nova Atlas Juno Echo Pixel Sage Orion Clio Mira Otto Ada Rufus")
_HOW = parts(
    "Answer briefly.|Be kind and patient.|Never make things up; say so when you do not know.|Use simple words."
    "|Remember what you are told and use it later.|Ask when something is unclear."
    "|Keep every answer below three sentences."
    "|Do not give medical advice.|Stay in character.|Speak like in a chat, without headings."
    "|Be polite, even if the user is not."
    "|If the user names a preference, stick to it.|Use humour where it fits.|Do not repeat yourself."
    "|Explain your reasons."
    "|Mention prices only when asked.|Always answer in English.|Finish with a question now and then."
    "|When numbers are asked for, give them exactly as they were told."
    "|Call the user by their name once you know it."
    "|Avoid politics.|Suggest a next step at the end.|Prefer lists to long paragraphs.|Do not use emojis."
)
_WHERE = parts(
    "The user has just moved to a new town."
    "|This is a conversation between friends who have not met for a while."
    "|The shop is open from 9 to 18, closed on Sundays.|You talk over the phone, so the text is read aloud."
    "|Two people who do not know each other are matched at random for a chat.|It is late in the evening."
    "|Your knowledge ends in 2023.|The user may come back to earlier topics at any time."
    "|Everything said stays between you two."
    "|You help with orders, returns and refunds; for everything else, point to the website."
)


def system_prompt(rng: random.Random) -> str:
    """A persona, instructions and circumstances; from a few words to a hundred."""
    who = rng.choice(_WHO)
    name = rng.choice(_NAMES)
    first = rng.choice(
        (
            f"You are {who}.",
            f"You are {name}, {who}.",
            f"Act as {who}.",
            f"Your name is {name}. You are {who}.",
            "",
        )
    )
    count = rng.choice((0, 1, 1, 2, 3, 6))
    rules = rng.sample(_HOW, count)
    where = rng.sample(_WHERE, rng.choice((0, 0, 1, 2)))
    if count > 2 and rng.random() < 0.5:
        body = "\n".join([*where, "Rules:", *(f"- {rule}" for rule in rules)])
        return f"{first}\n{body}".strip()
    return " ".join(filter(None, [first, *where, *rules])) or "You are a helpful assistant."


def rare(rng: random.Random, syllables: tuple[int, ...] = (2, 2, 3)) -> str:
    """A word that nobody has seen, with a capital."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice(syllables))]
    return ("".join(parts) + rng.choice(_CODAS)).capitalize()


def first_name(rng: random.Random) -> str:
    """Drawn from a pool, or put together."""
    return rare(rng) if rng.random() < 0.35 else rng.choice(FIRST_NAMES)


def full_name(rng: random.Random) -> str:
    """A first name and a family name."""
    family = rare(rng) if rng.random() < 0.3 else rng.choice(_FAMILY)
    return f"{first_name(rng)} {family}"


def pet_name(rng: random.Random) -> str:
    """Drawn from a pool, or put together."""
    if rng.random() < 0.6:
        return rare(rng, (1, 2, 2))
    return rng.choice(_PET_NAMES)


def town(rng: random.Random) -> str:
    """Drawn from a pool, or put together."""
    if rng.random() < 0.4:
        return rare(rng, (1, 1, 2)) + rng.choice(_TOWN_ENDS)
    return rng.choice(_TOWNS)


def digits(rng: random.Random, lengths: tuple[int, ...] = (3, 4, 5, 6)) -> str:
    """A whole number of one of these lengths, as text."""
    length = rng.choice(lengths)
    return str(rng.randrange(10 ** (length - 1), 10**length))


def code(rng: random.Random) -> str:
    """Letters and digits, such as "KX-482"."""
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    made = [
        rng.choice(letters if kind == "x" else "0123456789")
        for kind in rng.choice(("xx999", "x9x9", "9x99x", "xxx9999"))
    ]
    return "".join(made[:2]) + rng.choice(("", "-")) + "".join(made[2:])


def date(rng: random.Random) -> str:
    """In words, with a year or without."""
    day, month = rng.randrange(1, 29), rng.choice(MONTHS)
    return rng.choice((f"{day} {month}", f"{month} {day}", f"{month} {day}, {rng.randrange(1950, 2030)}"))


def iso_date(rng: random.Random) -> str:
    """As YYYY-MM-DD."""
    return f"{rng.randrange(2018, 2028)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"


def clock(rng: random.Random) -> str:
    """A time of day, as HH:MM."""
    return f"{rng.randrange(24):02}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02}"


def price(rng: random.Random) -> str:
    """With two digits behind the point."""
    return f"{rng.randrange(1, 900)}.{rng.choice((0, 25, 49, 50, 90, 95, 99)):02}"


def email(rng: random.Random) -> str:
    """Made from drawn names."""
    first, family, host = (make(rng).lower() for make in (first_name, rare, rare))
    return f"{first}.{family}@{host}.{rng.choice(('com', 'org', 'net', 'io'))}"
