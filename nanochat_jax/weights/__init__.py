"""Exports and imports weights in the formats of others.

names.py            parameter names: karpathy/nanochat's and those of transformers' `nanochat`
configs.py          config.json and meta_*.json against our settings
tensors.py          safetensors files
tokenizer_json.py   our vocabulary for the `tokenizers` library; chat_template.jinja: conversations for transformers
pickles.py          karpathy/nanochat's files, read without PyTorch and without running what a pickle says
folder.py, card.py  a folder of weights, read and written; its README.md

`python -m nanochat_jax.export` and `python -m nanochat_jax.import` are the commands.
"""
