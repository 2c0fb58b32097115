"""The other side of the race in train.py: karpathy/nanochat's own compiled step. Run by a Python that has torch.

It gets its tokens ready made, without its loader, and is compiled as its training script does it.
"""

import argparse
import json
import sys
import time


def main() -> None:
    p = argparse.ArgumentParser()
    for name in ("depth", "rows", "seq", "vocab"):
        p.add_argument(f"--{name}", type=int, required=True)
    args = p.parse_args()

    import torch
    from nanochat.gpt import GPT, GPTConfig

    width = -(-64 * args.depth // 128) * 128
    sizes = dict(n_layer=args.depth, n_head=width // 128, n_kv_head=width // 128, n_embd=width)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=args.seq, vocab_size=args.vocab, **sizes))
    model.to_empty(device=device)
    model.init_weights()
    optimizer = model.setup_optimizer()
    compiled = torch.compile(model, dynamic=False)
    torch.manual_seed(0)
    ids = torch.randint(0, args.vocab, (args.rows, args.seq + 1), device=device)

    def run(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            loss = compiled(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            loss.backward()
            optimizer.step()
            compiled.zero_grad(set_to_none=True)
        float(loss)
        return time.perf_counter() - began

    run(3)
    print("ready", flush=True)
    for line in sys.stdin:
        print(run(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
