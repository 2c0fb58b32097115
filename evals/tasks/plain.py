"""What the demo's model is taught, in the words of people: sums, letters, spelling, word problems, what a text states,
itself, what it cannot know, and stories; and conversations that go from one of these to another.

`phrases.yaml` and `self.yaml` hold the wordings. Every question comes with a check (`checks.py`), so that each kind is
also a task with a score. Test questions do not occur in training, nor do the words that they are about.
"""

import random
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache

from evals.tasks.base import Generated, dialogue, read_yaml
from evals.tasks.checks import NUMBERS, Checked
from evals.tasks.gsm8k import parse_parts
from nanochat_jax.data import stories
from nanochat_jax.engine.calculator import use_calculator

Exchange = tuple[str, str, dict]  # a question, its answer with <<calls=results>>, and the check of an answer

TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS = dict(enumerate(NUMBERS)) | {10 * tens: word for tens, word in enumerate(TENS, 2)}
COURTEOUS = {"before": 0.3, "after": 0.2}  # shares of questions with a word of courtesy there
COMPOSED = 0.5  # share of word problems that are put together of pieces
SLOTS = {"t": "things", "box": "boxes", "people": "people", "animals": "animals", "room": "rooms"}
_LEADING = re.compile("^(?:(?:in|to|on|at|for|because|a|an|the|some) )*")  # words of an answer


def phrases() -> dict:
    return read_yaml("phrases.yaml")


@cache
def about() -> tuple[tuple[tuple[str, ...], str, dict], ...]:
    """(what people say, the answer, its check) of self.yaml."""
    return tuple((tuple(e["say"].split(", ")), e["answer"], e["check"]) for e in read_yaml("self.yaml"))


def common(rng: random.Random, wordings: Sequence):
    """One of the wordings, of which the usual ones come first (Zipf's law, in Mandelbrot's form)."""
    return rng.choices(wordings, [1 / (30 + rank) for rank in range(len(wordings))])[0]


def typed(rng: random.Random, text: str) -> str:
    """The text as somebody may type it: with or without a greeting, a capital, a mark at the end."""
    courtesies = phrases()["courtesies"]
    bare, asked = text.rstrip("?.!"), text.endswith("?") or re.match("(wh|how|can|do|are|is)", text.lower())
    before, after = (rng.choice(courtesies[w]) if rng.random() < share else "" for w, share in COURTEOUS.items())
    style = rng.random()
    if style < 0.45 and not before:
        bare = bare[0].upper() + bare[1:]
    elif style > 0.9:
        bare = bare.lower()
    mark = "" if rng.random() < 0.4 else ("?" if asked and rng.random() < 0.9 else rng.choice((".", "", "!", "?")))
    whole = before + bare + after
    if style < 0.45:
        whole = whole[0].upper() + whole[1:]
    return whole + mark


def calculated(expression: str) -> tuple[str, str]:
    """(the call with its result, the number to say, of at most two decimals)."""
    result = use_calculator(expression)
    if result is None:
        raise ValueError(f"the calculator refuses {expression}")
    return f"<<{expression}={result}>>", f"{float(result):.2f}".rstrip("0").rstrip(".")


class _Kind(Checked, Generated):
    kind = "generative"
    sizes = {"train": 100_000, "test": 400}


class Plain(_Kind):
    """A kind of questions: ask(rng) -> Exchange."""

    @abstractmethod
    def ask(self, rng: random.Random) -> Exchange: ...

    def make(self, rng: random.Random) -> dict:
        question, answer, check = self.ask(rng)
        return dialogue(question, parse_parts(answer)) | {"check": check}


def _number(rng: random.Random, digits: int | None = None) -> int:
    digits = digits or rng.choice((1, 1, 2, 2, 2, 2, 3, 3))
    return rng.randint(10 ** (digits - 1) if digits > 1 else 1, 10**digits - 1) * (rng.random() > 0.01)


def _said(rng: random.Random, number: int, words: bool) -> str:
    """A number in digits or, where it is below a hundred and `words`, mostly in words."""
    if not words or number > 99 or rng.random() < 0.25:
        return str(number)
    tens, units = divmod(number, 10)
    return NUMBER_WORDS.get(number) or f"{NUMBER_WORDS[10 * tens]}{rng.choice(' -')}{NUMBER_WORDS[units]}"


