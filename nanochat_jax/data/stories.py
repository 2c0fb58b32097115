"""Short stories and everyday sentences in simple English, made from a small world, with questions about it.

A `Cast` says who and what there is: names, kinds, pronouns, things, places. A plot or a scene (`stories.yaml`) is told
about one cast, so that its sentences agree with each other, and what is asked about it has one answer. There are more
than 10^9 casts for each plot, and some thousand ways to tell it.

    told = story(random.Random(0), {"hero": "Milo", "kind": "dog"})
    told.text, told.questions
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import yaml

from nanochat_jax.data.split import HELD_OUT, held_out

HERE = Path(__file__).parent
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}
ODD = 0.2  # share of what scenes state that may be any word
ALIKE = 0.5  # share of texts whose scenes are all of one kind
INVENTED = 0.15  # share of names that nobody has: a model that knows names by heart cannot take up a new one
DETERMINERS = ("a", "a", "the", "the", "some", "two", "his", "her", "my")
SHORTEST = 6  # sentences of a story


class Asked(NamedTuple):
    """A question about a text, its answer as a sentence, and the words in it that any right answer has."""

    question: str
    answer: str
    wanted: str


@dataclass(frozen=True)
class Told:
    """A text, and what can be asked about it."""

    text: str
    questions: tuple[Asked, ...]
    cast: "Cast"

    def slots(self) -> set[str]:
        """The slots that occur in the text."""
        return {slot for slot, said in self.cast.items() if said in self.text}


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
    lists = script()["lists"]
    parts = [rng.choice(lists["onset"]) + rng.choice("aeiou") for _ in range(syllables or rng.choice((1, 2, 2, 2, 3)))]
    return "".join(parts) + rng.choice(lists["coda"])


@cache
def common_words(test: bool) -> tuple[str, ...]:
    """The words that tests are about, or the others."""
    return tuple(w for w in sorted(set(chain(*words().values()))) if held_out(w, HELD_OUT) == test)


def any_word(rng: random.Random) -> str:
    """A common word that no test is about, an invented one, or the beginning of any word, often all of it, and the end
    of another, so that whatever pieces a vocabulary has are met."""
    kind = rng.random()
    if kind < 0.2:
        return invented(rng)
    if kind < 0.6:
        return rng.choice(common_words(False))
    while True:
        first, second = (rng.choice(common_words(rng.random() < 0.2)) for _ in range(2))
        begun = len(first) if rng.random() < 0.4 else rng.randint(1, len(first))
        word = (first[:begun] + second[rng.randint(0, len(second)) :])[:12]
        if word not in common_words(True):
            return word


def with_articles(text: str) -> str:
    """The text with "an" where "a" stands before a vowel."""
    return re.sub(r"\b([aA]) (?=[aeioAEIO]|u(?!ni))", r"\1n ", text)


def person(rng: random.Random, gender: str | None = None) -> tuple[str, str]:
    """(name, gender) of somebody."""
    gender = gender or rng.choice(("she", "he"))
    return (invented(rng).capitalize() if rng.random() < INVENTED else rng.choice(names(gender))), gender


def being(rng: random.Random, kind: str | None = None) -> tuple[str, str, str]:
    """(kind, name, gender) of a hero: a child, an animal, a king."""
    kind = kind or rng.choice(("girl", "boy", *rng.choices((*words()["animals"], *words()["people"]), k=4)))
    gender = gender_of(kind) or rng.choice(("she", "he"))
    if kind in words()["animals"] and rng.random() < 0.6:
        return kind, rng.choice(names("pets")), gender
    return kind, person(rng, gender)[0], gender


def draw_cast(rng: random.Random, given: dict[str, str] | None = None) -> Cast:
    """Who and what a story or scene is about; `given` slots are as asked for."""
    lists, known = script()["lists"], words()
    given = given or {}
    kind, hero, gender = being(rng, given.get("kind"))
    friend_kind, friend, friend_gender = being(rng)
    while friend == given.get("hero", hero) or friend_kind == given.get("kind", kind):
        friend_kind, friend, friend_gender = being(rng)
    cast = Cast({name: rng.choice(options) for name, options in lists.items()})
    cast["thing"], cast["thing2"] = rng.sample(known["things"], 2)
    cast["place"], cast["place2"], cast["place0"] = rng.sample(lists["place"], 3)
    cast |= _clause_slots(rng)
    cast["petname"] = rng.choice(names("pets"))
    cast |= {"hero": hero, "kind": kind, "friend": friend, "friend_kind": friend_kind}
    return Cast(cast | pronouns(gender) | pronouns(friend_gender, "f") | given)


def _clause_slots(rng: random.Random) -> dict[str, str]:
    """Subjects, verbs, objects and places, out of all words: what they are does not matter to who did what."""
    lists, known = script()["lists"], words()
    out = {"a": rng.choice(("a", "a", "the", "a nice", "an old")), "s": _subject(rng), "s2": _subject(rng)}
    for i in ("", "2"):
        noun, color, adjective = _noun(rng), rng.choice(lists["color"]), rng.choice(known["describing"])
        out |= {f"noun{i}": noun, f"color{i}": color, f"adj{i}": adjective, f"things{i}": f"{_noun(rng)}s"}
        described = f"{rng.choice((color, adjective))} {noun}" if rng.random() < 0.3 else noun
        out[f"o{i}"] = f"{rng.choice(DETERMINERS)} {described}"
        before = rng.choice(lists["before_place"])
        out[f"p{i}"] = f"{before} the {rng.choice((_noun(rng), rng.choice(known['places'])))}"
        out[f"t{i}"] = rng.choice(lists["when2"])
        out[f"thirds{i}"], out[f"third{i}"] = rng.choice(lists["habit"]).split("/")
    out["past"], out["base"] = rng.choice(lists["verb"]).split("/")
    out["ipast"], out["ibase"] = rng.choice(lists["iverb"]).split("/")
    return out


def _subject(rng: random.Random) -> str:
    """Anybody."""
    kind = rng.choice(words()["animals"] + words()["people"])
    return rng.choice((person(rng)[0], person(rng)[0], rng.choice(script()["lists"]["somebody"]), f"the {kind}"))


def _noun(rng: random.Random) -> str:
    """Anything, also what there is not."""
    if rng.random() < 0.2:
        return invented(rng)
    return rng.choice(words()[rng.choice(("things", "things", "foods", "animals", "nature", "others"))])


def pronouns(gender: str, whose: str = "") -> dict[str, str]:
    """The slots he, him, his; whose: "f" for those of the friend."""
    return {f"{whose}{slot}": word for slot, word in zip(("he", "him", "his"), PRONOUNS[gender])}


def gender_of(kind: str) -> str | None:
    """she or he where a kind of person says it."""
    return next((gender for gender, kinds in script()["genders"].items() if kind in kinds.split()), None)


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


def scenes(rng: random.Random, count: int) -> list[Told]:
    """Each one or two sentences that state something; often all of one kind, told apart only by whom and what a
    question names."""
    kinds = script()["scenes"]
    chosen = [rng.choice(kinds)] * count if rng.random() < ALIKE else rng.choices(kinds, k=count)
    casts, out = [_scene_cast(rng) for _ in chosen], []
    for kind, cast in zip(chosen, casts):
        others = [c for k, c in zip(chosen, casts) if k is kind and c is not cast]
        out.append(Told(cast.fill(rng.choice(kind["say"])), _questions(rng, kind["ask"], cast, others), cast))
    return out if any(told.questions for told in out) else scenes(rng, count)


def _scene_cast(rng: random.Random) -> Cast:
    """A part of its slots are any word, however odd: an answer is to be found in the text, not among usual answers."""
    (hero, gender), (friend, friend_gender) = person(rng), person(rng)
    cast = draw_cast(rng, {"hero": hero, "friend": friend} | pronouns(gender) | pronouns(friend_gender, "f"))
    odd = {slot: _noun(rng) for slot in ("place", "place2", "pet", "job", "thing", "thing2")}
    odd |= {slot: rng.choice(words()["describing"]) for slot in ("color", "color2", "bad", "good", "weather")}
    odd |= {"town": invented(rng).capitalize(), "petname": invented(rng).capitalize(), "food": f"some {_noun(rng)}"}
    odd |= {"reason": f"the {_noun(rng)} was {cast['adj']}", "spot": cast["p"], "when": cast["t2"]}
    return Cast(cast | {slot: text for slot, text in odd.items() if rng.random() < ODD})


def _questions(rng: random.Random, asked: list, cast: Cast, others: Sequence[Cast] = ()) -> tuple[Asked, ...]:
    """One of each kind, which is not also one about the other casts."""
    out = []
    for wordings, answer in asked:
        questions = [q for w in wordings if (q := cast.fill(w)) not in (other.fill(w) for other in others)]
        before, wanted, after = re.split(r"[\[\]]", cast.fill(answer))
        whole = f"{before}{wanted}{after}"
        if questions:
            out.append(Asked(rng.choice(questions), whole[0].upper() + whole[1:], wanted))
    return tuple(out)


@cache
def _patterns() -> tuple[re.Pattern, ...]:
    """One for each sentence that a story may hold."""
    told = script()
    sentences = {*told["openings"], *told["endings"], *(w for p in told["plots"] for beat in p["beats"] for w in beat)}
    slots = (re.sub(r"\\{\w+\\}", r"([A-Za-z' ]{1,40})", re.escape(s)) for s in sorted(sentences))
    return tuple(re.compile(re.sub(r"\b([aA])\\ \(", r"\1n?\\ (", slot)) for slot in slots)


def problems(text: str, given: dict[str, str]) -> list[str]:
    """What is wrong with a story that was asked for with `given` slots: sentences that are none of ours, what was asked
    for and does not occur, and a hero or friend who changes."""
    out, rest, sentences = [], text.strip(), 0
    while rest:
        ends = (m.end() for p in _patterns() if (m := p.match(rest)))
        found = max((end for end in ends if rest[end : end + 1] in " "), default=0)
        if not found:
            out.append(f"no sentence of ours: {rest.split('. ')[0]}")
            break
        rest, sentences = rest[found:].lstrip(), sentences + 1
    out += [f"{sentences} sentences"] if sentences < SHORTEST and not out else []
    out += [f"{slot} {value} does not occur" for slot, value in given.items() if value.lower() not in text.lower()]
    named = re.findall(r"(?<![.!?\"] )(?<!^)(?<!\")\b[A-Z][a-z]+", text)
    others = set(named) - {*given.values(), "I", *script()["lists"]["day"]}
    if len(others) > 2 - sum(slot in given for slot in ("hero", "friend")):
        out.append(f"too many names: {', '.join(sorted(others))}")
    return out
