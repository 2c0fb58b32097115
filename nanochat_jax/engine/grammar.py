"""Answers that keep to a form: JSON by a schema, or a call of a tool. llguidance says which tokens may follow.

    vocabulary = Vocabulary(tok)
    request = Request(ids, max_new_tokens=100, grammar=vocabulary.json({"type": "object"}))

A form is soft until it must be hard: tokens are drawn freely, and the first that does not fit is drawn again among
those that do, which gives what drawing among these at once would give. Where only so many tokens are left as the
shortest end needs, that end is taken.
"""

import functools
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from nanochat_jax.engine.tools import Tools
from nanochat_jax.signatures import is_plain_name
from tokenizer import SPECIAL_TOKENS, Tokenizer

SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ENDINGS = b')}],"0ntf', b'"'  # the first of these that may stand leads to an end: outside of a string, and in one
# when the way to an end is measured again: after so many tokens, where few are left, and near the limit where a token
# has one of these, without which it leads no further from the end than by the rest of a character or a number
LOOK_AGAIN, LITTLE, NEAR, OPENING = 64, 6, 128, frozenset(b'{[,"')
ATTEMPTS = 8  # to find an end that is near enough
FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # keywords of a schema that hold schemas
NESTED = {"items", "prefixItems", "additionalItems", "anyOf", "oneOf", "allOf", "additionalProperties"}
DEFINED = ("$defs", "definitions")
# keywords of a schema for which the arguments of a call can be written one by one
ONE_BY_ONE = {"type", "properties", "required", "additionalProperties", "title", "description", "$schema", *DEFINED}

CALCULATED = {  # what the calculator works out, as rules
    "SUM": r"SUM: /[0-9(.\-][0-9+\-*\/()., ]{0,80}/",
    "COUNT": r"COUNT: /'[^'\n]{1,60}'\.count\('[^'\n]{1,20}'\)/",
    "LENGTH": r"LENGTH: /len\('[^'\n]{0,60}'\)/",
}


class Vocabulary:
    """A tokenizer's, as grammars see it. Threads may share it."""

    def __init__(self, tok: Tokenizer):
        special = {getattr(tok, name[2:-2]): name.encode() for name in SPECIAL_TOKENS}
        self._tok = tok

        class Wrapped:
            eos_token_id, bos_token_id, special_token_ids = tok.assistant_end, tok.bos, list(special)
            tokens = [special.get(id) or tok.decode_bytes([id]) for id in range(tok.vocab_size)]

            @staticmethod
            @functools.lru_cache(4096)  # keys of schemas, again and again
            def __call__(text: str) -> list[int]:
                return tok.encode(text)

        self.bytes = Wrapped.tokens
        self.ll = LLTokenizer(TokenizerWrapper(Wrapped()))
        single = sorted((raw, id) for id, raw in enumerate(Wrapped.tokens) if len(raw) == 1)  # some bytes have two ids
        ids = [id for _, id in single]
        self.orders = [ids, ids[::-1], *(random.Random(i).sample(ids, len(ids)) for i in range(ATTEMPTS - 2))]
        self.endings = [[id for byte in some for raw, id in single if raw[0] == byte] for some in ENDINGS]

    def said(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.bytes[id] for id in ids)

    def json(self, schema: Mapping | bool) -> "Grammar":
        """JSON by a schema. ValueError where that cannot be kept to."""
        known = json.dumps(_known(_object(schema)))
        return self._compiled(LLMatcher.grammar_from_json_schema(known, overrides=SPACING))

    def call(self, tools: Mapping[str, Mapping]) -> "Grammar":
        """A call of one of these tools, {name: schema of its arguments}, as Python writes it: `name(key=value)`, where
        values are JSON; `name(**{...})` where the schema says more than which keys there are. ValueError."""
        return self._call_or(tools, {})

    def text(self, tools: Mapping[str, Mapping], machine: Tools) -> "Mixed":
        """Text, in which each call is of one of these tools or the calculator. machine: answers calls. ValueError."""
        return Mixed(self._call_or(tools, CALCULATED), self._tok, machine)

    def _call_or(self, tools: Mapping[str, Mapping], others: Mapping[str, str]) -> "Grammar":
        rules = [_call_rules(i, name, _known(schema)) for i, (name, schema) in enumerate(tools.items())]
        start, end, calls = self._tok.python_start, self._tok.python_end, [f"call_{i}" for i in range(len(tools))]
        head = f"start: <[{start}]> ({' | '.join([*calls, *others])}) <[{end}]>"
        return self._compiled(LLMatcher.grammar_from_lark("\n".join([head, *rules, *others.values()])))

    @functools.lru_cache(256)  # noqa: B019 - one vocabulary lives as long as its server
    def _compiled(self, grammar: str) -> "Grammar":
        return Grammar(self, grammar)


