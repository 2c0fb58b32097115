"""Weights out of and into run directories, in the formats of others.

names.py            parameter names: karpathy/nanochat's and those of transformers' `nanochat`
configs.py          config.json and meta_*.json against our settings
tensors.py          safetensors files
tokenizer_json.py   our vocabulary for the `tokenizers` library; chat_template.jinja: conversations for transformers
bytelevel.py        the vocabularies of others in a run directory
pickles.py          what karpathy/nanochat writes, read without PyTorch and without running what a pickle says
folder.py           a folder of weights as a whole, read and written

`python -m nanochat_jax.export` and `python -m nanochat_jax.import` are the commands.
"""
