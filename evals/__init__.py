"""Evaluations: what a model scores, and the page that says so.

`scoring` asks a model for losses and logits, `engines` for answers; `bpb`, `core` and `chat` are made of these; `stage`
runs what a stage needs and writes evals/<stage>.json and `records`, which `browse` shows and `compare` sets against
others' (`significance`); `report` turns a run directory into report.md. Tasks are in `tasks`.
"""
