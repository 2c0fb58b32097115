"""Tools that a caller gives: which one to call and how, what to say of what it gives, and when to call none.

`tools.yaml` says what tools there are. Those of the test split are other ones, by name and by kind, than those that the
model learns from: there it mostly meets tools about any word at all, so that it has to read their signatures.

A conversation has the signatures in its system message, `functions`, `calls` (those that are wanted, with what comes of
each) and a check of the answer. Calls are compared by value, strings without regard to case.
"""

import itertools
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from evals.sandbox import run_program
from evals.tasks.base import Generated, dialogue, read_yaml, visible
from evals.tasks.checks import NUMBERS, Checked, holds
from evals.tasks.plain import KINDS, typed
from nanochat_jax.chats import system_text
from nanochat_jax.data import stories
from nanochat_jax.engine.dialogue import Caller
from nanochat_jax.engine.tools import name_of
from nanochat_jax.signatures import call_text, is_plain_name, read_call

WANTED = {  # shares of the questions
    "train": {"one call": 34, "two calls": 11, "failing": 5, "none": 18, "another tool": 32},
    "test": {"one call": 48, "two calls": 14, "failing": 6, "none": 20, "another tool": 12},
}
ANNOUNCED = 0.95  # share of calls before which is said what they are about: where a call is forced, nothing is said
SENDER, SENDING = ("person", "text"), 0.15  # slots of a tool that sends a text to somebody; share of prompts with one
ORDINARY = ("sums", "arithmetic", "letters", "spell", "self")  # kinds of questions that no tool is needed for
TYPES = {"count": "integer", "hour": "integer", "size": "number", "state": "boolean"}  # of slots; of others, strings
SCHEMAS: dict[str, dict] = {slot: {"type": type} for slot, type in TYPES.items()}
SCHEMAS |= dict.fromkeys(("people", "things"), {"type": "array", "items": {"type": "string"}})
_PERSON = {"name": {"type": "string"}, "city": {"type": "string"}}
SCHEMAS["somebody"] = {"type": "object", "properties": _PERSON, "required": ["name", "city"]}
COMPOSED, ODD_KEYS = 0.75, 0.3  # shares of training tools about any word, and of parameters that are named so
COMMON = {"get", "find", "set", "do", "show"}  # words that names may have in common
SECONDS = 5.0  # that a program may take
DESCRIBED, PARAMETERS_DESCRIBED, OPTIONAL = 0.5, 0.1, 0.15  # shares of tools with a docstring, and so on


@dataclass(frozen=True)
class Tool:
    """A function of a kind (an entry of tools.yaml), made of words."""

    kind: Mapping
    words: dict[str, str]
    function: dict
    keys: dict[str, str]  # slot -> parameter
    factor: float  # by which a number is multiplied, of a tool that is a program

    @property
    def about(self) -> str:
        """The word that its name is about."""
        return self.words["v" if self.kind["names"][0][:3] == "{v}" else "n"]

    @property
    def name(self) -> str:
        return self.function["name"]

    @property
    def program(self) -> str:
        """The source of its function; empty where what it gives is made up."""
        if tuple(self.keys) != ("size",):
            return ""
        return f"def {self.name}({self.keys['size']}):\n    return round({self.keys['size']} * {self.factor}, 2)"


@dataclass(frozen=True)
class Use:
    """A question that a tool answers."""

    tool: Tool
    question: str
    arguments: dict
    result: str
    value: str  # of the result, which has to be in the answer
    answer: str
    noun: str  # what was asked for, as a part of another question; "" where it cannot be

    @property
    def announced(self) -> str:
        """What it is about, in the question's word, which comes last: to look for it among names is easy then, even for
        a model of a million parameters, and whether to call at all is known where it is found."""
        names = re.findall("[a-z]+", re.sub("[A-Z]", lambda capital: f"_{capital[0].lower()}", self.tool.name))
        asked = re.findall("[a-z]+", self.question.lower())
        alike = [(len(os.path.commonprefix(pair)), pair[1]) for pair in itertools.product(names, asked)]
        longest, word = max(alike, key=lambda found: found[0], default=(0, ""))
        return read_yaml("tools.yaml")["announced"].format(word if longest > 2 else self.tool.about)

    @property
    def call(self) -> dict:
        return {"name": self.tool.name, "arguments": self.arguments, "result": self.result}


