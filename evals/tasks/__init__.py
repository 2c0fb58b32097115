"""The tasks by name, from whichever source has their rows.

Local files have the hub's columns: tasks/gsm8k_main_test.parquet, words/*.txt.gz below data.dir. What chat/ may hold is
in `nanochat_jax.chats`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from evals.tasks.base import FromRows, Task, read_rows
from evals.tasks.conversations import Conversations, Texts, local_chats
from evals.tasks.everyday import Everyday
from evals.tasks.gsm8k import GSM8K
from evals.tasks.humaneval import HumanEval
from evals.tasks.identity import Identity
from evals.tasks.multiple_choice import ARC, MMLU, Facts
from evals.tasks.plain import KINDS, Talk
from evals.tasks.spelling import Spelling, SpellingBee, read_words
from evals.tasks.thinking import Thinking
from evals.tasks.tools import Tools
from nanochat_jax import chats, dialects, signatures
from nanochat_jax.chats import chat_files
from nanochat_jax.config import DataConfig, RunConfig, fingerprint
from nanochat_jax.data import embedded
from nanochat_jax.data.embedded import documented_words
from nanochat_jax.data.sources import open_documents, source_of
from nanochat_jax.data.tables import CHATS, ROWS
from nanochat_jax.errors import UserError
from nanochat_jax.files import digest_of

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
    "tools": Tools,
    "thinking": Thinking,
    "facts": Facts,
    "identity": lambda split: Identity(),
}
_ON_WORDS = {"spellingbee": SpellingBee, "spelling": Spelling}
MADE_HERE = (*_GENERATED, *_ON_WORDS)
_MADE_OF = Path(__file__).parent, Path(embedded.__file__).parent  # folders of code, phrases and words
TASKS = (*ROWS, *MADE_HERE, "everyday", "text", *CHATS)


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
        return [*KINDS, "tools", "thinking", "everyday"]
    if source == "hub":
        return [name for name, rows in ROWS.items() if split in rows.hub_splits] + ["spellingbee"]
    return [name for name, rows in ROWS.items() if _local_files(data, "tasks", rows.files.get(split))] + ["spellingbee"]


def trainable(data: DataConfig) -> list[str]:
    source = source_of(data)
    names = [*MADE_HERE, "text"] + [n for n in available(data, "train") if n not in (*MADE_HERE, "everyday")]
    if source == "hub":
        names += CHATS
    if source == "local" and data.dir and chat_files(Path(data.dir) / "chat")[0]:
        names.append("chat")
    return names


def load_task(name: str, *, split: str, data: DataConfig, cache_dir: Path) -> Task:
    """A task's train or test split. UserError for an unknown name, or rows that are not to be had."""
    if name not in TASKS:
        raise UserError(f"unknown task {name}; there are {', '.join(TASKS)}")
    if name in _GENERATED:
        return _GENERATED[name](split)
    if name in _ON_WORDS:
        found = _local_files(data, "words", "*.txt*")[:1]
        words = read_words(found[0]) if found else documented_words()
        return _made_of(_ON_WORDS[name](words, split), found, [] if found else [fingerprint(list(words))])
    if name == "everyday":
        return Everyday()
    if name == "text":
        return Texts(open_documents(data, cache_dir))
    if source_of(data) == "hub":
        return _hub_task(name, split, cache_dir)
    if name in CHATS:
        if name != "chat":
            raise UserError(f"task {name} is a dataset of the hub; set data.source=hub, or put its files into chat/")
        if not data.dir:
            raise UserError("task chat needs conversations in the folder chat of data.dir (not set)")
        return local_chats(Path(data.dir) / "chat", split)
    table = _table(name, split, data)
    task = _FROM_ROWS[name](read_rows(table))
    task.source = str(table)
    return _made_of(task, [table], [])


def made_by() -> str:
    """Names the rules by which tasks say what they say: their code, and the files of phrases and words."""
    files = (path for folder in _MADE_OF for path in sorted(folder.iterdir()))
    rules = (path for path in files if path.suffix in (".py", ".yaml", ".jsonl", ".txt"))
    return digest_of([*rules, *(Path(str(door.__file__)) for door in (chats, dialects, signatures))])


def _made_of(task: Task, files: Sequence[Path], key: list) -> Task:
    task.files, task.key = files, key
    return task


def _local_files(data: DataConfig, folder: str, pattern: str | None) -> list[Path]:
    return sorted((Path(data.dir) / folder).glob(pattern)) if data.dir and pattern else []


def _table(name: str, split: str, data: DataConfig) -> Path:
    files = ROWS[name].files
    found = _local_files(data, "tasks", files.get(split))
    if not found:
        wanted = files.get(split) or f"rows of split {split}, which it does not have"
        raise UserError(f"task {name} needs {wanted} in the folder tasks of data.dir ({data.dir or 'not set'})")
    return found[0]


def _hub_task(name: str, split: str, cache_dir: Path) -> Task:
    """Its key are the files in the cache of downloads, whose folders are named by the dataset's commit."""
    from nanochat_jax.data.hub import task_table

    if name in ROWS and split not in ROWS[name].hub_splits:
        raise UserError(f"task {name} has no split {split}")
    table = CHATS[name] if name in CHATS else (ROWS[name].repo, ROWS[name].config, ROWS[name].hub_splits[split])
    rows = task_table(*table, Path(cache_dir) / "hub")
    task = Conversations(rows, split, name=name) if name in CHATS else _FROM_ROWS[name](rows)
    if isinstance(task, FromRows):
        task.source = " ".join(filter(None, table))
    return _made_of(task, [], [*table, *(Path(f["filename"]).parts[-5:] for f in getattr(rows, "cache_files", []))])
