"""The data that runs read: `download` fills the cache before a machine goes offline, `ls` shows what is in it, `check`
says what conversations are before anything is trained on them.

python -m nanochat_jax.data download --dataset climbmix -n 40
python -m nanochat_jax.data download --dataset HuggingFaceFW/fineweb-edu --folder sample/10BT -n 3 --to DIR
python -m nanochat_jax.data download --dataset core
python -m nanochat_jax.data ls
python -m nanochat_jax.data check FOLDER --run-dir runs/demo
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax.cli import command, positive
from nanochat_jax.config import DataConfig, RunConfig, read_run_config
from nanochat_jax.data.bundle import FOLDER
from nanochat_jax.data.check import check
from nanochat_jax.data.download import contents, download, download_core, download_tables
from nanochat_jax.data.registry import NAMED, hub_documents
from nanochat_jax.data.tables import CHATS, ROWS
from nanochat_jax.errors import UserError
from tokenizer import load_tokenizer

DOWNLOADS = Path(__file__).resolve().parents[2] / "runs" / "cache" / "hub"  # as run_speedrun.py has them by default


def _tables() -> dict[str, list[tuple[str, str | None, str]]]:
    """Task -> the tables of the hub that it reads: (dataset, configuration, split). smoltalk is the task chat."""
    tables = {name: [(r.repo, r.config, split) for split in r.hub_splits.values()] for name, r in ROWS.items()}
    tables["smoltalk"] = [CHATS["chat"]]
    whole = [table for rows in tables.values() for table in rows]
    return {**tables, **{name: [table] for name, table in CHATS.items() if name != "chat"}, "tasks": whole}


def _download(args: argparse.Namespace) -> list[str]:
    if args.dataset == FOLDER:
        return [download_core(args.to)]
    if "/" not in args.dataset and args.dataset not in NAMED:
        tables = _tables()
        if args.dataset not in tables:
            known = ", ".join((*NAMED, FOLDER, *tables))
            raise UserError(f"there is no dataset {args.dataset}; take owner/name of the hub, or one of {known}")
        return download_tables(tables[args.dataset], args.to)
    return [download(hub_documents(args.dataset, args.folder, args.n, args.to), args.workers)]


def _check(args: argparse.Namespace) -> Iterator[str]:
    run = args.run_dir
    context = args.context or (read_run_config(run) if run else RunConfig()).model.sequence_len
    return check(args.folder, load_tokenizer(run / "tokenizer") if run else None, context)


def _parser() -> argparse.ArgumentParser:
    what, _, examples = __doc__.partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m nanochat_jax.data", description=what, epilog=examples, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    fetch = commands.add_parser("download", help="fetch datasets of the hub; resumes where it stopped")
    fetch.add_argument(
        "--dataset",
        required=True,
        help=f"{', '.join(NAMED)}, or owner/name of parquet, jsonl or txt files; smoltalk or the name of another task "
        f"for its questions, tasks for those of all; {FOLDER} for the CORE bundle",
    )
    fetch.add_argument("--folder", help="take only what is below this folder of the dataset")
    fetch.add_argument("-n", type=positive, default=DataConfig.hub_shards, help="training files (%(default)s)")
    fetch.add_argument("--workers", type=positive, default=8, help="files at a time (%(default)s)")
    fetch.set_defaults(run=_download)

    ls = commands.add_parser("ls", help="what is in the cache, whole or half")
    ls.set_defaults(run=lambda args: contents(args.to) or [f"{args.to} holds no datasets"])

    look = commands.add_parser("check", help="what conversations are taken for, repaired, left out, and how long")
    look.add_argument("folder", type=Path, help="a data.dir, a folder of conversations, or a file")
    look.add_argument("--run-dir", type=Path, help="count in the tokens of this run, against its context")
    look.add_argument("--context", type=positive, help="tokens of a row (the run's, else the default setting)")
    look.set_defaults(run=_check)

    for one in (fetch, ls):
        one.add_argument("--to", type=Path, default=DOWNLOADS, help="the cache's folder (%(default)s)")
    return parser


@command(resumes="where it was stopped")
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    for line in args.run(args):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
