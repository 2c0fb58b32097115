"""Conversations as ids and a loss mask: one renderer for training, evals, RL and the server.

    <|bos|> <|user_start|> ... <|user_end|> <|assistant_start|> ... <|assistant_end|> <|user_start|> ...

What the assistant says is a target (mask 1): its text, its tool calls with both their delimiters, and assistant_end.
What others say is not (mask 0): users, tool output with its delimiters, bos, and assistant_start.

Thoughts are text as well, between marks that are no special tokens: "<think> 3*4 is 12. </think> There are 12." The
marks stand apart by spaces, where no token goes across.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

from nanochat_jax.errors import UserError
from tokenizer.tokenizer import Tokenizer

PART_TYPES = ("text", "think", "python", "python_output")
CALLS = PART_TYPES[2:]
THOUGHTS = "<think>", "</think>"
Turn = tuple[str, list[dict]]  # (role, parts); a user's has one part


def _turns(messages: Sequence[dict]) -> list[Turn]:
    """The turns, checked; a system message is put before the first user's text. UserError."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError("a conversation needs a list of messages that is not empty")
    turns: list[Turn] = []
    system = ""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f"message {i} needs a role and a content")
        role, content = message["role"], message["content"]
        if role == "system":
            if i:
                raise UserError(f"message {i} is a system message, which only message 0 may be")
            if not isinstance(content, str):
                raise UserError(f"message {i}: the content of a system message must be a string")
            system = content + "\n\n"
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            raise UserError(f"message {i} is from {role!r}, but it is the turn of {expected!r}")
        parts = _parts(i, role, content)
        if not turns:
            parts = [{"type": "text", "text": system + parts[0]["text"]}]
        turns.append((role, parts))
    if not turns:
        raise UserError("message 0 is a system message, and no user message follows it")
    return turns