def draw_numbers(rng: random.Random, sign: str, small: bool = False) -> tuple[int, int]:
    """(a, b) for a sum: differences are not negative, and quotients mostly whole."""
    a, b = _number(rng), _number(rng)
    if sign == "-":
        return max(a, b) + (a == b), min(a, b)
    if sign == "*":
        return _number(rng, rng.choice((1, 1, 2, 2, 3))), _number(rng, rng.choice((1, 1, 2)))
    if sign == "/":
        b = rng.randint(2, 12) if rng.random() < 0.7 else rng.randint(2, 40)
        if rng.random() < 0.1 and not small:
            return _number(rng, 2), rng.choice((2, 4, 5, 10, 3, 6, 7, 8))
        return b * rng.randint(2, 30 if b <= 12 else 12), b
    return a, b


class Sums(Plain):
    """Sums of all four kinds, in figures and in words, by the calculator."""

    name = "sums"

    def ask(self, rng: random.Random) -> Exchange:
        wordings = phrases()["sums"]
        kind = rng.choices(("+", "-", "*", "/", "unary", "three"), (22, 22, 22, 22, 8, 4))[0]
        numbers = [_number(rng), _number(rng, 1), _number(rng, 1)]
        if kind in "+-*/":
            a, b = draw_numbers(rng, kind)
            expression, wording = f"{a}{kind}{b}", common(rng, wordings[kind])
            numbers = [a, b]
        else:
            template, asked = common(rng, list(wordings[kind].items()))
            wording = common(rng, asked)
            if "/" in template:
                numbers[0] *= int(template[-1])
            if template[-4:] == "-{c}":
                numbers[0] += 10
            expression = template.format(**dict(zip("abc", numbers)))
        in_words = rng.random() < 0.2
        slots = dict(zip("abc", (_said(rng, n, in_words) for n in numbers)))
        call, result = calculated(expression)
        question = typed(rng, wording.format(**slots))
        return question, f"{call}{phrases()['answers']['sum'].format(result=result)}", {"number": float(result)}


class Arithmetic(Plain):
    """Word problems of one or two steps."""

    name = "arithmetic"

    def ask(self, rng: random.Random) -> Exchange:
        known, kind = phrases(), rng.choices(("+", "-", "*", "/", "two"), (4, 4, 4, 4, 4))[0]
        wordings = known["composed" if rng.random() < COMPOSED else "problems"][kind]
        if kind == "two":
            a, b, c = rng.randint(2, 9), rng.randint(2, 12), rng.randint(1, 9)
            a += c if a * b <= c else 0
            d = rng.randint(a * b + c + 1, a * b + 130)
            template, asked = rng.choices(list(wordings.items()), [len(w) for w in wordings.values()])[0]
            d *= 2 if "/2" in template else 1
            wording, expression = rng.choice(asked), template.format(a=a, b=b, c=c, d=d)
        else:
            (a, b), c, d = draw_numbers(rng, kind, small=True), 0, 0
            if kind in "+-" and rng.random() < 0.85:
                b = rng.randint(2, 30)
                a = rng.randint(b + 1, 99)
            wording = rng.choice(wordings)
            if wording.startswith("A week has"):
                b = 7
            expression = f"{a}{kind}{b}"
        wording = re.sub(r"<(\w+)>", lambda piece: rng.choice(known["pieces"][piece[1]]), wording)
        in_words = rng.random() < 0.15
        numbers = {n: _said(rng, v, in_words) for n, v in zip("abcd", (a, b, c, d))}
        question = typed(rng, _fill_problem(rng, wording, numbers))
        call, result = calculated(expression)
        return question, f"{call}{known['answers']['sum'].format(result=result)}", {"number": float(result)}


