"""Which dataset of the hub, or which local file, has the rows of each task."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """Where a task's rows are: a local file and a hub dataset, for each split that the task is used with."""

    files: dict[str, str]  # split -> glob pattern in tasks/
    repo: str
    config: str | None
    hub_splits: dict[str, str]


def _rows(config: str, repo: str, stem: str) -> Rows:
    files = {"train": f"{stem}_train.parquet", "test": f"{stem}_test.parquet"}
    return Rows(files, repo, config, {"train": "train", "test": "test"})


ROWS = {
    "arc_easy": _rows("ARC-Easy", "allenai/ai2_arc", "arc_ARC-Easy"),
    "arc_challenge": _rows("ARC-Challenge", "allenai/ai2_arc", "arc_ARC-Challenge"),
    "mmlu": Rows(
        {"train": "mmlu_auxiliary_train*.parquet", "test": "mmlu_all_test.parquet"},
        "cais/mmlu",
        "all",
        {"train": "auxiliary_train", "test": "test"},
    ),
    "gsm8k": _rows("main", "openai/gsm8k", "gsm8k_main"),
    "humaneval": Rows({"test": "humaneval_test.parquet"}, "openai/openai_humaneval", None, {"test": "test"}),
}
CHATS = {  # task -> its table of conversations: (dataset, configuration, split)
    "chat": ("HuggingFaceTB/smol-smoltalk", None, "train"),
    "xlam": ("Salesforce/xlam-function-calling-60k", None, "train"),
    "glaive": ("glaiveai/glaive-function-calling-v2", None, "train"),
    "hermes": ("NousResearch/hermes-function-calling-v1", "func_calling", "train"),
    "toolace": ("Team-ACE/ToolACE", None, "train"),
}
