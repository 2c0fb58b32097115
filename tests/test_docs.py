"""Every command that the documentation gives: run on a tiny model, or checked against what its program takes.

A command that none of the rules knows is an error, so that the documentation cannot grow past its tests.
"""

import contextlib
import gzip
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import evals.stage
import evals.tasks
import run_speedrun
from conftest import ROOT
from nanochat_jax import processes
from nanochat_jax.config import load_config

TOOLS = "pip|git|tmux|tail|ssh|rsync|sbatch|kubectl|sky|docker"
PROGRAMS = ("uv", "JAX_PLATFORMS=cpu", *TOOLS.split("|"))
RUN = (  # in the order of the documents: some make what later ones take
    r"run_speedrun.py --(plan|budget) ",
    r"-m evals --run-dir runs/demo --stage sft",
    r"-m evals (show|compare|report) runs/demo(?!.*backwards)",
    r"-m evals report",
    r"-m evals .*backwards",
    r"-m tokenizer evaluate",
    r"-m nanochat_jax.(checkpoint|export|import)",
    r"-m nanochat_jax.chat .*-p",
    r"run_speedrun.py --config runs/(backwards|mine)",
    r"run_speedrun.py --config configs/(hindi|demo).yaml",
)
FLAGS = (  # for a GPU, a network, hours, or somebody who watches
    r"run_speedrun.py( --config configs/d24| --config configs/d12| model.arch=next|$)",
    r"-m nanochat_jax.(bench|data|scaling|chat|planning.experiment)",
    r"-m server",
    r"-m evals --run-dir runs/demo --tasks humaneval",
    r"tests/kill_runs.py",
)
ELSEWHERE = (
    rf"^({TOOLS}) ",
    r"^uv (sync|run (pytest|ruff|lint-imports|--directory))",
)
FOLDERS = ("README.md", "nanochat_jax", "tokenizer", "evals", "server", "configs")


def documents() -> list[Path]:
    """The README files that git tracks, but for the tests', in reading order."""

    def place(path: Path) -> tuple:
        part = path.parts[0]
        return FOLDERS.index(part) if part in FOLDERS else len(FOLDERS), len(path.parts), str(path)

    found = subprocess.check_output(["git", "-C", ROOT, "ls-files", "README.md", "*/README.md"], text=True)
    return sorted((p for p in map(Path, found.splitlines()) if "tests" not in p.parts), key=place)


def commands() -> list[str]:
    """Those of all fenced blocks and of code spans, without their comments, `a|b` as the first."""
    found = []
    for path in documents():
        text = (ROOT / path).read_text()
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
        for block in blocks + re.findall(r"`(uv run [^`]+)`", text):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"\s+#\s|\s*&&\s*", line)[: None if "&&" in line else 1]:
                    if part.split(" ")[0] in PROGRAMS:
                        found.append(re.sub(r"(\w+)\|[\w|]+", r"\1", " ".join(part.split())))
    return list(dict.fromkeys(found))


def program(command: str) -> list[str]:
    """What follows `uv run` and the options that uv takes."""
    words = [w for w in shlex.split(command.split(" > ")[0]) if not w.startswith("JAX_PLATFORMS=")]
    words = words[2:] if words[:2] == ["uv", "run"] else words
    words = words[2:] if words[0] == "--extra" else words
    return words[1:] if words[0] == "python" else words


def start(words: list[str], monkeypatch) -> int:
    """Runs a program in this process; its exit status."""
    if words[0] == "run_speedrun.py":
        args = words[1:]
        if "--stages" in args and "--run-dir" not in args:  # the default is in the checkout
            args += ["--run-dir", f"runs/{Path(args[args.index('--config') + 1]).stem}"]
        return run_speedrun.main(args)
    # It would put another process in this one's place.
    monkeypatch.setattr(processes, "restart_with_huge_pages", lambda: None)
    name, args = (words[1], words[2:]) if words[0] == "-m" else (None, words[1:])
    monkeypatch.setattr(sys, "argv", [name or words[0], *args])
    try:
        if name:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def matches(rules, command: str) -> bool:
    return any(re.search(rule, command) for rule in rules)


