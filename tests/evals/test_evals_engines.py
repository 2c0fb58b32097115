"""Several engines as one: what is said depends on neither their number nor the order; what goes wrong is heard of."""

from types import SimpleNamespace

import numpy as np
import pytest
from evals_fakes import ByteTokenizer, tiny_model

from evals.engines import Engines
from nanochat_jax.engine import engine as engine_module
from nanochat_jax.engine.engine import LONG, SHORT, Completion, Engine, Request
from nanochat_jax.engine.tools import Tools

MAX_LEN = 192


@pytest.fixture(scope="module")
def model():
    return tiny_model(sequence_len=MAX_LEN)


def requests(n=8, new=20):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, rng.integers(2, 60)).tolist() for _ in range(n)]
    # each prompt twice, as samples of a question are
    return [Request(p, new, temperature=1.0, seed=i) for p in prompts for i in range(2)]


def test_answers_are_those_of_one_engine_and_come_in_order(model):
    asked = requests()
    tool = Tools(ByteTokenizer())
    one = Engine(model, slots=1, max_len=MAX_LEN, tool=tool)
    alone = [one.generate([r])[0].ids for r in asked]
    many = Engines(model, slots=4, max_len=MAX_LEN, tool=tool, count=2)
    assert [e.slots for e in many._engines] == [2, 2]
    for _ in range(2):  # again, with what is in the cache by now
        assert [c.ids for c in many.generate(asked)] == alone
    assert all(e.counters.generated_tokens > 0 for e in many._engines)  # both had their share
    assert many.generate([]) == []


def test_the_parameters_are_there_once(model):
    many = Engines(model, slots=3, max_len=MAX_LEN, count=8)
    assert len(many._engines) == 3  # never more than slots
    assert all(e.params is many._engines[0].params for e in many._engines)


def test_an_error_in_one_thread_is_heard_and_stops_the_others(model):
    many = Engines(model, slots=4, max_len=MAX_LEN, count=2)
    asked = [*requests(20, 50), Request([1] * MAX_LEN, 5)]
    with pytest.raises(ValueError, match="does not fit"):
        many.generate(asked)
    assert sum(e.counters.answers for e in many._engines) < len(asked) - 1


def test_slices_grow_with_the_answers_where_nobody_watches(model):
    engine = Engine(model, slots=2, max_len=MAX_LEN)
    seen = []

    def watch(*args):
        seen.append(args[-3])
        return compiled.decode(*args)

    compiled = engine._program
    engine._program = SimpleNamespace(prefill=compiled.prefill, decode=watch, fused=False)
    engine.generate([Request([7] * 5, 180, temperature=0.0)])
    assert seen[0] == SHORT and sum(seen) == 180 and SHORT < max(seen) <= 180 // engine_module.PATIENT_PARTS
    seen.clear()
    engine.generate([Request([8] * 5, 180, temperature=0.0)])  # by now it knows how long answers are
    assert seen[0] == 180 // engine_module.PATIENT_PARTS <= LONG
    seen.clear()
    engine.submit(Request([9] * 5, 180, temperature=0.0))
    engine.step()
    assert seen == [SHORT]  # but who asks by himself sees his first tokens soon


def test_two_short_chunks_are_taken_for_a_long_one_where_nobody_watches(model):
    engine, widths = Engine(model, slots=2, max_len=MAX_LEN), []

    def watch(*args):
        widths.append(args[4].shape[1])
        return compiled.prefill(*args)

    compiled = engine._program
    engine._program = SimpleNamespace(prefill=watch, decode=compiled.decode, fused=False)
    [done] = engine.generate([Request(list(range(100)), 5, temperature=0.0)])
    assert isinstance(done, Completion) and widths == [64, 64]
    engine.submit(Request(list(range(100, 200)), 5, temperature=0.0))
    engine.step()
    assert widths == [64, 64, 256]
