"""The other side of the benchmarks: karpathy/nanochat's own code, run by a Python that has torch.

    PYTHONPATH=CHECKOUT python reference.py train|decode OPTIONS

OPTIONS are the benchmark's as JSON. Each function sets up and returns what answers an order (see frame.Side). Nothing
of nanochat_jax is imported, which that Python need not have.
"""

import json
import resource
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch


def make_model(depth, weights=None, **sizes):
    """(model, device): random weights, or those of a .npz file by the reference's names."""
    from nanochat.gpt import GPT, GPTConfig

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
    shape = {"sequence_len": args.seq, "vocab_size": args.vocab, "window_pattern": args.pattern}
    model, device = make_model(args.depth, curve and f"{curve}/weights.npz", **shape)
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
    model, _ = make_model(args.depth, sequence_len=args.seq, vocab_size=args.vocab)
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


def main():
    side = {"train": train, "decode": decode}[sys.argv[1]]
    answer = side(SimpleNamespace(**json.loads(sys.argv[2])))
    print("compiled", flush=True)
    sys.stdin.readline()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