def quoted(state: int, raw: bytes) -> int:
    """Whether what follows raw bytes of JSON is in a string: 0 no, 1 yes, 2 yes, and behind a backslash."""
    if not state and b'"' not in raw or state == 1 and b'"' not in raw and b"\\" not in raw:
        return state
    for byte in raw:
        state = int(byte == 34) if not state else {34: 0, 92: 2}.get(byte, 1) if state == 1 else 1
    return state


def _call_rules(i: int, name: str, schema: Mapping) -> str:
    """Rules for a call of one tool, of which the first is call_{i}."""
    if not _one_by_one(schema):
        return f"call_{i}: {json.dumps(name + '(**')} {_value(schema)} {json.dumps(')')}"
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    defs = {key: schema[key] for key in DEFINED if key in schema}
    rules = [f"call_{i}: {json.dumps(name + '(')} first_{i}_0 {json.dumps(')')}"]
    for k, (key, of) in enumerate(properties.items()):
        value = _value({**_object(of), **defs})
        first = [f"{json.dumps(key + '=')} {value} more_{i}_{k + 1}"]
        more = [f"{json.dumps(', ' + key + '=')} {value} more_{i}_{k + 1}"]
        if key not in required:
            first, more = [*first, f"first_{i}_{k + 1}"], [*more, f"more_{i}_{k + 1}"]
        rules += [f"first_{i}_{k}: {' | '.join(first)}", f"more_{i}_{k}: {' | '.join(more)}"]
    return "\n".join([*rules, f'first_{i}_{len(properties)}: ""', f'more_{i}_{len(properties)}: ""'])


def _one_by_one(schema: Mapping) -> bool:
    """Whether the arguments of a call can be written one by one: the schema says no more than which keys there are."""
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not set(schema) <= ONE_BY_ONE or not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    within = json.dumps([properties, *(schema.get(key) for key in DEFINED)])
    whole = '"$ref": "#"' in within or '"#/properties' in within  # which cannot be referred to from a part
    named = all(map(is_plain_name, properties))
    return (
        named and not whole and schema.get("type", "object") == "object" and all(map(list(properties).count, required))
    )


