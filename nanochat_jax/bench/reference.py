"""The other side of the benchmarks: karpathy/nanochat's own code, run by a Python that has torch.

    PYTHONPATH=CHECKOUT python reference.py train|decode|core|data OPTIONS

OPTIONS are the benchmark's as JSON. Each function sets up and returns what answers an order (see frame.Side). Nothing
of nanochat_jax is imported, which that Python need not have.
"""

import itertools
import json
import random
import resource
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch


def make_model(weights=None, depth=0, **sizes):
    """(model, device): random weights, or those of a .npz file by the reference's names."""
    from nanochat.gpt import GPT, GPTConfig

    if depth:
        width = -(-64 * depth // 128) * 128
        sizes |= {"n_layer": depth, "n_head": width // 128, "n_kv_head": width // 128, "n_embd": width}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    model.to_empty(device=device)
    model.init_weights()  # also what is no parameter: the tables of angles
    if weights:
        with np.load(weights) as arrays:
            model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return model, device


def train(args):
    """Its step, compiled as its training script does, on tokens that are made already. Answers {"steps"} with their
    seconds, "peak_gb" with the most memory held, {"losses": n} with the losses of n steps of `curve`, a folder
    with weights.npz, tokens.npy (steps, rows, seq + 1) and optimizer.json."""
    curve = getattr(args, "curve", None)
    shape = {"depth": args.depth, "sequence_len": args.seq, "vocab_size": args.vocab, "window_pattern": args.pattern}
    model, device = make_model(curve and f"{curve}/weights.npz", **shape)
    given = {"rates": {}}
    if curve:
        with open(f"{curve}/optimizer.json", encoding="utf-8") as f:
            given = json.load(f)
        tokens = np.load(f"{curve}/tokens.npy", mmap_mode="r")
    optimizer = model.setup_optimizer(**given["rates"])
    compiled = torch.compile(model, dynamic=False)
    torch.manual_seed(0)
    ids = torch.randint(0, args.vocab, (args.accumulation, args.rows, args.seq + 1), device=device)

    def schedule(step):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * given["lr"][step]
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = given["momentum"][step], given["weight_decay"][step]

    def step(micro_batches):
        total = 0.0
        for rows in micro_batches:
            loss = compiled(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) / len(micro_batches)
            total += loss.detach()
            loss.backward()
        optimizer.step()
        compiled.zero_grad(set_to_none=True)
        return total

    def loss_of(n):
        schedule(n)
        rows = torch.from_numpy(tokens[n].astype(np.int64)).to(device)
        return float(step(rows.reshape(args.accumulation, args.rows, -1)))

    def answer(order):
        if order == "peak_gb":
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return (torch.cuda.max_memory_allocated() if device == "cuda" else held) / 1e9
        if "losses" in order:
            return [loss_of(n) for n in range(order["losses"])]
        began = time.perf_counter()
        for _ in range(order["steps"]):
            loss = step(ids)
        float(loss)
        return time.perf_counter() - began

    if not curve:
        answer({"steps": 1})
        if device == "cuda":
            torch.cuda.empty_cache()
    return answer


def decode(args):
    """Its engine. Answers {"new", "batch"} with the seconds to the end of all."""
    from nanochat.engine import Engine

    # of a tokenizer it wants the ids of special tokens, all of which lie outside of the vocabulary
    tokenizer = SimpleNamespace(encode_special=lambda name: -1, get_bos_token_id=lambda: -1)
    model, _ = make_model(depth=args.depth, sequence_len=args.seq, vocab_size=args.vocab)
    engine = Engine(model.eval(), tokenizer)
    torch.manual_seed(0)

    def answer(order):
        prompt = torch.randint(0, args.vocab, (args.prompt,)).tolist()
        settings = {"max_tokens": order["new"], "temperature": args.temperature, "top_k": args.top_k, "seed": 1}
        began = time.perf_counter()
        for _ in engine.generate(prompt, num_samples=order["batch"], **settings):
            pass
        return {"seconds": time.perf_counter() - began}

    return answer


def core(args):
    """Its evaluate_task, with weights of a .npz file and the token ids of a JSON file, {text: ids}. Answers {"file",
    "examples", "task"} with the seconds, without tokenizing, and whether each example was answered right."""
    from nanochat import core_eval

    class Tokenizer:
        def get_bos_token_id(self):
            return args.bos

        def __call__(self, texts, prepend):
            return [[prepend, *ids[text]] for text in texts]

    with open(args.ids, encoding="utf-8") as f:
        ids = json.load(f)
    model, device = make_model(args.weights, **args.sizes)
    model.eval()
    right, evaluate_example = [], core_eval.evaluate_example

    def noting(*a, **more):
        right.append(bool(evaluate_example(*a, **more)))
        return right[-1]

    core_eval.evaluate_example = noting

    def answer(order):
        with open(order["file"], encoding="utf-8") as f:
            data = [json.loads(line) for line in f]
        random.Random(1337).shuffle(data)
        right.clear()
        began = time.perf_counter()
        core_eval.evaluate_task(model, Tokenizer(), data[: order["examples"]], device, order["task"])
        return {"seconds": time.perf_counter() - began, "right": list(right)}

    return answer


def data(args):
    """Its loader of parquet files, the last of which is for validation, and its tokenizer, trained on their beginning.
    Answers {"steps": n} with the seconds of n batches, {"rows": n} with the share of tokens that the first n rows crop.
    lengths: a .npy file of the documents' tokens, <|bos|> included; its tokenizer is then not asked."""
    import pyarrow.parquet
    from nanochat import dataloader
    from nanochat.tokenizer import RustBPETokenizer

    dataloader.list_parquet_files = lambda *_, **__: args.files

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

    if args.lengths:
        lengths = iter(np.load(args.lengths).tolist())
        tokenizer = SimpleNamespace(get_bos_token_id=lambda: 0)
        tokenizer.encode = lambda texts, **_: [[0] * next(lengths) for _ in texts]
    else:
        tokenizer = RustBPETokenizer.train_from_iterator(texts(), args.vocab)
        running = batches(tokenizer, args.rows)
        next(running)

    def cropped(rows):
        seen, encode = 0, tokenizer.encode

        def counting(*a, **more):
            nonlocal seen
            out = encode(*a, **more)
            seen += sum(map(len, out))
            return out

        tokenizer.encode = counting
        one_by_one = batches(tokenizer, 1)
        for _ in itertools.islice(one_by_one, rows):
            pass
        waiting = sum(map(len, one_by_one.gi_frame.f_locals["doc_buffer"]))
        return 1 - rows * (args.seq + 1) / (seen - waiting)

    def answer(order):
        if "rows" in order:
            return cropped(order["rows"])
        began = time.perf_counter()
        for _ in itertools.islice(running, order["steps"]):
            pass
        return time.perf_counter() - began

    return answer


def main():
    side = {"train": train, "decode": decode, "core": core, "data": data}[sys.argv[1]]
    answer = side(SimpleNamespace(**json.loads(sys.argv[2])))
    print("compiled", flush=True)
    sys.stdin.readline()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
