"""The other side of the race in core.py: karpathy/nanochat's own evaluate_task. Run by a Python that has torch.

Weights come by its names from a .npz, token ids from a JSON file of {text: ids}, so that both sides score the same
tokens with the same model; its time is without tokenizing. Answers {"file", "examples", and what the task is} with the
seconds and whether each example was answered right.
"""

import argparse
import json
import random
import sys
import time


class Ready:
    """In its tokenizer's place: ids that were made before."""

    def __init__(self, ids: dict, bos: int):
        self.ids, self.bos = ids, bos

    def get_bos_token_id(self):
        return self.bos

    def __call__(self, texts, prepend):
        return [[prepend, *self.ids[text]] for text in texts]


def main() -> None:
    p = argparse.ArgumentParser()
    for name in ("weights", "ids", "sizes"):
        p.add_argument(f"--{name}", required=True)
    p.add_argument("--bos", type=int, required=True)
    args = p.parse_args()

    import numpy as np
    import torch
    from nanochat import core_eval
    from nanochat.gpt import GPT, GPTConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = GPT(GPTConfig(**json.loads(args.sizes)))
    model.to_empty(device=device)
    model.init_weights()  # what is no parameter: the tables of angles
    with np.load(args.weights) as weights:
        model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    model.eval()
    with open(args.ids, encoding="utf-8") as f:
        tokenizer = Ready(json.load(f), args.bos)

    right = []
    evaluate_example = core_eval.evaluate_example

    def noting(*a, **more):
        right.append(bool(evaluate_example(*a, **more)))
        return right[-1]

    core_eval.evaluate_example = noting

    def run(order: dict) -> dict:
        with open(order["file"], encoding="utf-8") as f:
            data = [json.loads(line) for line in f]
        random.Random(1337).shuffle(data)
        data = data[: order["examples"]]
        right.clear()
        began = time.perf_counter()
        core_eval.evaluate_task(model, tokenizer, data, device, order["task"])
        return {"seconds": time.perf_counter() - began, "right": list(right)}

    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
