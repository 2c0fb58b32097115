"""The README.md of an exported folder: what it is, and how to load it."""

from nanochat_jax.config import GPTConfig

CLASSIC = """\
The architecture is `nanochat` of transformers 5, which loads it as it is:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
messages = [{{"role": "user", "content": "Who are you?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs)[0]))
```
"""
MODERN = """\
transformers has no model type for this architecture, so its `AutoModel` does not load it. The parameters have the names
of karpathy/nanochat, whose `GPT` does:

```python
import json
import torch
from nanochat.gpt import GPT, GPTConfig
from safetensors.torch import load_file

model = GPT(GPTConfig(**json.load(open("{folder}/config.json"))["model_config"]))
model.init_weights()  # the rotary tables
model.load_state_dict(load_file("{folder}/model.safetensors"), assign=True)
```

The tokenizer is for transformers' `AutoTokenizer`, and tokenizer.json for the library `tokenizers`.
"""
COMMON = """\
nanochat_jax takes it back as a run: `python -m nanochat_jax.import --from {folder} --run-dir RUN`.

The chat template guards what is said, so that the name of a special token in it stays text. In a bare
`tokenizer(text)` such names are read as special tokens, unless `split_special_tokens=True` is given.
"""


def card(cfg: GPTConfig, notes: dict[str, str]) -> str:
    """The text of a README.md."""
    made = "".join(f"| {key} | {value} |\n" for key, value in notes.items())
    sizes = (
        f"{cfg.n_layer} layers of width {cfg.n_embd}, a vocabulary of {cfg.vocab_size}, a context of {cfg.sequence_len}"
    )
    body = (CLASSIC if cfg.init == "classic" else MODERN) + "\n" + COMMON
    return f"# nanochat, {sizes}\n\n{body.format(folder='FOLDER')}\n| | |\n|:--|:--|\n{made}"
