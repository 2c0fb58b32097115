"""Evaluations: what a model scores, and the page that says so. `python -m evals --run-dir DIR --stage sft`."""
