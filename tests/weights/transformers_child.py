"""What transformers makes of an exported folder, beside what we make of it; needs torch and transformers, not jax.

    python tests/weights/transformers_child.py FOLDER WANTED

WANTED.json and WANTED.npz are made by `wanted` of test_export.py. Prints one JSON object of counts and differences.
"""

import json
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, wanted: str) -> dict:
    with open(f"{wanted}.json", encoding="utf-8") as file:
        want = json.load(file)
    logits = np.load(f"{wanted}.npz")["logits"]  # (prompts, T, vocabulary), of the prompts and what follows them
    tok = AutoTokenizer.from_pretrained(folder)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model.generation_config.eos_token_id = None  # all tokens are compared, also those behind an answer's end
    out = {
        "class": type(model).__name__,
        "not_loaded": sum(map(len, loading.values())),
        "texts": [tok(text, split_special_tokens=True).input_ids == ids for text, ids in want["texts"]],
    }
    rendered, masks = [], []
    for messages, ids, mask in want["conversations"]:
        found = tok.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        rendered.append(found["input_ids"] == ids)
        masks.append(found["assistant_masks"] == mask)
    out |= {"conversations": rendered, "masks": masks, "prompts": [], "greedy": []}
    difference = 0.0
    for (messages, ids, greedy), expected in zip(want["prompts"], logits):
        found = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        out["prompts"].append(found["input_ids"][0].tolist() == ids)
        made = model.generate(**found, max_new_tokens=len(greedy), do_sample=False)
        out["greedy"].append(made[0, len(ids) :].tolist() == greedy)
        with torch.no_grad():
            got = model(torch.tensor([ids + greedy])).logits[0].numpy()
        difference = max(difference, float(np.abs(got - expected[: len(got)]).max()))
    counts = {key: [sum(value), len(value)] if isinstance(value, list) else value for key, value in out.items()}
    return {**counts, "largest_logit_difference": difference}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
