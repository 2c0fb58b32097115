"""`python -m tokenizer train` and `python -m tokenizer evaluate`; the last line on stdout is one JSON object."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax.cli import command, positive
from nanochat_jax.config import TokenizerConfig
from nanochat_jax.errors import UserError
from nanochat_jax.formats import texts_of
from tokenizer import load_tokenizer


def read_documents(path: str | Path) -> Iterator[str]:
    """The documents of a file or of a folder's files in order of their names: the column `text` of .parquet, a .txt
    as a whole. UserError where there are none."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file or folder {path}; --data takes .parquet or .txt, or a folder of them")
    files = sorted(p for p in path.iterdir() if p.suffix in (".parquet", ".txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .parquet and no .txt files; --data takes either, or a folder of them")
    return itertools.chain.from_iterable(map(_texts, files))


def _texts(file: Path) -> Iterator[str]:
    if file.suffix == ".parquet":
        return texts_of(file, "text")
    return iter([file.read_bytes().decode("utf-8", errors="replace")])


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
    train.add_argument("--data", required=True, help="a .parquet or .txt file, or a folder of them")
    train.add_argument("--out", required=True, help="the folder to save tokenizer.model and meta.json in")
    train.add_argument("--vocab-size", type=positive, default=default.vocab_size)
    train.add_argument("--sample-chars", type=positive, default=default.sample_chars, help="characters to train on")
    train.add_argument("--max-doc-chars", type=positive, default=default.max_doc_chars, help="of any one document")
    train.set_defaults(run=_train)
    evaluate = commands.add_parser("evaluate", help="bytes per token; of gpt2 and cl100k_base too if at hand")
    evaluate.add_argument("--dir", required=True, help="the folder of a trained vocabulary")
    evaluate.add_argument("--data", required=True, help="a .parquet or .txt file, or a folder of them")
    evaluate.set_defaults(run=_evaluate)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    sys.exit(main())
