"""Conversations in the forms that people have them, made into ours: {"messages": [system or none, user, assistant,
..., assistant]}, where a content is a text or, of an assistant that calls tools, a list of parts.

.jsonl, .ndjson, .json  a value a line, an array of them, or values one after another; also .gz and .zst
.parquet                columns of the same names

What has one meaning is repaired, what has none is left out; a `Tally` counts both and says where.
"""

import codecs
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_jax import dialects
from nanochat_jax.dialects import Unusable
from nanochat_jax.formats import kind_of, opened, opened_parquet, some, whole_text
from nanochat_jax.signatures import Unsayable, prompted

KINDS = ".json, .jsonl or .ndjson, also .gz or .zst, and .parquet"
LINE = 1 << 20  # characters of a first line that tell an array from rows
LONGEST = 1 << 26  # characters of an array's entry, beyond which it is taken for damage
LISTS = ("messages", "conversations", "conversation")
PAIRS = {  # form -> the fields of the question, of what belongs to it, and of the answer
    "Alpaca": ("instruction", "input", "output"),
    "Dolly": ("instruction", "context", "response"),
    "prompt and completion": ("prompt", "", "completion"),
    "prompt and response": ("prompt", "", "response"),
    "question and response": ("question", "", "response"),
    "question and answer": ("question", "", "answer"),
    "query and response": ("query", "", "response"),
}
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
FIELDS = {*LISTS, *SYSTEM, *TOOLS, "history", "answers", "chat", *itertools.chain(*PAIRS.values())}
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
    "function_call": "call",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # fields of a message
THINK, THINK_WITHIN = "Think first.", "Think first, in at most {} tokens."
HALVES = "half characters replaced"
TEXTS = ("text", "input_text", "output_text")  # types of parts that hold a text
OWN = ("think", "python", "python_output")  # types of ours that others have not
_DECODE = json.JSONDecoder().raw_decode
_BETWEEN = re.compile(r"[\s,\ufeff]*")
_BETWEEN_ENTRIES = re.compile(r"[\s,\]]*")
_ANSWERED = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
_SPEAKERS = re.compile(r"(?:^|\n)(USER|ASSISTANT|FUNCTION RESPONSE): ")


# ------------------------------------------------------------------------------------------------- a row


def conversation_of(row: Any) -> tuple[list[dict], str, set[str]]:
    """(messages in our form, what the row was taken for, what was repaired). Unusable."""
    form, said = _form_of(row)
    repairs: set[str] = set()
    given = next((row[name] for name in TOOLS if row.get(name)), None) if isinstance(row, Mapping) else None
    try:
        functions = dialects.functions(given)
        if isinstance(given, list) and len(functions) < len(given):
            repairs.add("tools that are no functions, or that come twice, left out")
    except Unusable:
        functions = []
        repairs.add("tools without a name or a schema left out")
    turns: list[tuple[str, list[dict]]] = []
    for message in said:
        if isinstance(message, Mapping) and message.get("role") == "assistant" and message.get("weight") == 0:
            raise Unusable("an answer of weight 0, which is not to be learned")
        _add(turns, message, repairs)
    system = turns.pop(0) if turns and turns[0][0] == "system" else None
    _cut_to_last_answer(turns, repairs, system)
    for i, (role, parts) in enumerate(turns):
        if role == "system":
            raise Unusable("a system message between others")
        if i == 0 and role != "user":
            raise Unusable("the assistant speaks first")
        if _is_empty(parts):
            raise Unusable("an empty answer" if role == "assistant" else "an empty question")
    if system and _is_empty(system[1]):
        repairs.add("an empty system message dropped")
        system = None
    prose = _content(system[1]) if system else ""
    if listed := dialects.listed(prose):
        functions, prose = functions or listed[0], listed[1]
    notes: set[str] = set()
    is_thought = any(part["type"] == "think" for _, parts in turns for part in parts)
    text = system_text(functions, is_thought and not prose.startswith(THINK[:-1]), prose, notes)
    if notes:
        repairs.add(f"{', '.join(sorted(notes))} of tools left out")
    head = [{"role": "system", "content": text}] if text else []
    return [*head, *({"role": r, "content": _content(parts)} for r, parts in turns)], form, repairs


