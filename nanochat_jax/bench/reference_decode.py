"""The other side of the race in decode.py: karpathy/nanochat's own engine. Run by a Python that has torch."""

import argparse
import json
import sys
import time


class NoTools:
    """What its engine wants of a tokenizer: ids of special tokens, all of which lie outside of the vocabulary."""

    def encode_special(self, name):
        return -1

    def get_bos_token_id(self):
        return -1


def main() -> None:
    p = argparse.ArgumentParser()
    for name in ("depth", "vocab", "seq", "prompt", "new", "top-k"):
        p.add_argument(f"--{name}", type=int, required=True)
    p.add_argument("--temperature", type=float, required=True)
    args = p.parse_args()

    import torch
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    width = -(-64 * args.depth // 128) * 128
    sizes = dict(n_layer=args.depth, n_head=width // 128, n_kv_head=width // 128, n_embd=width)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=args.seq, vocab_size=args.vocab, **sizes))
    model.to_empty(device=device)
    model.init_weights()
    model.eval()
    engine = Engine(model, NoTools())
    torch.manual_seed(0)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        prompt = torch.randint(0, args.vocab, (args.prompt,)).tolist()
        settings = dict(max_tokens=order["new"], temperature=args.temperature, top_k=args.top_k, seed=1)
        began = time.perf_counter()
        for _ in engine.generate(prompt, num_samples=order["batch"], **settings):
            pass
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