def _fill_problem(rng: random.Random, wording: str, numbers: dict[str, str]) -> str:
    known, lists = phrases(), stories.script()["lists"]
    (name, gender), (other, _) = stories.person(rng), stories.person(rng)
    slots = {name: rng.choice(known[of]) for name, of in SLOTS.items()} | stories.pronouns(gender) | numbers
    slots |= {f"verb_{tense}": rng.choice(verbs) for tense, verbs in known["verbs"].items()}
    slots |= {"n": name, "m": other, "place": rng.choice(lists["place"])}
    slots["box_"] = slots["box"].replace("box", "boxe").replace("shelf", "shelve")
    slots["does"], slots["do"], slots["unit"] = rng.choice(known["doing"]).split("/")
    slots["period"] = rng.choice(known["periods"])
    slots["day"], slots["day2"] = rng.sample(lists["day"], 2)
    slots["thing"], slots["thing2"] = rng.sample(stories.words()["things"], 2)
    slots |= {"thing_": slots["thing"], "person": slots["people"]}
    return stories.Cast(slots).fill(wording)


class _OnWords(Plain):
    """Questions about a word: in tests a common one that training does not ask about."""

    split_by_text = False  # but by the word

    def _word(self, rng: random.Random) -> tuple[str, str]:
        """(the word as it is to be answered, and as it stands in the question)."""
        word = stories.any_word(rng) if self.split == "train" else rng.choice(stories.common_words(True))
        shown, style = word, rng.random()
        if style < 0.08:
            word = shown = word.upper()
        elif style < 0.2:
            shown = word.capitalize()
        quote = rng.choice(("", "", "", "", "", "'", '"'))
        before = "the word " if rng.random() < 0.2 else ""
        return word, f"{before}{quote}{shown}{quote}"


class Letters(_OnWords):
    """How often a letter stands in a word, how many letters it has, its first and its last."""

    name = "letters"

    def ask(self, rng: random.Random) -> Exchange:
        known, answers = phrases()["letters"], phrases()["answers"]
        kind = rng.choices(("count", "length", "first", "last"), (10, 4, 2, 2))[0]
        word, shown = self._word(rng)
        wording = common(rng, known[kind])
        if "the word {w}" in wording:
            shown = shown.removeprefix("the word ")
        if kind == "count":
            letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
            if word.isupper():
                letter = letter.upper()
            asked = letter.upper() if rng.random() < 0.1 else letter
            if word.isupper() and rng.random() < 0.5:
                asked = letter.lower()
            quote = rng.choice(("", "", "", "'", '"'))
            call, result = calculated(f"'{word}'.count('{letter}')")
            answer = answers["once" if result == "1" else "count"].format(l=letter, result=result)
            question = wording.format(w=shown, l=f"{quote}{asked}{quote}")
            return typed(rng, question), call + answer, {"number": float(result)}
        question = typed(rng, wording.format(w=shown))
        if kind == "length":
            call, result = calculated(f"len('{word}')")
            return question, call + answers[kind].format(result=result), {"number": float(result)}
        letter = word[0] if kind == "first" else word[-1]
        return question, answers[kind].format(l=letter), {"any": [letter.lower()]}


class Spell(_OnWords):
    """A word, letter by letter, also backwards."""

    name = "spell"

    def ask(self, rng: random.Random) -> Exchange:
        word, shown = self._word(rng)
        kind = "backward" if rng.random() < 0.05 else "forward"
        wording = common(rng, phrases()["spelling"][kind])
        if "the word {w}" in wording:
            shown = shown.removeprefix("the word ")
        letters = f"The word {word}: {' '.join(word)}"
        answer, wanted = letters, word
        if kind == "backward":
            answer, wanted = f"{letters}, backwards: {' '.join(word[::-1])}", word[::-1]
        return typed(rng, wording.format(w=shown)), answer, {"spelled": wanted.lower()}


class Reading(_Kind):
    """Some sentences, and a question that one of them answers; in training often more of them, in turn."""

    name = "reading"

    def make(self, rng: random.Random) -> dict:
        told = [stories.story(rng)]
        if rng.random() > 0.05:
            told = stories.scenes(rng, rng.choice((1, 1, 2, 2, 2, 3)))
        text, known = " ".join(t.text for t in told), [asked for t in told for asked in t.questions]
        asked = rng.sample(known, min(len(known), rng.choice((1, 1, 2, 3)) if self.split == "train" else 1))
        if rng.random() < 0.2:  # names are then written as they were asked about
            text, asked = text.lower(), [stories.Asked(*map(str.lower, a)) for a in asked]
        first, *others = (_marked(rng, a.question) for a in asked)
        said = [self._introduced(rng, text, first), asked[0].answer]
        said += [part for question, a in zip(others, asked[1:]) for part in (question, a.answer)]
        wanted = asked[-1].wanted.lower()
        return dialogue(*said) | {"check": {"any": [_LEADING.sub("", wanted)]}}

    def _introduced(self, rng: random.Random, text: str, question: str) -> str:
        if rng.random() < 0.1:
            text = text.rstrip(".") + rng.choice((",", "", " -"))
        before = rng.choice(("", "", "", "", "", "Read this: ", "Text: ", "ok, ", "here is a text. ", "listen: "))
        joined = rng.choice((" ", " ", " ", "\n", " Question: ", " tell me, "))
        return f"{before}{text}{joined}{question}"


