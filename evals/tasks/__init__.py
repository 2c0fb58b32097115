"""The tasks by name, from whichever source has their rows.

    task = load_task("gsm8k", split="test", data=config.data, cache_dir=cache_dir)

Local files have the hub's columns: tasks/gsm8k_main_test.parquet, chat/*.jsonl.gz, words/*.txt.gz below data.dir.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from evals.tasks.base import FromRows, Task, read_rows
from evals.tasks.conversations import Conversations, Texts, read_chats
from evals.tasks.everyday import Everyday
from evals.tasks.gsm8k import GSM8K
from evals.tasks.humaneval import HumanEval
from evals.tasks.identity import Identity
from evals.tasks.multiple_choice import ARC, MMLU, Facts
from evals.tasks.plain import KINDS, Talk
from evals.tasks.spelling import Spelling, SpellingBee, read_words
from nanochat_jax.config import DataConfig, RunConfig
from nanochat_jax.data.embedded import documented_words
from nanochat_jax.data.sources import open_documents, source_of
from nanochat_jax.data.tables import CHAT_REPO, ROWS
from nanochat_jax.errors import UserError

VERSION = 5  # of what the tasks say: part of the key of packed conversations

_FROM_ROWS: dict[str, Callable[[Sequence[dict]], FromRows]] = {
    "arc_easy": partial(ARC, name="arc_easy"),
    "arc_challenge": partial(ARC, name="arc_challenge"),
    "mmlu": MMLU,
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
}
_GENERATED: dict[str, Callable[[str], Task]] = {
    **KINDS,
    "talk": Talk,
    "facts": Facts,
    "identity": lambda split: Identity(),
}
_ON_WORDS = {"spellingbee": SpellingBee, "spelling": Spelling}
MADE_HERE = (*_GENERATED, *_ON_WORDS)
TASKS = (*ROWS, *MADE_HERE, "everyday", "text", "chat")


def check_names(config: RunConfig) -> None:
    """UserError for a task that the settings name and that there is none of."""
    named: dict = {"evals.chat_tasks": config.evals.chat_tasks, "mid.mixture": config.mid.mixture}
    named |= {"sft.mixture": config.sft.mixture, "rl.task": config.rl.task}
    for setting, tasks in named.items():
        for name in [tasks] if isinstance(tasks, str) else tasks or ():
            if name not in TASKS:
                raise UserError(f"{setting} names {name!r}, and there are the tasks {', '.join(sorted(TASKS))}")


def available(data: DataConfig, split: str) -> list[str]:
    """The names of the tasks with a score that the data source has rows of, for a split."""
    source = source_of(data)
    if source == "embedded":
        return [*KINDS, "everyday"]
    if source == "hub":
        return [name for name, rows in ROWS.items() if split in rows.hub_splits] + ["spellingbee"]
    return [name for name, rows in ROWS.items() if _local_files(data, "tasks", rows.files.get(split))] + ["spellingbee"]


def trainable(data: DataConfig) -> list[str]:
    """The names of the tasks with training rows."""
    source = source_of(data)
    names = [*MADE_HERE, "text"] + [n for n in available(data, "train") if n not in (*MADE_HERE, "everyday")]
    if source == "hub" or (source == "local" and _local_files(data, "chat", "*.jsonl.gz")):
        names.append("chat")
    return names


def load_task(name: str, *, split: str, data: DataConfig, cache_dir: Path) -> Task:
    """A task's train or test split. UserError for an unknown name, or rows that are not to be had."""
    if name not in TASKS:
        raise UserError(f"unknown task {name}; there are {', '.join(TASKS)}")
    if name in _GENERATED:
        return _GENERATED[name](split)
    if name in _ON_WORDS:
        found = _local_files(data, "words", "*.txt*")
        return _ON_WORDS[name](read_words(found[0]) if found else documented_words(), split)
    if name == "everyday":
        return Everyday()
    if name == "text":
        return Texts(open_documents(data, cache_dir))
    if name == "chat":
        return Conversations(_chats(data, cache_dir), split)
    rows, source = _table(name, split, data, cache_dir)
    task = _FROM_ROWS[name](rows)
    task.source = source
    return task


def _local_files(data: DataConfig, folder: str, pattern: str | None) -> list[Path]:
    return sorted((Path(data.dir) / folder).glob(pattern)) if data.dir and pattern else []


def _table(name: str, split: str, data: DataConfig, cache_dir: Path) -> tuple[Sequence[dict], str]:
    """The rows of a task's split, and where they are."""
    rows = ROWS[name]
    if source_of(data) == "hub":
        if split not in rows.hub_splits:
            raise UserError(f"task {name} has no split {split}")
        of_hub = rows.repo, rows.config, rows.hub_splits[split]
        return _from_hub(*of_hub, cache_dir), " ".join(filter(None, of_hub))
    found = _local_files(data, "tasks", rows.files.get(split))
    if not found:
        wanted = rows.files.get(split) or f"rows of split {split}, which it does not have"
        raise UserError(f"task {name} needs {wanted} in the folder tasks of data.dir ({data.dir or 'not set'})")
    return read_rows(found[0]), str(found[0])


def _chats(data: DataConfig, cache_dir: Path) -> Sequence[dict]:
    if source_of(data) == "hub":
        return _from_hub(CHAT_REPO, None, "train", cache_dir)
    rows = read_chats(Path(data.dir) / "chat") if data.dir else []
    if not rows:
        raise UserError(f"task chat needs *.jsonl.gz in the folder chat of data.dir ({data.dir or 'not set'})")
    return rows


def _from_hub(repo: str, config: str | None, split: str, cache_dir: Path) -> Sequence[dict]:
    from nanochat_jax.data.hub import task_table

    return task_table(repo, config, split, Path(cache_dir) / "hub")
