"""Command lines put together at random: every command ends with 0, or with one line and an exit status.

`FUZZ=5000 pytest -m slow tests/test_fuzz_commands.py` tries so many.
"""

import argparse
import contextlib
import importlib
import io
import json
import re
import shutil
import sys
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from report_fakes import full_run

from conftest import ROOT, fuzzed
from nanochat_jax.cli import positive
from nanochat_jax.config import RunConfig

# Modules with a main, and words that may stand before its options
COMMANDS = {
    "run_speedrun": [()],
    "nanochat_jax.chat": [()],
    "nanochat_jax.export": [()],
    "nanochat_jax.import": [()],
    "nanochat_jax.planning.experiment": [()],
    "nanochat_jax.scaling": [()],
    "nanochat_jax.checkpoint.__main__": [()],
    "nanochat_jax.data.__main__": [(), ("check",), ("ls",), ("download",)],
    "nanochat_jax.bench.__main__": [(), ("demo",), ("train",), ("nothing",)],
    "tokenizer.__main__": [(), ("train",), ("evaluate",)],
    "evals.__main__": [(), ("show",), ("compare",), ("report",)],
    "server.__main__": [()],
}
WORDS = [
    "",
    "0",
    "-1",
    "1",
    "3",
    "1.5",
    "nan",
    "inf",
    "1e6",
    "010",
    "2025-10-01",
    "no",
    "on",
    "null",
    "~",
    "\u00e9\U0001f642",
]
WORDS += [
    "base",
    "sft",
    "rl,eval",
    "sft,",
    ",",
    "foo",
    "gsm8k",
    "bpb,core",
    "float32",
    "h100",
    "a100",
    "*",
    "[1",
    "{a: 1}",
]
WORDS += [
    "{chat: 1}",
    "{chat: 0}",
    "{foo: 1}",
    "a=b",
    "=",
    "a\nb",
    "a" * 300,
    "-",
    "--",
    "%s",
    "{0}",
    "grpo",
    "SSL",
    "127.0.0.1",
]
WORDS += ["../x", "/", "/proc/x", "/dev/null", "localhost", "99999", "18446744073709551616", "demo", "[", "(", "\\"]


def settings_of(cls=RunConfig, prefix=""):
    """The names of all settings and sections."""
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        yield prefix + field.name
        if is_dataclass(hints[field.name]):
            yield from settings_of(hints[field.name], f"{prefix}{field.name}.")


SETTINGS = [*settings_of(), "model.dept", "sft", "", "a.b.c", "sft.mixture.chat", "mesh.x"]
TINY = {"model": {"depth": 2, "width": 32, "head_dim": 16, "sequence_len": 128}, "data": {"pack_workers": 0}}