def system_text(
    functions: Sequence[Mapping], thinking: bool | int, prose: str = "", notes: set[str] | None = None
) -> str:
    """A system message: whether to think, in how many tokens; signatures of the tools; and what else it says.

    What signatures do not say of the tools is named in `notes`. Unusable where one has none."""
    line = THINK if thinking is True else THINK_WITHIN.format(thinking) if thinking else ""
    try:
        tools = "\n".join(prompted(function, notes) for function in functions)
    except Unsayable as e:
        raise Unusable(f"tools: {e}") from None
    head = "\n".join(filter(None, (line, tools)))
    return "\n\n".join(text for text in (head, prose) if text.strip())


def prompt_of(
    said: Sequence[Any], functions: Sequence[Mapping] = (), thinking: bool | int = False, notes: set[str] | None = None
) -> list[dict]:
    """Messages that wait for an answer, in our form: whatever their order, the first is a system's or a user's, and
    users and the assistant take turns. Where the assistant speaks last it is gone on with. Unusable.

    A system message behind others is read as a part of the user's turn there, for that is where our renderer puts any.
    What the assistant thought in earlier turns is left out. functions, thinking, notes: as `system_text` has them.
    """
    turns: list[tuple[str, list[dict]]] = []
    repairs: set[str] = set()
    for message in said:
        role = ROLES.get(str(message.get("role")).lower()) if isinstance(message, Mapping) else None
        if role == "assistant" and not any(message.get(name) for name in ("content", "tool_calls", "function_call")):
            continue  # an empty answer is none
        if role == "system" and any(earlier != "system" for earlier, _ in turns):
            message = {"role": "user", "content": message.get("content")}
        elif role == "assistant" and isinstance(text := message.get("content"), str) and not dialects.is_known(text):
            message = {**message, "content": [{"type": "text", "text": text}]}
        _add(turns, message, repairs)
    if HALVES in repairs:
        raise Unusable("not valid Unicode: a lone surrogate")
    system = turns.pop(0) if turns and turns[0][0] == "system" else None
    text = system_text(functions, thinking, _content(system[1]) if system else "", notes)
    if not turns or turns[0][0] == "assistant":
        turns.insert(0, ("user", []))
    head = [{"role": "system", "content": text}] if text or system else []
    last = turns[-1][1]
    kept = ((r, [p for p in parts if p["type"] != "think" or parts is last]) for r, parts in turns)
    return [*head, *({"role": role, "content": _content(parts)} for role, parts in kept)]


def _form_of(row: Any) -> tuple[str, list]:
    """(the name of a row's form, its messages as they stand)."""
    if isinstance(row, list):
        return "lists of messages", row
    if not isinstance(row, Mapping):
        raise Unusable(f"holds {type(row).__name__} and no conversation")
    for name in LISTS:
        if isinstance(said := row.get(name), list):
            mappings = [m for m in said if isinstance(m, Mapping)]
            calls = any(m.get("tool_calls") or m.get("function_call") for m in mappings)
            form = "ShareGPT" if any(m.get("from") for m in mappings) else "messages"
            return (f"{form} with tool calls" if calls else form), _with_system(row, said)
    if isinstance(row.get("query"), str) and "answers" in row:
        calls = dialects.decoded(row["answers"], "answers")
        said = [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": None, "tool_calls": calls}]
        return "query and calls", _with_system(row, said)
    if isinstance(row.get("chat"), str):
        _, *spoken = _SPEAKERS.split(row["chat"])
        roles = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
        said = [{"role": roles[who], "content": text.strip()} for who, text in zip(spoken[::2], spoken[1::2])]
        return "speakers in one text", _with_system(row, said)
    for form, (question, more, answer) in PAIRS.items():
        if question in row and answer in row:
            return form, _with_system(row, _pair(row, row[question], row.get(more), row[answer]))
    raise Unusable(f"no known form (fields {', '.join(row) or 'none'})"[:120])


def _pair(row: Mapping, question: Any, more: Any, answer: Any) -> list:
    if isinstance(question, list) and isinstance(answer, list):  # prompt and completion as messages
        return question + answer
    if isinstance(question, str) and isinstance(more, str):
        question = "\n\n".join(text for text in (question, more) if text.strip())
    earlier = row.get("history") or []
    if not isinstance(earlier, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in earlier):
        raise Unusable("`history` holds no pairs of question and answer")
    texts = [text for pair in (*earlier, [question, answer]) for text in pair]
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]


