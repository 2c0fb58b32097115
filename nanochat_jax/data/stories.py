"""Short stories and everyday sentences in simple English, made from a small world, with questions about it.

A `Cast` says who and what there is: names, kinds, pronouns, things, places. A plot or a scene (`stories.yaml`) is told
about one cast, so that its sentences agree with each other, and what is asked about it has one answer. There are more
than 10^9 casts for each plot, and some thousand ways to tell it.

    told = story(random.Random(0), name="Milo", kind="dog")
    told.text, told.questions
"""

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

HERE = Path(__file__).parent
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}
INVENTED = 0.35  # share of names that nobody has: a model that knows names by heart cannot take up a new one
_SYLLABLES = [c + v for c in "b d f g h j k l m n p r s t v w z ch sh th br dr gr kr st tr pl".split() for v in "aeiou"]
_CODAS = ["", "", "", "n", "l", "r", "s", "t", "m", "x", "ck", "ng", "nd"]


@dataclass(frozen=True)
class Told:
    """A text, and what can be asked about it: pairs of question and answer."""

    text: str
    questions: tuple[tuple[str, str], ...]
    cast: "Cast"


class Cast(dict):
    """Slots by name; a slot written with a capital gives its text with one."""

    def __missing__(self, slot: str) -> str:
        text = self[slot[0].lower() + slot[1:]]
        return text[0].upper() + text[1:]

    def fill(self, template: str) -> str:
        return with_articles(template.format_map(self))


@cache
def words() -> dict[str, tuple[str, ...]]:
    """Common words by subject, from words.txt."""
    out: dict[str, list[str]] = {}
    for line in (HERE / "words.txt").read_text(encoding="utf-8").splitlines():
        if line.endswith(":"):
            current = out.setdefault(line[:-1], [])
        elif not line.startswith("#"):
            current += line.split()
    return {subject: tuple(dict.fromkeys(found)) for subject, found in out.items()}