class Place:
    """What a person may have lying about."""

    def __init__(self, folder: Path):
        self.folder = folder
        full_run(folder / "run")
        for name in ("cut", "odd", "binary"):  # runs of which some files are damaged
            shutil.copytree(folder / "run", folder / name)
        for path in sorted(p for p in (folder / "cut").rglob("*") if p.is_file())[::3]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        for path in sorted(p for p in (folder / "odd").rglob("*.json*") if p.is_file()):
            path.write_text("[7]\n")
        for path in sorted(p for p in (folder / "binary").rglob("*") if p.is_file())[1::2]:
            path.write_bytes(b"\xff\x00\xfe")
        (folder / "new").mkdir()
        (folder / "new" / "config.yaml").write_text(yaml.safe_dump(TINY))
        (folder / "empty").mkdir()
        (folder / "file").write_text("no folder")
        shutil.copytree(ROOT / "configs", folder / "configs")
        for name, text in {
            "tiny": yaml.safe_dump(TINY),
            "list": "- 1",
            "bad": "a: [",
            "text": "x",
            "nothing": "",
        }.items():
            (folder / f"{name}.yaml").write_text(text)
        (folder / "wrong.yaml").write_text("model: {depth: two}\nsft: 7\n")
        (folder / "twice.yaml").write_text("model: {depth: 2}\nmodel: {depth: 3}\n")
        (folder / "latin.yaml").write_bytes(b"# \xe9\nseed: 1\n")
        (folder / "M" / "chat").mkdir(parents=True)
        said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        (folder / "M" / "chat" / "a.jsonl").write_text((json.dumps({"messages": said}) + "\n{\n") * 5)
        (folder / "M" / "a.txt").write_text("some text " * 50)
        (folder / "M" / "b.txt").write_text("some more text " * 50)
        (folder / "weights").mkdir()
        (folder / "weights" / "config.json").write_text('{"model_type": "nanochat"}')
        (folder / "weights" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
        self.paths = sorted(p.name for p in folder.iterdir()) + [
            "none",
            "run:sft",
            "run:foo",
            "M/chat",
            "M/a.txt",
            "file/x",
        ]
        self.paths += ["run/sft", "run/config.yaml", "odd:rl", "weights/config.json", "M/chat/a.jsonl"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def stubs(place, monkeypatch):
    """What would train, plan, fetch or measure for hours is left out; all that leads to it is as it is."""
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr("run_speedrun.ROOT", place.folder)
    monkeypatch.setattr("run_speedrun.run_stage", lambda run, name: None)
    monkeypatch.setattr("nanochat_jax.planning.plan.main", lambda config, args: 0)
    monkeypatch.setattr("nanochat_jax.planning.sweep.ROOT", place.folder)
    monkeypatch.setattr("nanochat_jax.planning.sweep.train", lambda points, out: [])
    monkeypatch.setattr("nanochat_jax.planning.experiment.ROOT", place.folder)
    for name in ("experiment", "attempts"):
        monkeypatch.setattr(f"nanochat_jax.planning.{name}.train", lambda points, out, jobs=1, keep=True: [])
    monkeypatch.setattr("nanochat_jax.planning.sweep.show_plan", lambda points, args: None)
    monkeypatch.setattr("nanochat_jax.bench.__main__.load", lambda what: Bench)
    monkeypatch.setattr("nanochat_jax.data.__main__.DOWNLOADS", place.folder / "cache" / "hub")
    monkeypatch.setattr("nanochat_jax.devices.use_compilation_cache", lambda folder: None)
    monkeypatch.setattr("nanochat_jax.devices.prepare", lambda: None)


class Bench:
    """A benchmark."""

    @staticmethod
    def options(parser):
        parser.add_argument("--seeds", type=int)

    @staticmethod
    def run(args):
        return {}


def run(module, argv):
    """(exit status, stdout, stderr); whatever is raised but for SystemExit is raised."""
    out, err, stdin = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = importlib.import_module(module).main(argv)
            except SystemExit as e:  # argparse
                status = e.code
    finally:
        sys.stdin = stdin
    return status or 0, out.getvalue(), err.getvalue()


class Asked(Exception):
    """What a command's parser knows: its actions."""


def actions_of(module, words):
    """The arguments that a command takes, without --help and its subcommands."""

    def ask(parser, argv=None, namespace=None):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and words:
                parser = action.choices[words[-1]]
        raise Asked(*(a for a in parser._actions if a.dest != "help" and a.dest != words))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", ask)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", ask)
        try:
            importlib.import_module(module).main([*words])
        except Asked as e:
            return list(e.args)
    return []


NUMBERS = ["1", "0", "2", "7", "-1", "100", "0.5", "nan", "inf", "1e9", "99999999999999999999"]


def values_of(action, place):
    """What may stand for an argument: mostly something of its kind."""
    what = " ".join([action.dest, *action.option_strings])
    if action.choices:
        fit = [str(c) for c in action.choices]
    elif action.type in (int, float, positive):
        fit = NUMBERS[: 6 if action.type is not float else None]
    elif re.search("run|dir$|directory", what):
        fit = ["run", "run", "cut", "odd", "binary", "new", "run:sft", "run/sft", "run:rl", "none"]
    elif "stage" in what:
        fit = ["base", "sft", "rl", "tokenizer,base", "sft,rl,eval", "eval", "report", "foo"]
    elif "tasks" in what:
        fit = ["gsm8k", "bpb,core", "gsm8k,mmlu", "samples", "foo"]
    elif "settings" in what:
        return st.builds("{}={}".format, st.sampled_from(SETTINGS), st.sampled_from([*WORDS, *NUMBERS, *place.paths]))
    elif re.search("config|mesh|FILE|file", what):
        fit = [p for p in place.paths if p.endswith(".yaml")] + [
            "configs/d12.yaml",
            "configs/mesh/h100_x8.yaml",
            "configs/miniseries_cpu.yaml",
        ]
    else:
        fit = place.paths
    fit = st.sampled_from(fit)
    return st.integers(0, 19).flatmap(lambda n: fit if n else st.sampled_from([*WORDS, *place.paths]))


@st.composite
def lines(draw, known, place):
    module, words, actions = draw(st.sampled_from(known))
    positional, optional = [], []
    for action in actions:
        if not action.option_strings:
            least, most = {"*": (0, 3), "?": (0, 1), "A...": (1, 1)}.get(action.nargs, (action.nargs or 1,) * 2)
            positional += [draw(values_of(action, place)) for _ in range(draw(st.integers(least, most)))]
        elif draw(st.integers(0, 19)) if action.required else not draw(st.integers(0, 5)):
            optional.append(draw(st.sampled_from(action.option_strings)))
            if action.nargs != 0 and draw(st.integers(0, 19)):
                optional.append(draw(values_of(action, place)))
    stray = [draw(st.sampled_from(WORDS))] if not draw(st.integers(0, 19)) else []
    return module, [*words, *(positional + optional if draw(st.booleans()) else optional + positional), *stray]


@pytest.mark.parametrize("examples", fuzzed(300))
def test_command_lines(place, stubs, examples):
    known = [(m, words, actions_of(m, words)) for m, several in COMMANDS.items() for words in several]
    known += [k for k in known if k[0] in ("run_speedrun", "nanochat_jax.scaling")] * 4
    assert all(
        actions for module, words, actions in known if "nothing" not in words and words or len(COMMANDS[module]) == 1
    )

    @examples
    @given(lines(known, place))
    def holds(line):
        module, argv = line
        assume("\0" not in "".join(argv))
        status, out, err = run(module, argv)
        assert status in (0, 1, 2, 130), (status, err)
        assert "Traceback" not in out + err
        if status:
            *before, last = err.strip().splitlines()
            if "\n" not in "".join(argv) and not re.match(r"\S.*: error: |usage: ", last):  # argparse's own, or ours
                assert re.match(r"(error|interrupted)", last) and len(last) < 1000, err
                assert not any(text.startswith("error") for text in before), err

    holds()
    assert not [p for p in place.folder.rglob("*.part")]
