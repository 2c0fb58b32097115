"""Bits per byte against the formula."""

import math

import numpy as np
import pytest
from evals_fakes import ByteTokenizer, FullLogits, tiny_model

from evals.bpb import evaluate_bpb
from evals.scoring import Scorer

TOK = ByteTokenizer()


class Rows:
    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def rows(self, indices):
        return {"tokens": self.tokens[indices]}


@pytest.fixture(scope="module")
def model():
    return tiny_model(sequence_len=64)


@pytest.fixture(scope="module")
def full(model):
    return FullLogits(model)


def make_rows(n=5, T=40, seed=0):
    tokens = np.random.default_rng(seed).integers(97, 123, (n, T + 1)).astype(np.uint16)
    tokens[:, 0] = TOK.bos
    tokens[1, 20] = TOK.bos  # a document ends within a row
    return tokens


def expected(full, tokens, keep):
    nll = np.stack([full.nll(row.tolist()) for row in tokens])
    return nll[keep].sum() / (math.log(2) * keep.sum()), nll[keep].mean()


def test_bpb_counts_text_only(model, full):
    tokens = make_rows()
    out = evaluate_bpb(Scorer(model, 2), Rows(tokens), TOK)
    bpb, loss = expected(full, tokens, tokens[:, 1:] < 256)
    assert out["bpb"] == pytest.approx(bpb, rel=1e-4) and out["loss"] == pytest.approx(loss, rel=1e-4)
    assert out["bytes"] == out["tokens"] == 5 * 40 - 1 and out["rows"] == 5


def test_the_batch_size_changes_nothing(model):
    one, other = (evaluate_bpb(Scorer(model, rows), Rows(make_rows()), TOK) for rows in (2, 8))
    assert one == pytest.approx(other, rel=1e-6)


def test_no_rows_no_figure(model):
    out = evaluate_bpb(Scorer(model, 2), Rows(np.zeros((0, 41), np.uint16)), TOK)
    assert out["bpb"] is None and out["bytes"] == 0