@cache
def script() -> dict:
    """stories.yaml."""
    return yaml.load((HERE / "stories.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)


@cache
def names(which: str) -> tuple[str, ...]:
    """she | he | pets."""
    return tuple(script()["names"][which].split())


def invented(rng: random.Random, syllables: int = 0) -> str:
    """A word that sounds like one and is none."""
    parts = [rng.choice(_SYLLABLES) for _ in range(syllables or rng.choice((1, 2, 2, 2, 3)))]
    return "".join(parts) + rng.choice(_CODAS)


def with_articles(text: str) -> str:
    """The text with "an" where "a" stands before a vowel."""
    return re.sub(r"\b([aA]) (?=[aeioAEIO]|u(?!ni))", r"\1n ", text)


def person(rng: random.Random, gender: str | None = None) -> tuple[str, str]:
    """(name, gender) of somebody."""
    gender = gender or rng.choice(("she", "he"))
    return (invented(rng).capitalize() if rng.random() < INVENTED else rng.choice(names(gender))), gender


def being(rng: random.Random) -> tuple[str, str, str]:
    """(kind, name, gender) of a hero: a child, an animal, a king."""
    kind = rng.choice(("girl", "boy", *rng.choices((*words()["animals"], *words()["people"]), k=4)))
    gender = {"girl": "she", "boy": "he"}.get(kind) or rng.choice(("she", "he"))
    if kind in words()["animals"] and rng.random() < 0.6:
        return kind, rng.choice(names("pets")), gender
    return kind, person(rng, gender)[0], gender


def draw_cast(rng: random.Random, given: dict[str, str] | None = None) -> Cast:
    """Who and what a story or scene is about; `given` slots are as asked for."""
    lists, known = script()["lists"], words()
    given = given or {}
    kind, hero, gender = being(rng)
    if "kind" in given:
        gender = gender_of(given["kind"]) or gender
    friend_kind, friend, friend_gender = being(rng)
    while friend == given.get("hero", hero) or friend_kind == given.get("kind", kind):
        friend_kind, friend, friend_gender = being(rng)
    cast = Cast({name: rng.choice(options) for name, options in lists.items()})
    cast["thing"], cast["thing2"] = rng.sample(known["things"], 2)
    cast["place"], cast["place2"], cast["place0"] = rng.sample(lists["place"], 3)
    cast["petname"] = rng.choice(names("pets"))
    cast |= {"hero": hero, "kind": kind, "friend": friend, "friend_kind": friend_kind}
    cast |= dict(zip(("he", "him", "his"), PRONOUNS[gender]))
    cast |= dict(zip(("fhe", "fhim", "fhis"), PRONOUNS[friend_gender]))
    return Cast(cast | given)


def gender_of(kind: str) -> str | None:
    """she or he where a kind of person says it."""
    female = {"girl", "woman", "lady", "queen", "princess", "witch", "mother", "grandmother", "sister", "aunt", "fairy"}
    male = {"boy", "man", "king", "prince", "wizard", "father", "grandfather", "brother", "uncle", "policeman", "fireman"}
    return "she" if kind in female else "he" if kind in male else None


def story(rng: random.Random, given: dict[str, str] | None = None) -> Told:
    """A story in which all the `given` slots occur: hero, kind, thing, friend, friend_kind, place."""
    while True:
        plot, cast = rng.choice(script()["plots"]), draw_cast(rng, given)
        sentences = [rng.choice(script()["openings"]), *map(rng.choice, plot["beats"])]
        if rng.random() < 0.6:
            sentences.append(rng.choice(script()["endings"]))
        text = cast.fill(" ".join(sentences))
        if all(value in text for value in (given or {}).values()):
            return Told(text, _questions(rng, plot["ask"], cast), cast)


def scene(rng: random.Random) -> Told:
    """One or two sentences that state something."""
    found = rng.choice(script()["scenes"])
    cast = draw_cast(rng)
    if rng.random() < 0.3:
        cast["thing"] = rng.choice(words()["foods"] + words()["animals"])
    return Told(cast.fill(rng.choice(found["say"])), _questions(rng, found["ask"], cast), cast)


def _questions(rng: random.Random, asked: list, cast: Cast) -> tuple[tuple[str, str], ...]:
    return tuple((cast.fill(rng.choice(wordings)), cast.fill(answer)) for wordings, answer in asked)


@cache
def _patterns() -> tuple[re.Pattern, ...]:
    """One for each sentence that a story may hold."""
    told = script()
    sentences = {*told["openings"], *told["endings"], *(w for p in told["plots"] for beat in p["beats"] for w in beat)}
    slots = (re.sub(r"\\{\w+\\}", r"([\\w' ]{1,40})", re.escape(s)) for s in sorted(sentences))
    return tuple(re.compile(re.sub(r"\b([aA])\\ \(", r"\1n?\\ (", slot)) for slot in slots)


def problems(text: str, given: dict[str, str]) -> list[str]:
    """What is wrong with a story that was asked for with `given` slots: sentences that are none of ours, what was asked
    for and does not occur, and a hero or friend who changes."""
    out, rest = [], text.strip()
    while rest:
        found = max((m.end() for p in _patterns() if (m := p.match(rest)) and rest[m.end() : m.end() + 1] in " "), default=0)
        if not found:
            out.append(f"no sentence of ours: {rest.split('. ')[0]}")
            break
        rest = rest[found:].lstrip()
    out += [f"{slot} {value} does not occur" for slot, value in given.items() if value.lower() not in text.lower()]
    named = re.findall(r"(?<![.!?\"] )(?<!^)(?<!\")\b[A-Z][a-z]+", text)
    others = set(named) - {*given.values(), "I", *script()["lists"]["day"]}
    if len(others) > 2 - sum(slot in given for slot in ("hero", "friend")):
        out.append(f"too many names: {', '.join(sorted(others))}")
    return out
