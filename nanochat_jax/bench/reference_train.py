"""The other side of the race in train.py and curve.py: karpathy/nanochat's own compiled step, by a Python with torch.

It gets its tokens ready made, without its loader, and is compiled as its training script does it. For curve.py it takes
weights, rates and schedules from files, and answers with its losses.
"""

import argparse
import json
import sys
import time


def main() -> None:
    p = argparse.ArgumentParser()
    for name in ("depth", "rows", "accumulation", "seq", "vocab"):
        p.add_argument(f"--{name}", type=int, required=True)
    p.add_argument("--pattern", required=True)
    p.add_argument("--curve", help="a folder: weights.npz, tokens.npy (steps, rows, seq + 1), optimizer.json")
    args = p.parse_args()

    import numpy as np
    import torch
    from nanochat.gpt import GPT, GPTConfig

    width = -(-64 * args.depth // 128) * 128
    sizes = dict(n_layer=args.depth, n_head=width // 128, n_kv_head=width // 128, n_embd=width)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=args.seq, vocab_size=args.vocab, window_pattern=args.pattern, **sizes))
    model.to_empty(device=device)
    model.init_weights()
    given = {"rates": {}}
    if args.curve:
        with np.load(f"{args.curve}/weights.npz") as weights:
            model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
        with open(f"{args.curve}/optimizer.json", encoding="utf-8") as f:
            given = json.load(f)
        tokens = np.load(f"{args.curve}/tokens.npy", mmap_mode="r")
    optimizer = model.setup_optimizer(**given["rates"])
    compiled = torch.compile(model, dynamic=False)
    torch.manual_seed(0)
    ids = torch.randint(0, args.vocab, (args.accumulation, args.rows, args.seq + 1), device=device)

    def schedule(step: int) -> None:
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

    def answer(order):
        if order == "peak_gb":
            return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
        if "losses" in order:
            losses = []
            for n in range(*order["losses"]):
                schedule(n)
                rows = torch.from_numpy(tokens[n].astype(np.int64)).to(device)
                losses.append(float(step(rows.reshape(args.accumulation, args.rows, -1))))
            return losses
        began = time.perf_counter()
        for _ in range(order["steps"]):
            loss = step(ids)
        float(loss)
        return time.perf_counter() - began

    if not args.curve:
        answer({"steps": 1})
        if device == "cuda":
            torch.cuda.empty_cache()
        print("compiled", flush=True)
        sys.stdin.readline()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
