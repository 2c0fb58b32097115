"""`python -m tokenizer train` and `python -m tokenizer evaluate`; the last line on stdout is one JSON object."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat_jax.chats import Tally, is_chat_file, rows_of, some, text_of
from nanochat_jax.cli import command, positive
from nanochat_jax.config import TokenizerConfig
from nanochat_jax.errors import UserError
from nanochat_jax.formats import kind_of, texts_of
from tokenizer import load_tokenizer

DATA = "a file of documents or conversations, or a folder of them: "
FILES = ".parquet, .jsonl, .json or .txt, the latter three also .gz or .zst"


def read_documents(path: str | Path, say: Callable[[str], None] = print) -> Iterator[str]:
    """The texts of a file, or of the files in and below a folder in order of their names: documents, as pretraining
    takes them, with their text in `text`, and conversations. UserError where there are none. What was made of
    conversations is said at the end."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file or folder {path}; --data takes {FILES}, or a folder of them")
    found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in found if kind_of(p.name) or is_chat_file(p.name)]
    if not files:
        raise UserError(f"{path} is or holds no file to read; --data takes {FILES}, or a folder of them")
    if others := [p.name for p in found if p not in set(files) and not p.name.startswith(".")]:
        say(f"{some(others)} not read; --data takes {FILES}")
    return _texts(files, path if path.is_dir() else path.parent, say)


def _texts(files: list[Path], root: Path, say: Callable[[str], None]) -> Iterator[str]:
    tally, is_empty = Tally(), True
    for file in files:
        if kind_of(file.name) == "text" or _holds_documents(file):
            for text in texts_of(file, "text"):
                is_empty = False
                yield text
            continue
        for messages in tally.read([file], root):
            yield "\n".join(text_of(m["content"], "\n") for m in messages)
    if is_empty and not tally.taken:
        raise UserError(f"{files[0] if len(files) == 1 else root} holds no text to read: {tally.lost()}")
    if tally.taken or tally.left_out:
        for line in tally.lines():
            say(line)


def _holds_documents(file: Path) -> bool:
    """Whether the first row has a text, and so is no conversation."""
    _, row = next(rows_of(file, also="text"), ("", None))
    return kind_of(file.name) is not None and isinstance(row, dict) and "text" in row


def _train(args: argparse.Namespace) -> dict:
    from tokenizer.train import train_tokenizer

    cfg = TokenizerConfig(vocab_size=args.vocab_size, sample_chars=args.sample_chars, max_doc_chars=args.max_doc_chars)
    stats = train_tokenizer(read_documents(args.data), args.out, cfg)
    return {**stats, "vocab_size": args.vocab_size, "hash": load_tokenizer(args.out).hash, "out": str(args.out)}


def _evaluate(args: argparse.Namespace) -> dict:
    from tokenizer.evaluate import evaluate, table

    results = evaluate(load_tokenizer(args.dir), list(read_documents(args.data)))
    print(table(results))
    return {"bytes_per_token": {name: round(value, 4) for name, value in results.items()}}


def _parser() -> argparse.ArgumentParser:
    default = TokenizerConfig()
    parser = argparse.ArgumentParser(prog="python -m tokenizer", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{train,evaluate}")
    train = commands.add_parser("train", help="train a vocabulary and save it")
    train.add_argument("--data", required=True, help=DATA + FILES)
    train.add_argument("--out", required=True, help="the folder to save tokenizer.model and meta.json in")
    train.add_argument("--vocab-size", type=positive, default=default.vocab_size)
    train.add_argument("--sample-chars", type=positive, default=default.sample_chars, help="characters to train on")
    train.add_argument("--max-doc-chars", type=positive, default=default.max_doc_chars, help="of any one document")
    train.set_defaults(run=_train)
    evaluate = commands.add_parser("evaluate", help="bytes per token; of gpt2 and cl100k_base too if at hand")
    evaluate.add_argument("--dir", required=True, help="the folder of a trained vocabulary")
    evaluate.add_argument("--data", required=True, help=DATA + FILES)
    evaluate.set_defaults(run=_evaluate)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    sys.exit(main())
