"""The other side of the race in data.py: karpathy/nanochat's own loader and tokenizer. Run by a Python that has torch.

It reads the parquet files that it is given and trains its tokenizer on their beginning. Answers {"steps": n} with the
seconds of n batches, and {"rows": n} with the share of tokens that the first n rows crop. With --lengths, a .npy of the
documents' tokens with <|bos|>, documents have those lengths instead of its tokenizer's.
"""

import argparse
import itertools
import json
import sys
import time


def main() -> None:
    p = argparse.ArgumentParser()
    for name in ("rows", "seq", "vocab", "sample_chars"):
        p.add_argument(f"--{name}", type=int, required=True)
    p.add_argument("--files", nargs="+", required=True, help="the last is for validation")
    p.add_argument("--lengths")
    args = p.parse_args()

    import numpy as np
    import pyarrow.parquet
    from nanochat import dataloader
    from nanochat.tokenizer import RustBPETokenizer

    dataloader.list_parquet_files = lambda *_, **__: args.files

    class Lengths:
        """In the tokenizer's place: documents of known lengths, one after the other."""

        def __init__(self):
            self._lengths = iter(np.load(args.lengths).tolist())

        def get_bos_token_id(self):
            return 0

        def encode(self, texts, **_):
            return [[0] * next(self._lengths) for _ in texts]

    def texts():
        left = args.sample_chars
        for file in args.files[:-1]:
            for text in pyarrow.parquet.read_table(file, columns=["text"]).column("text").to_pylist():
                yield text
                left -= len(text)
                if left < 0:
                    return

    def batches(tokenizer, rows):
        make = dataloader.tokenizing_distributed_data_loader_with_state_bos_bestfit
        return make(tokenizer, rows, args.seq, "train", device="cpu", buffer_size=1000)

    made = None if args.lengths else RustBPETokenizer.train_from_iterator(texts(), args.vocab)
    running = None if args.lengths else batches(made, args.rows)

    def cropped(rows: int) -> float:
        tokenizer, seen = Lengths() if args.lengths else made, 0
        encode = tokenizer.encode

        def counting(*a, **more):
            nonlocal seen
            out = encode(*a, **more)
            seen += sum(map(len, out))
            return out

        tokenizer.encode = counting
        one_by_one = batches(tokenizer, 1)
        for _ in itertools.islice(one_by_one, rows):
            pass
        tokenizer.encode = encode
        waiting = sum(map(len, one_by_one.gi_frame.f_locals["doc_buffer"]))
        return 1 - rows * (args.seq + 1) / (seen - waiting)

    def run(order: dict):
        if "rows" in order:
            return cropped(order["rows"])
        began = time.perf_counter()
        for _ in itertools.islice(running, order["steps"]):
            pass
        return time.perf_counter() - began

    if running is not None:
        next(running)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