class Tools(Checked, Generated):
    name, kind = "tools", "generative"
    sizes = {"train": 200_000, "test": 400}
    split_by_text = False  # but by the tools

    def make(self, rng: random.Random) -> dict:
        """In training also several questions on the same tools, in turn; calls and check are those of the last one."""
        tools: dict[str, Tool] = {}
        for _ in range(rng.choice((1, 1, 2, 2, 3))):
            self._add(tools, self._tool(rng))
        if rng.random() < SENDING:
            self._add(tools, self._tool(rng, SENDER))
        said, shares = list[Any](), WANTED[self.split]
        turns = rng.choice((1, 2, 2, 3, 3)) if self.split == "train" else 1
        for wanted in rng.choices(list(shares), list(shares.values()), k=turns):
            question, calls, answer, check = self._exchange(rng, tools, wanted)
            said += question, answer
        functions = [tool.function for tool in tools.values()]
        rng.shuffle(functions)
        system = {"role": "system", "content": system_text(functions, False)}
        messages = [system, *dialogue(*said)["messages"]]
        programs = {tool.name: tool.program for tool in tools.values() if tool.program}
        return {"messages": messages, "functions": functions, "calls": calls, "check": check, "programs": programs}

    def _add(self, tools: dict[str, Tool], tool: Tool) -> bool:
        """Whether a tool joins others: it does unless its name has a word in common with theirs."""
        alike = any(_words_of(tool) & _words_of(other) for other in tools.values())
        if not alike:
            tools[tool.name] = tool
        return not alike

    def _tool(self, rng: random.Random, slots: Sequence[str] = ()) -> Tool:
        """A tool of the split, with these slots where there are any."""
        known = read_yaml("tools.yaml")
        kinds = known["held_out"]
        if self.split == "train":
            kinds = known["frames" if rng.random() < COMPOSED else "kinds"]
        fit = [kind for kind in kinds if not slots or tuple(kind["params"]) == tuple(slots)]
        return draw_tool(rng, rng.choice(fit), self.split) if fit else self._tool(rng, slots)

    def _exchange(self, rng: random.Random, tools: dict[str, Tool], wanted: str) -> tuple[str, list[dict], Any, dict]:
        """(question, calls, answer, check)"""
        known = read_yaml("tools.yaml")
        if wanted == "none":
            drawn = KINDS[rng.choice(ORDINARY)](self.split).draw(rng)
            question, answer = (m["content"] for m in drawn["messages"])
            return question, [], answer, drawn["check"]
        if wanted == "another tool":
            missing = self._tool(rng)
            while not self._add(dict(tools), missing):
                missing = self._tool(rng)
            use = use_of(rng, missing, self.split)
            return use.question, [], use.announced + known["no_tool"], {"any": ["no tool"]}
        fit = [t for t in tools.values() if wanted != "two calls" or "noun" in t.kind] or list(tools.values())
        use = use_of(rng, rng.choice(fit), self.split)
        announced = rng.random() < ANNOUNCED
        if wanted == "failing" and not use.tool.program:
            why = rng.choice(known["failures"])
            call = use.call | {"result": rng.choice(("error: {}", "Error: {}", '{{"error": "{}"}}')).format(why)}
            answer = _answer(use, [call], known["failed"].format(why=why), announced)
            return use.question, [call], answer, {"all": [why]}
        if wanted != "two calls" or not use.noun:
            return use.question, [use.call], _answer(use, [use.call], use.answer, announced), {"all": [use.value]}
        sender = next((tool for tool in tools.values() if tuple(tool.keys) == SENDER), None)
        if sender is None or rng.random() < 0.3:
            other = use_of(rng, use.tool, self.split)
            question = typed(rng, rng.choice(known["both"]).format(use.noun, other.noun))
            calls, answer = [use.call, other.call], f"{use.answer} {other.answer}"
            return question, calls, _answer(use, calls, answer, announced), {"all": [use.value, other.value]}
        sent, (person, text) = use_of(rng, sender, self.split), sender.keys.values()
        call = sent.call | {"arguments": {person: sent.arguments[person], text: use.value}}
        wording = rng.choice(known["passed_on"])
        question = wording.format(person=sent.arguments[person], n=sender.words["n"], noun=use.noun)
        first, second = _answer(use, [use.call], "", announced), _answer(sent, [call], sent.answer, announced)
        if announced:
            second[0] = {"type": "text", "text": f" {second[0]['text']}"}
        return question, [use.call, call], first + second, {"all": [sent.value]}

    def caller(self, conversation: dict) -> Caller:
        """Runs a tool that is a program in the sandbox; others give what is prepared for a call that is wanted, else an
        error."""

        def act(call: str) -> str:
            if program := conversation["programs"].get(name_of(call)):
                return run_call(program, call)
            return next((c["result"] for c in conversation["calls"] if _is_call(call, c)), "error: not found")

        return Caller(frozenset(f["name"] for f in conversation["functions"]), act)

    def aspects(self, conversation: dict, parts: Sequence[dict]) -> dict[str, bool]:
        """calls: whether all that are wanted were made, in their order, and no other; no call: whether none was made
        where none is wanted; answer: whether the answer is right."""
        made = [p["text"] for p in parts if p["type"] == "python" and _is_meant(conversation, p["text"])]
        answer = {"answer": holds(conversation["check"], visible(parts))}
        if not (calls := conversation["calls"]):
            return {"no call": not made} | answer
        return {"calls": len(made) == len(calls) and all(map(_is_call, made, calls))} | answer


