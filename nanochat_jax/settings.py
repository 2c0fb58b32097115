"""Every setting with its default and the comment that stands beside it in config.py: `run_speedrun.py --settings`."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import yaml

from nanochat_jax.config import RunConfig
from nanochat_jax.errors import UserError


def described(word: str = "") -> str:
    """`key = default   # comment` of every setting, or of those whose key or comment holds `word` in any case, below
    the docstrings of their sections. UserError where no setting does."""
    blocks = []
    for title, rows in _sections(RunConfig()):
        found = [(setting, said) for setting, said in rows if word.lower() in f"{setting} {said}".lower()]
        width = max((len(setting) for setting, _ in found), default=0)
        if found:
            blocks.append("\n".join([f"# {title}", *(f"{setting:{width}}   # {said}" for setting, said in found)]))
    if not blocks:
        raise UserError(f"no setting has {word!r} in its name or its comment; --settings alone prints all of them")
    return "\n\n".join(blocks)


def _sections(config: Any, path: str = "") -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(title, its (`key = default`, comment)) of a configuration and then of each section in it."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    nested = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    said = comments(type(config))
    title = f"{path.rstrip('.')}: {inspect.getdoc(config)}".removeprefix(": ")
    yield title, [(f"{path}{name} = {_written(values[name])}", said[name]) for name in values if name not in nested]
    for name, value in nested.items():
        yield from _sections(value, f"{path}{name}.")


def _written(value: Any) -> str:
    """As it may be given on the command line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).split("\n")[0]


def comments(cls: type) -> dict[str, str]:
    """The comment of each field of a dataclass, above it or beside it, with YAML's word for None."""
    found, said = {}, ""
    for line in inspect.getsource(cls).splitlines():
        code, _, comment = line.strip().partition("# ")
        said = f"{said} {comment}".strip()
        if code:
            found[code.split(":")[0]], said = said.replace("None", "null"), ""
    return found
