"""Decoding through the cache equals the full forward; slots, samples, stops, tools and cancellation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evals_fakes import ByteTokenizer, FullLogits, tiny_model

from nanochat_jax.calculator import CalculatorTool
from nanochat_jax.engine import LONG, SHORT, Engine, Request
from nanochat_jax.sampling import Settings, mode, sample

SLOTS, MAX_LEN = 4, 192  # shared by all tests, so that each program is compiled once


@pytest.fixture(scope="module")
def model():
    return tiny_model(sequence_len=MAX_LEN)


@pytest.fixture(scope="module")
def full(model):
    return FullLogits(model)


@pytest.fixture
def engine(model):
    return Engine(model, slots=SLOTS, max_len=MAX_LEN)


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


def margin_of(full, ids, place):
    """How much likelier the id at `place` is than the best other one, in logits: 0 is a tie."""
    z = full(ids[:place])[-1].astype(np.float64)
    return z[ids[place]] - np.delete(z, ids[place]).max()


def test_greedy_equals_the_full_forward_for_unequal_lengths_over_windows(engine, model, full):
    # more requests than slots; prompts of one token, around the window of 128, and up to the end of the context
    assert model.cfg.windows == (128, 192)
    asked = prompts(1, 2, 63, 65, 120, 127, 129, 150, 190)
    done = engine.generate([Request(p, 45, temperature=0.0) for p in asked])
    for prompt, completion in zip(asked, done):
        assert len(completion.ids) == min(45, MAX_LEN - len(prompt)) and completion.finish_reason == "length"
        ids = prompt + completion.ids
        assert all(margin_of(full, ids, i) > -1e-4 for i in range(len(prompt), len(ids)))


def test_greedy_continuation_golden(golden):
    arrays = golden.arrays
    prompt = arrays["prompt" if "prompt" in arrays else "greedy_prompt"].reshape(-1).tolist()
    want = arrays["greedy"].reshape(-1).tolist()
    want = want[len(prompt) :] if want[: len(prompt)] == prompt else want
    engine = Engine(golden.model(), slots=1, max_len=min(golden.cfg.sequence_len, 512))
    assert engine.generate([Request(prompt, len(want), temperature=0.0)])[0].ids == want


def test_samples_depend_on_their_seed_alone(engine):
    [a, b] = prompts(10, 40)
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 40}
    alone = engine.generate([Request(a, seed=5, **settings)])[0].ids
    crowd = [Request(b, seed=i, **settings) for i in range(6)]
    crowd.insert(3, Request(a, seed=5, **settings))
    crowd.append(Request(a, seed=6, **settings))
    together = engine.generate(crowd)
    assert together[3].ids == alone and together[-1].ids != alone


def test_stop_ids_end_a_row_and_are_not_part_of_it(engine):
    [prompt] = prompts(12)
    free = engine.generate([Request(prompt, 30, temperature=0.0)])[0].ids
    stop = free[11]
    first = free.index(stop)
    done = engine.generate([Request(prompt, 30, temperature=0.0, stop_ids=(stop,))])[0]
    assert done.ids == free[:first] and done.finish_reason == "stop" and done.mask == [1] * first


class Doubler:
    """After `trigger`, forces `wanted`."""

    def __init__(self, trigger, wanted):
        self.trigger, self.wanted = trigger, wanted

    def start(self):
        return self

    def push(self, id):
        return self.wanted if id == self.trigger else []


@pytest.mark.parametrize("n", [1, 5, SHORT, LONG, 2 * LONG + 3])
def test_forced_tokens_are_masked_and_the_model_goes_on_from_them(model, full, n):
    [prompt] = prompts(20)
    free = Engine(model, slots=SLOTS, max_len=MAX_LEN).generate([Request(prompt, 30, temperature=0.0)])[0].ids
    place = next(i for i in range(3, 30) if free[i] not in free[:i])
    wanted = [(free[place] + 1 + i) % 256 for i in range(n) if (free[place] + 1 + i) % 256 != free[place]]
    engine = Engine(model, slots=SLOTS, max_len=MAX_LEN, tool=Doubler(free[place], wanted))
    done = engine.generate([Request(prompt, place + 1 + n + 4, temperature=0.0)])[0]
    assert done.ids[: place + 1] == free[: place + 1]
    assert done.ids[place + 1 : place + 1 + n] == wanted
    assert done.mask[: place + 1 + n + 1] == [1] * (place + 1) + [0] * n + [1]
    ids = prompt + done.ids
    free_places = [i for i in range(len(prompt), len(ids)) if done.mask[i - len(prompt)]]
    assert all(margin_of(full, ids, i) > -1e-4 for i in free_places)


def test_calculator_runs_in_the_middle_of_a_completion(model):
    tok = ByteTokenizer()
    engine = Engine(model, slots=SLOTS, max_len=MAX_LEN, tool=CalculatorTool(tok))
    ticket = engine.submit(Request(prompts(5)[0], 60, temperature=0.0))
    script = [tok.python_start, *b"12*3", tok.python_end]
    ticket.forced.extend(script)  # stands for a model that makes the call; forced tokens are not shown to the tool
    for id in script:
        ticket.forced.extend(ticket.tool.push(id))
    while engine.busy:
        engine.step()
    result = [tok.output_start, *b"36", tok.output_end]
    assert ticket.completion.ids[: len(script) + len(result)] == script + result


def test_cancel_queued_and_running(engine):
    tickets = [engine.submit(Request(p, 50, temperature=0.0)) for p in prompts(*[9] * (SLOTS + 2))]
    engine.step()
    engine.cancel(tickets[0])
    engine.cancel(tickets[-1])
    events = engine.step()
    ended = {id(e.ticket): e.completion.finish_reason for e in events if e.completion}
    assert ended == {id(tickets[0]): "cancelled", id(tickets[-1]): "cancelled"}
    assert tickets[SLOTS].slot is not None  # it got the slot
    while engine.busy:
        engine.step()
    assert [t.completion.finish_reason for t in tickets[1:-1]] == ["length"] * SLOTS
    engine.cancel(tickets[1])  # nothing happens
    assert not engine.busy


def test_events_carry_every_token_once(engine):
    ticket = engine.submit(Request(prompts(7)[0], 45, temperature=0.0))
    events = []
    while engine.busy:
        events += engine.step()
    assert sum((e.ids for e in events), []) == ticket.completion.ids and len(events) > 1
    assert [e.completion is None for e in events] == [True] * (len(events) - 1) + [False]


@pytest.mark.parametrize("n", [0, MAX_LEN])
def test_prompts_that_do_not_fit_are_refused(engine, n):
    with pytest.raises(ValueError, match="does not fit"):
        engine.submit(Request([1] * n, 5))
    with pytest.raises(ValueError, match="more than the model's context"):
        Engine(tiny_model(64), slots=1, max_len=65)


def test_update_params_changes_what_is_said(engine, model):
    from flax import nnx

    [prompt] = prompts(30)
    before = engine.generate([Request(prompt, 20, temperature=0.0)])[0].ids
    other = nnx.to_pure_dict(nnx.split(tiny_model(MAX_LEN, seed=1))[1])
    engine.update_params(other)
    assert engine.generate([Request(prompt, 20, temperature=0.0)])[0].ids != before
    engine.update_params(nnx.to_pure_dict(nnx.split(model)[1]))
    assert engine.generate([Request(prompt, 20, temperature=0.0)])[0].ids == before


# ---------------------------------------------------------------------------------------------- sampling


def draw(logits, n=4000, **settings):
    """(n,) samples from one row of logits under n seeds."""
    r = Request([0], 1, **{"temperature": 1.0, **settings})
    rows = Settings(
        jnp.full(n, r.temperature, jnp.float32),
        jnp.full(n, r.top_k, jnp.int32),
        jnp.full(n, r.top_p, jnp.float32),
        jnp.arange(n, dtype=jnp.uint32),
    )
    z = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    return np.asarray(jax.jit(sample, static_argnums=3)(z, rows, jnp.zeros(n, jnp.int32), mode([r], len(logits))))


LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.05, 0.2]))


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, [0.4, 0.05, 0.3, 0.05, 0.2]),
        ({"top_k": 3}, [4 / 9, 0, 3 / 9, 0, 2 / 9]),
        ({"top_p": 0.65}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"top_k": 3, "top_p": 0.9}, [4 / 9, 0, 3 / 9, 0, 2 / 9]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, np.array([0.16, 0.0025, 0.09, 0.0025, 0.04]) / 0.295),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
    ],
)
def test_sampling_follows_its_distribution(settings, want):
    got = np.bincount(draw(LOGITS, **settings), minlength=5) / 4000
    assert np.abs(got - want).max() < 0.03 and (got[np.asarray(want) == 0] == 0).all()


def test_mode_is_the_cheapest_that_is_exact():
    def how(*settings):
        return mode([Request([0], 1, **s) for s in settings], 1000)

    assert how({"temperature": 0.0, "top_k": 5}) == (False, False, 0, False)
    assert how({}) == (True, True, 0, False)
    assert how({"top_k": 50}, {}) == (True, True, 64, False)
    assert how({"top_k": 100}) == (True, False, 256, False)
    assert how({"top_p": 0.9})[2] == 1000 and how({"top_k": 500})[2] == 1000
    assert how({"top_k": 20, "top_p": 0.9}, {"temperature": 0.0, "logprobs": 0}) == (True, False, 64, True)