def run_call(program: str, call: str) -> str:
    """What a function of a program gives for a call, in the sandbox."""
    try:
        name, arguments = read_call(call)
    except ValueError as e:
        return f"error: {e}"
    result = run_program(f"{program}\nprint({name}(**{arguments!r}))", timeout=SECONDS)
    return result.stdout.strip() if result.ok else f"error: {result}"


def _words_of(tool: Tool) -> set[str]:
    """The words that a tool's name is made of, in any of its kind's names."""
    names = (name.format(**tool.words) for name in (*tool.kind["names"], "{n}"))
    return {word for name in names for word in re.findall("[a-z]+", name.lower())} - COMMON


def _answer(use: Use, calls: Sequence[Mapping], text: str, announced: bool) -> list[dict]:
    """Calls and what came of them, and a text, as parts; announced: what they are about is said before them."""
    parts = [{"type": "text", "text": use.announced}] if announced else []
    for call in calls:
        parts.append({"type": "python", "text": call_text(call["name"], call["arguments"])})
        parts.append({"type": "python_output", "text": call["result"]})
    return parts + ([{"type": "text", "text": f" {text}" if announced else text}] if text else [])


def _is_meant(conversation: dict, call: str) -> bool:
    """Whether what is called is one of the tools."""
    return name_of(call) in {f["name"] for f in conversation["functions"]}


def _is_call(text: str, wanted: Mapping) -> bool:
    try:
        return same(read_call(text), (wanted["name"], wanted["arguments"]))
    except ValueError:
        return False


def same(a: Any, b: Any) -> bool:
    """Whether values are equal, strings without regard to case."""
    if isinstance(a, str) and isinstance(b, str):
        return a.casefold() == b.casefold()
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and a == b


# ------------------------------------------------------------------------------------------------ tools and questions


def draw_tool(rng: random.Random, kind: Mapping, split: str) -> Tool:
    known = read_yaml("tools.yaml")
    noun = stories.any_word(rng) if rng.random() < 0.5 else rng.choice(_nouns())
    verb = rng.choice(known["verbs"]) if rng.random() < 0.7 else stories.any_word(rng)
    if split == "train" and {noun.lower(), verb.lower()} & _held_words():
        return draw_tool(rng, kind, split)
    words = {"n": noun, "N": noun.capitalize(), "v": verb}
    name = rng.choice(kind["names"]).format(**words)
    if "{n}" not in kind["names"][0] and "{v}" not in kind["names"][0]:
        words |= {"n": name.replace("_", " ")}
    keys, properties = dict[str, str](), dict[str, dict]()
    for slot, own in kind["params"].items():
        usual = [key for key in own or known["usual"][slot] if key not in properties]
        odd = stories.any_word(rng) if split == "train" and rng.random() < ODD_KEYS else ""
        keys[slot] = odd if is_plain_name(odd) and odd not in properties else rng.choice(usual)
        properties[keys[slot]] = {**SCHEMAS.get(slot, {"type": "string"})}
    if rng.random() < PARAMETERS_DESCRIBED:
        for slot, key in keys.items():
            properties[key]["description"] = rng.choice(known["said"][slot])
    required = list(properties)
    if rng.random() < OPTIONAL:
        key, schema = rng.choice(known["optional"])
        properties.setdefault(key, schema)
    schema = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    about = {"description": rng.choice(kind["about"])} if rng.random() < DESCRIBED else {}
    function = {"name": name, **about, "parameters": schema}
    return Tool(kind, words, function, keys, rng.choice((0.5, 2, 10, 100, 0.1, 3, 0.25, 1.6, 2.2, 0.62)))


@cache
def _held_words() -> frozenset[str]:
    """The words of the names that tests have."""
    names = (name for kind in read_yaml("tools.yaml")["held_out"] for name in kind["names"])
    return frozenset(word for name in names for word in name.split("_"))