def _marked(rng: random.Random, question: str) -> str:
    return question.rstrip("?") + ("?" if rng.random() < 0.6 else "")


class Self(Plain):
    """Itself, greetings, and what it cannot know."""

    name = "self"
    split_by_text = False  # there are too few wordings to keep some for testing
    words = {"animal": "animals", "person": "people", "thing": "things"}  # slot -> subject of the words for it

    def ask(self, rng: random.Random) -> Exchange:
        weights = [len(say) ** 0.5 for say, *_ in about()]
        say, answer, check = rng.choices(about(), weights)[0]
        known, lists = stories.words(), stories.script()["lists"]
        wording = common(rng, say)
        nouns = known["nature"] + known["others"] + known["foods"] + known["animals"] + known["things"]
        slots = {slot: rng.choice(known[of]) for slot, of in self.words.items()} | {"noun": rng.choice(nouns)}
        slots |= {"adjective": rng.choice(known["describing"]), "name": stories.person(rng)[0]}
        slots |= {slot: rng.choice(lists[slot]) for slot in ("place", "food")}
        slots |= {slot: stories.invented(rng).capitalize() for slot in ("town", "country")}
        if rng.random() < 0.7:
            slots |= {"town": rng.choice(lists["town"]), "country": rng.choice(lists["country"])}
        text = wording.format(**slots)
        return typed(rng, stories.with_articles(text)), answer, check


class Story(Plain):
    """A story with the names and things that somebody asks for."""

    name = "story"
    sizes = {"train": 100_000, "test": 100}  # each takes as long as five others

    def ask(self, rng: random.Random) -> Exchange:
        wordings = phrases()["requests"]
        wording = rng.choices(wordings, [1 + 5 * w.count("{") for w in wordings])[0]
        cast = stories.draw_cast(rng)
        if rng.random() < 0.4:
            cast["hero"] = stories.invented(rng, rng.choice((2, 2, 3))).capitalize()
        slots = re.findall(r"{(\w+)}", wording)
        given = {slot: cast[slot] for slot in dict.fromkeys(slots)}
        if "kind" in given:
            given |= {slot: cast[slot] for slot in ("he", "him", "his")}
        told = stories.story(rng, given)
        request = typed(rng, stories.with_articles(wording.format(**given)))
        return request, told.text, {"story": {s: given[s] for s in given if s in slots}}


_MADE = Sums, Arithmetic, Letters, Spell, Reading, Self, Story
KINDS: dict[str, Callable[[str], _Kind]] = {task.name: task for task in _MADE}
# of the exchanges in a conversation
SHARES = {"sums": 14, "arithmetic": 30, "letters": 14, "spell": 12, "reading": 20, "self": 24, "story": 1}


class Talk(Checked, Generated):
    """One to four exchanges of any kinds, one after another; the check is that of the last."""

    name, kind = "talk", "generative"
    sizes = {"train": 400_000, "test": 400}
    split_by_text = False  # but every exchange by its own

    def __init__(self, split: str):
        super().__init__(split)
        self._kinds = {name: kind(split) for name, kind in KINDS.items()}

    def make(self, rng: random.Random) -> dict:
        names = rng.choices(list(SHARES), list(SHARES.values()), k=rng.choice((1, 1, 1, 2, 2, 3, 3, 4)))
        drawn = [self._kinds[name].draw(rng) for name in names]
        return {"messages": [m for c in drawn for m in c["messages"]], "check": drawn[-1]["check"]}