def _parts(i: int, role: str, content) -> list[dict]:
    """The content of message i as a list of parts; a single one for a user."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise UserError(f"message {i}: content must be a string or a list of parts, not {type(content).__name__}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in PART_TYPES or not isinstance(part.get("text"), str):
            raise UserError(f"message {i}: a part needs a type ({', '.join(PART_TYPES)}) and a text, not {part!r:.80}")
    if role != "user":
        return _with_marks(content)
    if any(part["type"] != "text" for part in content):
        raise UserError(f"message {i}: a user message may hold text only")
    return [{"type": "text", "text": "".join(part["text"] for part in content)}]


def _with_marks(parts: Sequence[dict]) -> list[dict]:
    """Parts with thoughts as text between their marks; texts that follow each other are one."""
    out: list[dict] = []
    before = ""
    for part in parts:
        kind, text = part["type"], part["text"]
        if kind == "think":
            text = " ".join((THOUGHTS[0], text, THOUGHTS[1]))
        elif kind == "text" and before == "think":
            text = f" {text}"
        if kind not in CALLS and before not in ("", *CALLS):
            out[-1] = {"type": "text", "text": out[-1]["text"] + text}
        else:
            out.append({"type": kind if kind in CALLS else "text", "text": text})
        before = kind
    return out


def render(tok: Tokenizer, conversation: dict) -> tuple[list[int], list[int]]:
    """A conversation as (ids, mask), lists of equal length; mask 1 where a token is a target. {"text": a document} is
    <|bos|> and the text, all of it targets.

    Raises UserError that names the message if roles do not alternate from a user on, or a content is malformed.
    """
    return render_batch(tok, [conversation], threads=1)[0]


def render_batch(tok: Tokenizer, conversations: Sequence[dict], threads: int) -> list[tuple[list[int], list[int]]]:
    """`render` of each conversation, with so many threads that tokenize."""
    return _render(tok, [_turns_of(conversation) for conversation in conversations], threads)


def _turns_of(conversation: dict) -> list[Turn]:
    if not isinstance(conversation, dict) or not {"messages", "text"} & set(conversation):
        raise UserError('a conversation is a mapping with "messages", or a document one with "text"')
    if "text" in conversation:
        return [("document", [{"type": "text", "text": conversation["text"]}])]
    return _turns(conversation["messages"])


def _render(tok: Tokenizer, conversations: list[list[Turn]], threads: int) -> list[tuple[list[int], list[int]]]:
    texts = [part["text"] for turns in conversations for _, parts in turns for part in parts]
    encoded = iter(tok.encode_batch(texts, num_threads=threads))
    rendered = []
    for turns in conversations:
        segments = [([tok.bos], 0)]  # (ids, whether they are targets)
        for role, parts in turns:
            if role == "document":
                segments.append((next(encoded), 1))
                continue
            if role == "user":
                segments.append(([tok.user_start, *next(encoded), tok.user_end], 0))
                continue
            segments.append(([tok.assistant_start], 0))
            for part in parts:
                if part["type"] == "text":
                    segments.append((next(encoded), 1))
                elif part["type"] == "python":
                    segments.append(([tok.python_start, *next(encoded), tok.python_end], 1))
                else:
                    segments.append(([tok.output_start, *next(encoded), tok.output_end], 0))
            segments.append(([tok.assistant_end], 1))
        mask = chain.from_iterable([target] * len(ids) for ids, target in segments)
        rendered.append((list(chain.from_iterable(ids for ids, _ in segments)), list(mask)))
    return rendered


def render_prompt(tok: Tokenizer, messages: Sequence[dict]) -> list[int]:
    """Ids for the model to go on from: messages that end with a user's, then assistant_start, or up to the end of what
    the assistant has said. Raises UserError."""
    turns = _turns(messages)
    ((ids, _),) = _render(tok, [turns], threads=1)
    return [*ids, tok.assistant_start] if turns[-1][0] == "user" else ids[:-1]


class Thinking:
    """Tells thoughts from what is said, as text comes. Thoughts are at the beginning, or behind a call."""

    def __init__(self) -> None:
        self.kind = self._held = ""  # text or think, which is not known before the first characters
        self._space = False  # one may come that belongs to a mark

    def push(self, text: str, last: bool = False) -> list[tuple[str, str]]:
        """What a piece of text brings, as (kind, text); what may begin a mark waits. last: nothing follows it."""
        opening, closing = THOUGHTS
        self._held, out = self._held + text, []
        if not self.kind and self._held.startswith(opening):
            self.kind, self._held, self._space = "think", self._held[len(opening) :], True
        elif not self.kind and (last or not opening.startswith(self._held)):
            self.kind = "text"
        if self._space and self._held:
            self._held, self._space = self._held.removeprefix(" "), False
        if self.kind == "think":
            thought, closed, rest = self._held.partition(closing)
            if closed:
                out.append(("think", thought.removesuffix(" ")))
                self.kind, self._held, self._space = "text", rest.removeprefix(" "), not rest
            else:
                end = len(thought) if last else self._certain()
                out.append(("think", thought[:end]))
                self._held = thought[end:]
        if self.kind == "text":
            out.append(("text", self._held))
            self._held = ""
        return [(kind, said) for kind, said in out if said]

    def end(self) -> list[tuple[str, str]]:
        """What is left before a call, or at the end; behind it all begins anew."""
        out = self.push("", last=True)
        self.kind, self._space = "", False
        return out

    def _certain(self) -> int:
        """Characters of what is held that begin no mark."""
        mark, held = f" {THOUGHTS[1]}", self._held
        begun = (n for which in (mark, mark[1:]) for n in range(1, len(which)) if held.endswith(which[:n]))
        return len(held) - max(begun, default=0)


def parse_completion(tok: Tokenizer, ids: Iterable[int]) -> tuple[str, list[dict]]:
    """What an assistant said as (visible text, parts). Never fails: a model may open and close tool calls at will.

    The visible text is the text parts alone. Reads up to assistant_end or bos; a call that is cut off ends there.
    """
    kinds = {tok.python_start: "python", tok.output_start: "python_output"}
    kinds |= {tok.python_end: "text", tok.output_end: "text"}
    held: list[tuple[str, list[int]]] = [("text", [])]
    for id in ids:
        if id in (tok.assistant_end, tok.bos):
            break
        if id in kinds:
            held.append((kinds[id], []))
        else:
            held[-1][1].append(id)
    parts, thinking = list[dict](), Thinking()
    for kind, mine in held:
        said = thinking.push(tok.decode(mine)) if kind == "text" else [*thinking.end(), (kind, tok.decode(mine))]
        parts += ({"type": k, "text": text} for k, text in said)
    parts += ({"type": k, "text": text} for k, text in thinking.end())
    return "".join(part["text"] for part in parts if part["type"] == "text"), parts