def _known(schema: Any) -> Any:
    """A schema without the formats that llguidance does not know, which are notes to readers."""
    if isinstance(schema, list):
        return [_known(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    out = {}
    for key, of in schema.items():
        if key in NAMED and isinstance(of, Mapping):
            out[key] = {name: _known(one) for name, one in of.items()}
        elif key != "format" or of in FORMATS:
            out[key] = _known(of) if key in NESTED else of
    return out


def _value(schema: Any) -> str:
    return f"%json {json.dumps({**_object(schema), 'x-guidance': SPACING})}"


def _object(schema: Any) -> dict:
    return dict(schema) if isinstance(schema, Mapping) else {} if schema is True else {"enum": []}


class Grammar:
    """A grammar, compiled for a vocabulary. ValueError where it is none."""

    def __init__(self, vocabulary: Vocabulary, grammar: str):
        self.vocabulary, self._matcher = vocabulary, LLMatcher(vocabulary.ll, grammar, log_level=0)
        if self._matcher.is_error():
            raise ValueError(" ".join(self._matcher.get_error().split())[:300])

    def start(self) -> "Form":
        return Form(self.vocabulary, self._matcher.deep_copy())


class Form:
    """Where one answer stands in its grammar."""

    def __init__(self, vocabulary: Vocabulary, matcher):
        self._vocabulary, self._matcher = vocabulary, matcher
        self._quoted, self._fits, self._next = 0, b"", matcher.compute_ff_tokens()
        self._out: list[int] = []  # the ids to an end
        self._on_it = False  # they are; else they were, and are about so many
        self._since = LOOK_AGAIN  # tokens since then
        self._closing = False  # there is room for this end alone
        self._hopeless = False  # there is no room for any

    @property
    def ended(self) -> bool:
        """Nothing may follow, or nothing more has to and there is no room for it."""
        done = self._matcher.is_stopped() or self._closing and self._matcher.is_accepting()
        return done and not self.failed

    @property
    def failed(self) -> str:
        """Why llguidance can not go on, which has limits for what takes too long; empty where it can."""
        return self._matcher.get_error()

    def fill(self, bits: np.ndarray) -> None:
        """Sets the bits (ceil(V / 32),) int32 of the ids that may follow."""
        self._fits = self._matcher.compute_bitmask()
        size = min(bits.nbytes, len(self._fits))
        bits.view(np.uint8)[:size] = np.frombuffer(self._fits, np.uint8, size)

    def take(self, id: int, left: int, again: bool) -> bool:
        """Whether an id may follow, after which there is room for `left` more; if so, it is taken.

        again: it was drawn among the ids that `fill` told last, which is right where these may stand here as well.
        """
        if again and self._matcher.compute_bitmask() != self._fits or not self._matcher.try_consume_tokens([id]):
            return False
        raw, before, nearer = self._vocabulary.bytes[id], self._quoted, self._follow([id])
        self._since, self._quoted, self._next = self._since + 1, quoted(before, raw), self._matcher.compute_ff_tokens()
        far, outside = len(self._out), raw.partition(b'"')[2] if before else raw
        turned = self._next or not OPENING.isdisjoint(outside)  # this way and no other
        further = turned and not nearer and left <= 4 * far + NEAR
        plain = before == self._quoted == 1 and raw.isascii()  # more of a string
        near = left <= far + (0 if plain else LITTLE)
        if not self._hopeless and (further or near or self._since >= LOOK_AGAIN):
            self._out, self._on_it, self._since = self._way_out(left), True, 0
            self._closing = len(self._out) == left
            if len(self._out) > left:  # too far from an end
                self._matcher.rollback(1)
                after, self._quoted = self._quoted, before
                self._next, self._out = [], self._way_out(left + 1)
                self._closing = len(self._out) <= left + 1
                if self._closing:
                    return False
                self._quoted, self._hopeless = after, True
                self._matcher.consume_token(id)
                self._next = self._matcher.compute_ff_tokens()
        return True

    def _follow(self, ids: list[int]) -> bool:
        """Whether ids are a part of the way to an end, which is that much shorter then."""
        self._on_it = self._on_it and self._out[: len(ids)] == ids
        self._out = self._out[len(ids) if self._on_it else 0 :]
        return self._on_it

    def forced(self) -> list[int]:
        """The ids that must follow, which are taken: there is no choice, or room for the shortest end alone."""
        if self.ended or self.failed:
            return []
        ids, self._next = self._out if self._closing else self._next, []
        self._matcher.consume_tokens(ids)
        self._quoted = quoted(self._quoted, self._vocabulary.said(ids))
        self._follow(ids)
        return ids

    def _way_out(self, most: int) -> list[int]:
        """Ids that lead to an end, if one is found in `most`; longer ones, which need not, else."""
        out: list[int] = []
        for order in self._vocabulary.orders:
            out = self._attempt(most, order)
            if len(out) <= most:
                break
        return out

    def _attempt(self, most: int, order: Sequence[int]) -> list[int]:
        """`_way_out` where, of ids that are a byte, the first in this order is taken."""
        matcher, vocabulary, out = self._matcher.deep_copy(), self._vocabulary, list[int]()
        inside, used = self._quoted, Counter[int]()
        while not matcher.is_stopped() and len(out) <= most:
            ids = matcher.compute_ff_tokens()
            if not ids and matcher.is_accepting():
                break
            if not ids:
                ending = (id for id in vocabulary.endings[inside > 0] if matcher.validate_tokens([id]))
                ids = [id] if (id := next(ending, -1)) >= 0 else []
            if not ids:  # in words of a pattern, what was used least: it has to be left somewhere
                fits = matcher.compute_bitmask()
                single = [id for id in order if fits[id >> 3] >> (id & 7) & 1]
                if not single:  # it is too much for llguidance
                    break
                ids = [min(single, key=used.__getitem__)]
                used.update(ids)
            matcher.consume_tokens(ids)
            inside = quoted(inside, vocabulary.said(ids))
            out += ids
        return out


class Mixed:
    """Text with calls in it, each of which keeps to a grammar. What answers the calls sees every token."""

    def __init__(self, call: Grammar, tok: Tokenizer, machine: Tools):
        self._call, self._tok, self._machine = call, tok, machine

    def start(self) -> "MixedForm":
        return MixedForm(self._call, self._tok, self._machine.start())


class MixedForm:
    """Where one answer stands: in text, where anything may follow, or in a call."""

    ended, failed = False, ""  # a stop token ends it

    def __init__(self, call: Grammar, tok: Tokenizer, machine: Tools):
        self._grammar, self._tok, self._machine = call, tok, machine
        self._call: Form | None = None
        self._next: list[int] = []

    def fill(self, bits: np.ndarray) -> None:
        if self._call:
            self._call.fill(bits)
        else:
            bits[:] = -1

    def take(self, id: int, left: int, again: bool) -> bool:
        if not self._call and id == self._tok.python_start:
            self._call, again = self._grammar.start(), False
        if self._call and not self._call.take(id, left, again):
            if not self._call.failed:
                return False
            self._call = None  # it is too much for llguidance: the rest is free
        self._pushed([id])
        return True

    def forced(self) -> list[int]:
        """As `Form.forced`; also what follows a call."""
        if self._call:
            ids = self._call.forced()
            self._next += ids
            self._pushed(ids)
        ids, self._next = self._next, []
        return ids

    def _pushed(self, ids: Iterable[int]) -> None:
        for id in ids:
            self._next += self._machine.push(id)
        if self._call and self._call.ended:
            self._call = None