@pytest.fixture(scope="module")
def work(whole, place, tmp_path_factory):
    """A folder to stand in: runs/demo is a tiny run, the configurations are tiny, and there is something in Hindi."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(whole[0], folder / "runs" / "demo")
    shutil.copytree(ROOT / "configs", folder / "configs")
    tiny = (place / "tiny.yaml").read_text().replace("batch_tokens: 512", "batch_tokens: 1024")  # for eight devices
    (folder / "configs" / "demo.yaml").write_text(tiny)
    mixtures = "mid: {mixture: {chat: 1}, max_rows: 8", "sft: {mixture: {chat: 1}, max_rows: 8"
    hindi = (
        re.sub(r"data: .*\n", "", tiny)
        .replace("mid: {max_rows: 320", mixtures[0])
        .replace("61440", "2048")
        .replace("600", "520")
    )
    hindi = hindi.replace("sft: {max_rows: 320", mixtures[1]).replace("[facts, spellingbee]", "[facts]")
    (folder / "configs" / "hindi.yaml").write_text(hindi + "data: {pack_workers: 0}\n")
    says = [f"यह वाक्य संख्या {n} है। नदी के किनारे {n} पेड़ हैं और हर पेड़ पर {n + 2} पक्षी बैठे हैं।" for n in range(400)]
    (folder / "hindi" / "pretrain").mkdir(parents=True)
    for i, part in enumerate((says[:360], says[360:])):
        pq.write_table(pa.table({"text": part}), folder / "hindi" / "pretrain" / f"part-00{i}.parquet")
    (folder / "hindi" / "chat").mkdir()
    with gzip.open(folder / "hindi" / "chat" / "conversations.jsonl.gz", "wt", encoding="utf-8") as f:
        for n in range(60):
            turns = ("user", f"{n} के बाद क्या आता है?"), ("assistant", f"{n + 1} आता है।")
            f.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}, ensure_ascii=False) + "\n")
    shutil.copytree(folder / "hindi", folder / "mine")  # somebody's own conversations
    shutil.copy(place / "data" / "pretrain" / "shard_0.parquet", folder / "text.parquet")
    (folder / "texts").mkdir()
    (folder / "texts" / "book.txt").write_text("\n\n".join(pq.read_table(folder / "text.parquet")["text"].to_pylist()))
    return folder


@pytest.fixture(autouse=True)
def the_new_task(monkeypatch):
    """The task of evals/tasks/README.md, entered as it says there."""
    text = (ROOT / "evals" / "tasks" / "README.md").read_text()
    scope = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], scope)
    monkeypatch.setitem(evals.tasks._GENERATED, "backwards", scope["Backwards"])
    monkeypatch.setattr(evals.tasks, "MADE_HERE", (*evals.tasks.MADE_HERE, "backwards"))
    known = (*evals.tasks.TASKS, "backwards")
    monkeypatch.setattr(evals.tasks, "TASKS", known)
    monkeypatch.setattr(evals.stage, "TASKS", known)
    return scope["Backwards"]


def test_the_new_task_of_the_documentation_has_twenty_lines_and_a_verdict(the_new_task):
    task = the_new_task("test")
    conversation = task[3]
    answer = conversation["messages"][-1]["content"]
    assert task.evaluate(conversation, f" {answer} ") and not task.evaluate(conversation, answer + "x")
    text = (ROOT / "evals" / "tasks" / "README.md").read_text()
    assert len(re.search(r"```python\n(.*?)```", text, re.S)[1].splitlines()) <= 20


def with_marks(command):
    return pytest.param(command, marks=pytest.mark.slow) if matches(RUN, command) else command


@pytest.mark.parametrize("command", map(with_marks, commands()))
def test_command(command, work, monkeypatch, capsys):
    rules = [matches(rules, command) for rules in (RUN, FLAGS, ELSEWHERE)]
    assert any(rules), "no rule of this test knows this command"
    for path in re.findall(r"\bconfigs/[\w/.]+", command):
        assert (ROOT / path).is_file(), path
    if rules[0]:
        monkeypatch.chdir(work)
        words = [w.replace("some/text.parquet", "text.parquet") for w in program(command)]
        assert start(words, monkeypatch) == 0, capsys.readouterr().err
    elif rules[1]:
        words = program(command)
        asked = words[: 3 if words[0] == "-m" and words[1] in ("nanochat_jax.bench", "nanochat_jax.data") else 2]
        asked = words[:1] if words[0].endswith(".py") else [w for w in asked if not w.startswith("--")]
        with pytest.raises(SystemExit) if words[0] == "run_speedrun.py" else contextlib.nullcontext():
            start([*asked, "--help"], monkeypatch)
        said = capsys.readouterr().out
        for flag in (w.split("=")[0] for w in words[1:] if re.match(r"--?[a-z]", w) and w != "-m"):
            assert re.search(rf"(^|[\s\[,|]){re.escape(flag)}\b", said), f"{flag} is not an option:\n{said}"


def test_configurations_of_the_documentation_load():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if "experiment" not in path.name and "miniseries" not in path.name:
            load_config(path)