def _nouns() -> Sequence[str]:
    known = stories.words()
    return known["nature"] + known["others"] + known["foods"] + known["animals"] + known["things"]


def use_of(rng: random.Random, tool: Tool, split: str) -> Use:
    said, values = _slots(rng, split)
    said |= tool.words
    wording = rng.choice(tool.kind["ask"])
    is_text = wording.endswith(("{text}", "{fact}"))
    question = wording.format(**said)
    question = question[0].upper() + question[1:] if is_text and rng.random() < 0.5 else question
    question = question if is_text else typed(rng, stories.with_articles(question))
    arguments = {key: _as_written(values[slot], question) for slot, key in tool.keys.items()}
    value, result = _result(rng, tool, values["size"])
    answer = rng.choice(tool.kind["says"]).format(**said, result=value)
    return Use(tool, question, arguments, result, value, answer, tool.kind.get("noun", "").format(**said))


def _as_written(value: Any, question: str) -> Any:
    """A value with its strings as they stand in a question, which may be in small letters."""
    if isinstance(value, str):
        at = question.lower().find(value.lower())
        return question[at : at + len(value)] if at > 0 else value
    if isinstance(value, list):
        return [_as_written(one, question) for one in value]
    if isinstance(value, dict):
        return {key: _as_written(one, question) for key, one in value.items()}
    return value


def _slots(rng: random.Random, split: str) -> tuple[dict[str, str], dict[str, Any]]:
    """(as they are said, as values) of all slots; in training many that nobody has heard of, so that they are read."""
    known, lists, words = read_yaml("tools.yaml"), stories.script()["lists"], stories.words()
    odd = split == "train"

    def word(usual: Sequence[str]) -> str:
        return stories.any_word(rng) if odd and rng.random() < 0.4 else rng.choice(usual)

    def town() -> str:
        return stories.invented(rng).capitalize() if odd and rng.random() < 0.4 else rng.choice(lists["town"])

    people = rng.sample(stories.names("she") + stories.names("he"), 4)
    things = [word(words["things"]) for _ in range(4)]
    people[0] = stories.person(rng)[0] if odd else people[0]
    number = rng.randint(1, 999) if rng.random() < 0.6 else round(rng.uniform(0, 100), 1)
    count = rng.choice((*range(1, 13), rng.randint(1, 99)))
    hour, on, where = rng.randint(1, 12), rng.random() < 0.5, town()
    values: dict[str, Any] = {"town": where, "town2": town(), "person": people[0], "thing": things[0], "count": count}
    values |= {"people": people[1 : rng.choice((3, 4))], "things": things[1 : rng.choice((3, 4))], "state": on}
    values |= {"food": rng.choice(words["foods"]), "word": word(stories.common_words(not odd))}
    values |= {"size": number, "hour": hour}
    values |= {slot: rng.choice(lists[slot]) for slot in ("day", "color", "place")}
    values["fact"] = rng.choice((rng.choice(lists["weather"]), str(number), f"{count} {rng.choice(known['units'])}"))
    values |= {"text": rng.choice(known["texts"]), "somebody": {"name": people[0], "city": where}}
    said = {slot: str(value) for slot, value in values.items()} | {"state": "on" if on else "off"}
    said |= {slot: f"{', '.join(values[slot][:-1])} and {values[slot][-1]}" for slot in ("people", "things")}
    if count < len(NUMBERS) and rng.random() < 0.25:
        said["count"] = NUMBERS[count]
    return said, values


def _result(rng: random.Random, tool: Tool, size: float) -> tuple[str, str]:
    """(the value, the text that a tool gives)."""
    if tool.program:
        value = str(round(size * tool.factor, 2))
        return value, value
    known, lists = read_yaml("tools.yaml"), stories.script()["lists"]
    kind = tool.kind["gives"]
    kind = rng.choice(known["gives"].get(kind, [kind]))
    if kind == "done":
        return "done", rng.choice(("ok", "done", "true", '{"ok": true}', "success"))
    number = str(rng.randint(1, 10 ** rng.choice((1, 2, 3, 4))))
    value = {
        "number": number,
        "unit": f"{number} {rng.choice(known['units'])}",
        "word": stories.any_word(rng),
        "hour": f"{rng.randint(1, 12)}:{rng.randint(0, 59):02}",
        "weather": rng.choice(lists["weather"]),
    }[kind]
    if rng.random() < 0.3:
        shown = value if kind == "number" else f'"{value}"'
        return value, f'{{"{rng.choice(("result", "value", "answer", tool.name))}": {shown}}}'
    return value, value