def _with_system(row: Mapping, said: list) -> list:
    text = next((row[name] for name in SYSTEM if isinstance(row.get(name), str) and row[name].strip()), "")
    first = said[0] if said and isinstance(said[0], Mapping) else {}
    has_one = (first.get("role") or first.get("from")) in ("system", "developer")
    return said if has_one or not text else [{"role": "system", "content": text}, *said]


def _add(turns: list[tuple[str, list[dict]]], message: Any, repairs: set[str]) -> None:
    """A message behind the turns, or at the end of the last one where that is of the same role."""
    if not isinstance(message, Mapping):
        raise Unusable("a message that is no object")
    name = message.get("role") or message.get("from")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Unusable(f"unknown role {name!r:.30}" if name else "a message without a role")
    if role in ("system", "user", "assistant") and message.get("role") not in (None, role):
        repairs.add(f"role {name} as {role}")
    content = message["content"] if message.get("content") is not None else message.get("value")
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if not isinstance(calls, list):
        raise Unusable("tool calls that are no list")
    if role == "call":
        role, content, calls = "assistant", None, [content]
    if calls and role != "assistant":
        raise Unusable(f"tool calls of role {role}")
    if role == "tool":
        return _add_result(turns, message, _content(_parts(content, role, repairs)))
    parts = [p for p in _parts(content, role, repairs) if p["text"] or not calls]
    parts += [{**part, "text": _whole(part["text"], repairs)} for part in map(dialects.call, calls)]
    thought = next((message[n] for n in THOUGHTS if isinstance(message.get(n), str) and message[n].strip()), "")
    if thought and role == "assistant" and not any(part["type"] == "think" for part in parts):
        parts.insert(0, {"type": "think", "text": _whole(thought.strip(), repairs)})
    if not turns or turns[-1][0] != role:
        turns.append((role, parts))
        return
    held = turns[-1][1]
    if held and parts and held[-1]["type"] == parts[0]["type"] == "text":
        repairs.add("turns of one role joined")
        parts = [{"type": "text", "text": "\n\n"}, *parts]
    held.extend(parts)


def _add_result(turns: list[tuple[str, list[dict]]], message: Mapping, result: str) -> None:
    """What a tool gave, right behind its call: that of the same id, else the first without a result."""
    parts = turns[-1][1] if turns else []
    kinds = [part["type"] for part in parts]
    open = [i for i, kind in enumerate(kinds) if kind == "python" and kinds[i + 1 : i + 2] != ["python_output"]]
    if not open and all(part["type"] in ("text", "think") for part in parts):
        raise Unusable("a tool turn that follows no call")
    id = message.get("tool_call_id")
    own = [i for i in open if id is not None and parts[i].get("id") == id]
    at = (own or open or [len(parts) - 1])[0] + 1
    if answered := _ANSWERED.fullmatch(result):
        result = answered[1]
    parts.insert(at, {"type": "python_output", "text": result})


def _parts(content: Any, role: str, repairs: set[str]) -> list[dict]:
    if isinstance(content, str):
        text = _whole(content, repairs)
        return dialects.spoken(text) if role == "assistant" else [{"type": "text", "text": text}]
    if content is None:
        return []
    if not isinstance(content, list):
        raise Unusable(f"a content of type {type(content).__name__}")
    ours = role == "assistant" and any(isinstance(p, Mapping) and p.get("type") in OWN for p in content)
    if not ours:
        repairs.add("content in parts")
    parts = []
    for part in content:
        kind, said = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else ("text", part)
        if not isinstance(said, str) or kind not in (TEXTS + OWN if ours else TEXTS):
            raise Unusable(f"a part of type {kind!r:.30}")
        parts.append({"type": "text" if kind in TEXTS else kind, "text": _whole(said, repairs)})
    return parts


def _whole(text: str, repairs: set[str]) -> str:
    """A text that UTF-8 can say. Bytes that are not UTF-8 were read as U+DC80 to U+DCFF."""
    mended = whole_text(text)
    if mended is not text:
        if re.search("[\udc80-\udcff]", text):
            raise Unusable("text that is not UTF-8")
        repairs.add(HALVES)
    return mended


def _cut_to_last_answer(turns: list[tuple[str, list[dict]]], repairs: set[str], system: Any) -> None:
    """Takes off what follows the last answer; an answer ends with a text or a call."""
    if not turns:
        raise Unusable("only a system message" if system else "no messages")
    why = "an empty answer" if turns[-1][0] == "assistant" else "no answer"
    while turns:
        role, parts = turns[-1]
        if role != "assistant" or _is_empty(parts):
            turns.pop()
        elif parts[-1]["type"] == "python_output":
            parts.pop()
        else:
            return
        repairs.add("taken up to the last answer")
    raise Unusable(why)


def _is_empty(parts: list[dict]) -> bool:
    return not any(part["text"].strip() for part in parts)


def text_of(content: str | Sequence[Mapping], between: str = "") -> str:
    """All of a content as one text: its parts, of whatever type, with `between` between them."""
    return content if isinstance(content, str) else between.join(part["text"] for part in content)


def _content(parts: list[dict]) -> Any:
    """Parts as a content: a text where there is nothing else."""
    if all(part["type"] == "text" for part in parts):
        return text_of(parts)
    return [{"type": part["type"], "text": part["text"]} for part in parts]


# ------------------------------------------------------------------------------------------------- files


def is_chat_file(name: str) -> bool:
    return kind_of(name) in ("lines", "parquet") or (name.lower().endswith(".json") and not name.startswith("."))


def chat_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files in and below a folder: (those that may hold conversations, the others), sorted; none that is hidden."""
    files = sorted(p for p in folder.rglob("*") if not p.name.startswith(".") and p.is_file())
    return [p for p in files if is_chat_file(p.name)], [p for p in files if not is_chat_file(p.name)]


def rows_of(path: Path, also: str = "") -> Iterator[tuple[str, Any]]:
    """(where, row) of a file, as they are read: "line 3" of lines, "row 3" of parquet, "entry 3" of an array. What is
    not JSON is an `Unusable`. `also` is a column of parquet to read beside those of conversations. UserError where the
    file cannot be read."""
    if kind_of(path.name) == "parquet":
        with opened_parquet(path) as table:
            names = [name for name in table.schema_arrow.names if name in FIELDS or name == also]
            batches = table.iter_batches(256, columns=names or None, use_threads=False)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"row {i}", row) for i, row in enumerate(rows, 1))
        return
    with opened(path) as raw:
        wide = raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # type: ignore[attr-defined]
        encoding, errors = ("utf-16", "replace") if wide else ("utf-8-sig", "surrogateescape")
        file = io.TextIOWrapper(raw, encoding, errors, newline="\n")
        blank, first = 0, file.readline(LINE)
        while first.isspace():
            blank, first = blank + 1, file.readline(LINE)
        if first.lstrip().startswith("[") and not _is_json(first) or first.strip() == "{":
            yield from _entries(file, first)
            return
        first += "" if first.endswith("\n") else file.readline()
        for number, line in enumerate(itertools.chain([first], file), blank + 1):
            yield from _line(f"line {number}", line)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        return False


def _line(where: str, line: str) -> Iterator[tuple[str, Any]]:
    """The rows of a line: mostly one, but an array may stand there, or values where a line break was lost."""
    at = _BETWEEN.match(line).end()  # type: ignore[union-attr]
    while at < len(line):
        try:
            value, at = _DECODE(line, at)
        except (ValueError, RecursionError):
            yield where, Unusable("not JSON")
            return
        at = _BETWEEN.match(line, at).end()  # type: ignore[union-attr]
        if isinstance(value, list) and not all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value):
            yield from ((f"{where}, entry {i}", row) for i, row in enumerate(value, 1))
        else:
            yield where, value


def _entries(file: io.TextIOWrapper, text: str) -> Iterator[tuple[str, Any]]:
    """The entries of an array, or values one after another, that go over lines. `text` is the beginning of the file."""
    at, number = len(text) - len(text.lstrip().removeprefix("[")), 0
    while True:
        at = _BETWEEN_ENTRIES.match(text, at).end()  # type: ignore[union-attr]
        try:
            value, at = _DECODE(text, at)
        except (ValueError, RecursionError):
            more = file.read(max(LINE, len(text) - at)) if len(text) - at < LONGEST else ""
            if not more:
                if at < len(text):
                    yield f"entry {number + 1}", Unusable("not JSON, here and to the end of the file")
                return
            text, at = text[at:] + more, 0
            continue
        number += 1
        yield f"entry {number}", value


# ------------------------------------------------------------------------------------------------- what was made of it


class Tally:
    """What was made of rows: how many were taken, repaired how, left out why and where first."""

    def __init__(self) -> None:
        self.taken = self.mended = 0
        self.repairs: Counter[str] = Counter()
        self.left_out: dict[str, list] = {}  # reason -> [how many, where first]
        self.forms: dict[str, dict[str, None]] = {}  # form -> files

    def take(self, file: str, where: str, row: Any) -> list[dict] | None:
        """The messages of a row, in our form; None where it is left out."""
        try:
            if isinstance(row, Unusable):
                raise row
            messages, form, repairs = conversation_of(row)
        except Unusable as e:
            self.left_out.setdefault(str(e), [0, f"{file} {where}".strip()])[0] += 1
            return None
        self.taken += 1
        self.mended += bool(repairs)
        self.repairs.update(repairs)
        self.forms.setdefault(form, {})[file] = None
        return messages

    def read(self, files: Iterable[Path], root: Path) -> Iterator[list[dict]]:
        """The conversations of files, named by their path below `root`."""
        for path in files:
            name = str(path.relative_to(root))
            for where, row in rows_of(path):
                if messages := self.take(name, where, row):
                    yield messages

    def lines(self) -> list[str]:
        """What to say: a line on each form but `messages`, and one on all."""
        said = [f"{some(list(files))}: taken for {form}" for form, files in self.forms.items() if form != "messages"]
        return [*said, f"{self.taken:,} conversations taken{self._repaired()}; {self.lost()}"]

    def _repaired(self) -> str:
        how = ", ".join(f"{n:,} {what}" for what, n in self.repairs.most_common())
        return f", {self.mended:,} of them repaired ({how})" if self.mended else ""

    def lost(self) -> str:
        worst = sorted(self.left_out.items(), key=lambda entry: -entry[1][0])
        why = "; ".join(f"{n:,} {reason}, first {where}" for reason, (n, where) in worst)
        return f"{sum(n for n, _ in self.left_out.values()):,} left out" + (f" ({why})" if why else "")
