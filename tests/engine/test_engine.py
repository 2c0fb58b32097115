"""Decoding through the cache equals the full forward; slots, samples, stops, tools and cancellation."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evals_fakes import ByteTokenizer, FullLogits, tiny_model

from nanochat_jax import devices
from nanochat_jax.config import MeshConfig
from nanochat_jax.engine.engine import LONG, SHORT, Engine, Request
from nanochat_jax.engine.sampling import Chance, Settings, Shaping, _top_k, mode, sample
from nanochat_jax.engine.tools import Tools
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import softcapped

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


def test_pairs_of_tokens_and_offsets_are_known_to_the_engine():
    model = tiny_model(MAX_LEN, bigram_rows=53, key_offset=True, head_values=True)
    full, asked = FullLogits(model), prompts(1, 20, 64)
    for prompt, done in zip(
        asked, Engine(model, slots=SLOTS, max_len=MAX_LEN).generate([Request(p, 20, 0.0) for p in asked])
    ):
        ids = prompt + done.ids
        assert all(margin_of(full, ids, i) > -1e-4 for i in range(len(prompt), len(ids)))
    # the same ids in another order are other pairs
    a, b = full([5, 9, 7])[-1], full([9, 5, 7])[-1]
    model.bigrams.embedding[...] *= 0
    assert (
        np.abs(a - b).max() > 2 * np.abs(FullLogits(model)([5, 9, 7])[-1] - FullLogits(model)([9, 5, 7])[-1]).max() > 0
    )


def test_a_ring_that_wraps_equals_the_full_forward_at_every_position():
    # window 256, ring 512: prompts end at each side of every window, and rows go on for three windows and a half
    model = tiny_model(sequence_len=896)
    assert model.cfg.windows == (256, 896)
    engine, full = Engine(model, slots=SLOTS, max_len=896), FullLogits(model)
    assert [keys.shape[3] for keys, _ in engine._cache] == [512, 896]
    asked = prompts(1, 255, 256, 257, 300, 511, 513, 600, 767, 769)
    done = engine.generate([Request(p, 896, temperature=0.0, logprobs=2) for p in asked])
    for prompt, completion in zip(asked, done):
        assert len(prompt) + len(completion.ids) == 896
        ids = prompt + completion.ids
        logits = full(ids).astype(np.float64)
        want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place, (id, found) in enumerate(zip(completion.ids, completion.logprobs), len(prompt) - 1):
            assert abs(found.logprob - want[place, id]) < 1e-4
            assert found.top[0] == (id, found.logprob) and abs(found.top[1][1] - np.sort(want[place])[-2]) < 1e-4


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
    engine = Engine(model, slots=SLOTS, max_len=MAX_LEN, tool=Tools(tok))
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
    assert tickets[SLOTS] in engine._running  # it got the slot
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


def alone(model, request):
    """What an engine that has seen nothing else says."""
    return Engine(model, slots=SLOTS, max_len=MAX_LEN).generate([request])[0].ids


def shaped(z, s, prompt, said):
    """The logits that a token is drawn from, by the definitions."""
    z = z.astype(np.float64)
    for id in {*prompt, *said}:
        z[id] = z[id] / s.repetition if z[id] > 0 else z[id] * s.repetition
    for id in set(said):
        z[id] -= s.presence + s.frequency * said.count(id)
    for id, value in s.bias:
        z[id] += value
    return z


SHAPES = [Shaping(presence=6.0), Shaping(frequency=4.0), Shaping(repetition=3.0), Shaping(bias=((65, 9.0),))]
SHAPES += [Shaping(2.0, -0.5, 1.5, 0.0, ((70, 5.0),)), Shaping(presence=-6.0)]


def test_penalties_and_bias_are_what_they_are_defined_as(engine, full):
    """Beside each other and a plain row, over several slices."""
    asked = prompts(*range(20, 27))
    requests = [Request(p, 40, temperature=0.0, shaping=s) for p, s in zip(asked, [*SHAPES, None])]
    answers = [c.ids for c in engine.generate(requests)]
    for prompt, s, ids in zip(asked, [*SHAPES, Shaping()], answers):
        z, bare = full(prompt + ids), []
        for at, id in enumerate(ids):
            weighed = shaped(z[len(prompt) + at - 1], s, prompt, ids[:at])
            assert weighed[id] > weighed.max() - 1e-3
            bare.append(z[len(prompt) + at - 1].argmax() == id)
        assert len(ids) == 40 and all(bare) == (s == Shaping())
    assert answers[-1] == engine.generate([Request(asked[-1], 40, temperature=0.0)])[0].ids


def test_min_p_keeps_what_is_likely_enough(engine, full):
    [prompt] = prompts(30)
    z = full(prompt)[-1] / 2.0
    probs = np.exp(z - z.max())
    for top_k in (0, 50):
        how = {"temperature": 2.0, "top_k": top_k, "shaping": Shaping(min_p=0.3)}
        drawn = {c.ids[0] for c in engine.generate([Request(prompt, 1, seed=i, **how) for i in range(200)])}
        assert len(drawn) > 1 and all(probs[id] >= 0.3 - 1e-3 for id in drawn)


def test_the_next_turn_of_a_conversation_goes_on_from_the_cache(engine, model):
    [first, more] = prompts(60, 25)
    said = engine.generate([Request(first, 30, temperature=0.0)])[0].ids
    engine.generate([Request(p, 5, temperature=0.0) for p in prompts(40, 41)])  # others, in other slots
    before = engine.counters.reused_tokens
    turn = Request(first + said + more, 30, temperature=0.0)
    assert engine.generate([turn])[0].ids == alone(model, turn)
    assert engine.counters.reused_tokens - before == len(first + said) - 1  # the last one was never taken in


def test_a_prompt_that_parts_from_the_cache_early_is_not_misled_by_it(model):
    long = tiny_model(sequence_len=640)
    engine = Engine(long, slots=1, max_len=640)
    [base] = prompts(100)
    engine.generate([Request(base, 500, temperature=0.0)])  # 600 positions: the ring of 512 has lost the first ones
    for kept in (50, 99):
        turn = Request(base[:kept] + prompts(30)[0], 20, temperature=0.0)
        fresh = Engine(long, slots=1, max_len=640).generate([turn])[0].ids
        assert engine.generate([turn])[0].ids == fresh


def test_requests_that_share_a_prompt_compute_it_once(engine, model):
    [prompt] = prompts(100)
    asked = [Request(prompt, 12, temperature=1.0, seed=i) for i in range(SLOTS)]
    done = engine.generate(asked)
    assert engine.counters.reused_tokens == (SLOTS - 1) * 99
    assert [c.ids for c in done] == [alone(model, r) for r in asked]


def test_who_follows_a_copy_is_given_what_was_copied(engine, model):
    # a slot that holds much more than the prompt is kept, so the first copies it, and the second follows the first
    [prompt] = prompts(30)
    engine.generate([Request(p[::-1], 5, temperature=0.0) for p in prompts(40, 41, 42)])  # in slots used before it
    engine.generate([Request(prompt, 60, temperature=0.0)])
    asked = [Request(prompt, 20, temperature=0.0, seed=i) for i in range(3)]
    assert [c.ids for c in engine.generate(asked)] == [alone(model, asked[0])] * 3


def test_a_long_day_of_shared_prompts_cancels_and_turns_corrupts_nothing(model):
    rng = np.random.default_rng(7)
    engine, pool = Engine(model, slots=SLOTS, max_len=MAX_LEN), prompts(20, 35, 50, 70, 90, 110)
    known: dict[tuple, list[int]] = {}
    asked, turns = [], [p[::-1] for p in pool]
    for _ in range(120):
        for _ in range(rng.integers(0, 4)):
            base = turns[rng.integers(len(turns))]
            cut = base[: rng.integers(1, len(base) + 1)] if rng.random() < 0.3 else base
            asked.append(engine.submit(Request(cut, int(rng.integers(1, 25)), temperature=0.0)))
        if asked and rng.random() < 0.2:
            engine.cancel(asked[rng.integers(len(asked))])
        for event in engine.step():
            if event.completion and event.completion.finish_reason == "length" and event.ticket.length < 140:
                turns[rng.integers(len(turns))] = [*event.ticket.prompt, *event.completion.ids, 7]  # the next turn
    while engine.busy:
        engine.step()
    fresh = Engine(model, slots=1, max_len=MAX_LEN)
    for t in asked:
        key = tuple(t.prompt)
        if len(known.get(key, ())) < len(t.completion.ids):
            fresh.update_params(fresh.params)  # forgets what is in its cache
            known[key] = fresh.generate([Request(t.prompt, 25, temperature=0.0)])[0].ids
        assert t.completion.ids == known.get(key, [])[: len(t.completion.ids)]
    assert engine.counters.reused_tokens > engine.counters.prompt_tokens / 3


def test_who_waits_for_a_prompt_goes_on_where_its_leader_is_cancelled(engine, model):
    [prompt] = prompts(150)
    asked = [Request(prompt + [7], 5, temperature=0.0), Request(prompt + [8], 5, temperature=0.0)]
    leader, follower = (engine.submit(r) for r in asked)
    engine._admit()
    assert follower.leader is leader
    engine.cancel(leader)
    while engine.busy:
        engine.step()
    assert follower.completion.ids == alone(model, asked[1])


def test_a_long_prompt_does_not_freeze_who_is_running():
    model = tiny_model(sequence_len=1024)
    engine = Engine(model, slots=2, max_len=1024)
    [short, long] = prompts(10, 1000)
    running = engine.submit(Request(short, 200, temperature=0.0))
    engine.step()
    waiting, turns = engine.submit(Request(long, 5, temperature=0.0)), 0
    while not waiting.completion.ids:
        got = sum(len(e.ids) for e in engine.step() if e.ticket is running)
        turns += 1
        assert 0 < got <= SHORT  # a short slice each time, however long the prompt is
    assert turns >= 2  # 1000 tokens came in by chunks


def test_greedy_and_sampled_requests_say_the_same_alone_and_in_a_crowd(engine, model):
    rng = np.random.default_rng(3)
    asked = [
        Request(p, int(rng.integers(5, 60)), temperature=t, top_k=k, top_p=top_p, seed=i)
        for i, (p, (t, k, top_p)) in enumerate(
            zip(prompts(*rng.integers(1, 120, 24)), [(0.0, 0, 1.0), (1.0, 40, 1.0), (0.8, 0, 0.9), (1.0, 0, 1.0)] * 6)
        )
    ]
    together = [c.ids for c in engine.generate(asked)]
    assert together == [alone(model, r) for r in asked]


def test_slots_over_eight_devices_say_what_one_says(model):
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    mesh = sharding.make_mesh(MeshConfig())
    engine = Engine(model, slots=16, max_len=MAX_LEN, mesh=mesh)
    assert len(engine._cache[0][0].sharding.device_set) == 8
    asked = [Request(p, 20, temperature=0.0) for p in prompts(*range(3, 100, 7))]
    asked += asked[:4]  # shared prompts, which are copied between slots of one device
    one = Engine(model, slots=SLOTS, max_len=MAX_LEN).generate(asked)
    assert [c.ids for c in engine.generate(asked)] == [c.ids for c in one]


def test_nothing_is_compiled_after_the_warm_up_and_nothing_is_lost_by_it(model):
    engine = Engine(model, slots=2, max_len=MAX_LEN)
    [prompt, other] = prompts(50, 60)
    first = engine.generate([Request(prompt, 20, temperature=0.0)])[0].ids
    compiled: list[str] = []
    steps = sum(1 for _ in engine.warm_up(Request([0], 1, temperature=0.0)))
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    assert steps == 2 * (1 + 2 * 4)  # widths 1 and 2: a copy; two spans of three chunks and a slice
    turn = [Request(prompt + first + other[:9], 20, temperature=0.0), Request(other, 20, temperature=0.0)]
    said = [c.ids for c in engine.generate(turn)]
    jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "backend_compile" in name]
    assert engine.counters.reused_tokens >= len(prompt)
    assert said == [alone(model, r) for r in turn]


def test_int8_weights_are_a_quarter_and_say_nearly_the_same(model, full):
    engine = Engine(model, slots=SLOTS, max_len=MAX_LEN, int8=True)
    weight = engine.params["lm_head"]["weight"]
    assert weight.values.dtype == jnp.int8 and weight.values.shape == model.lm_head.weight.shape
    [prompt] = prompts(50)
    done = engine.generate([Request(prompt, 40, temperature=0.0, logprobs=0)])[0]
    z = full(prompt + done.ids).astype(np.float64)
    want = z - np.log(np.exp(z).sum(-1, keepdims=True))
    error = [abs(p.logprob - want[i, id]) for i, (id, p) in enumerate(zip(done.ids, done.logprobs), len(prompt) - 1)]
    assert 1e-5 < np.mean(error) < 0.1  # rounded, and only that


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


def draw(logits, n=4000, cap=lambda z: z, **settings):
    """(n,) samples from one row of logits under n seeds."""
    r = Request([0], 1, **{"temperature": 1.0, **settings})
    rows = Settings.blank(n)
    for i in range(n):
        rows.fill(i, replace(r, seed=i))
    z = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    how = mode([r], len(logits))

    def drawn(z, rows):
        return sample(z, rows, Chance.of(rows, jnp.zeros(n, jnp.int32), len(logits), how), how, cap)

    return np.asarray(jax.jit(drawn)(z, rows))


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
        ({"temperature": 1e-300}, [1, 0, 0, 0, 0]),
    ],
)
def test_sampling_follows_its_distribution(settings, want):
    got = np.bincount(draw(LOGITS, **settings), minlength=5) / 4000
    assert np.abs(got - want).max() < 0.03 and (got[np.asarray(want) == 0] == 0).all()


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.9}, {"temperature": 0.0}]
)
def test_the_softcap_may_be_taken_of_the_likeliest_alone(settings):
    raw = np.random.default_rng(0).normal(scale=9, size=2048).astype(np.float32)
    cap = functools.partial(softcapped, softcap=15.0)
    assert np.array_equal(draw(raw, 500, cap, **settings), draw(cap(raw), 500, **settings))


def test_mode_is_the_cheapest_that_is_exact():
    def how(*settings):
        return mode([Request([0], 1, **s) for s in settings], 1000)[:5]

    assert not mode([Request([0], 1)], 1000).shaped and mode([Request([0], 1, shaping=Shaping())], 1000).shaped
    assert how({"temperature": 0.0, "top_k": 5}) == (True, False, False, 0, False)
    assert how({}) == (False, True, True, 0, False)
    assert how({"top_k": 50}, {}) == (False, True, True, 64, False)
    assert how({"top_k": 100}) == (False, True, False, 256, False)
    assert how({"top_p": 0.9})[3] == 1000 and how({"top_k": 500})[3] == 1000
    assert how({"top_k": 20, "top_p": 0.9}, {"temperature": 0.0, "logprobs": 0}) == (True, True, False, 64, True)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("size", "k"), [(300, 64), (20_000, 64), (16_384, 20), (33_000, 256)])
def test_top_k_by_groups_is_top_k(size, k, platform):
    x = jnp.asarray(np.random.default_rng(size).integers(0, 500, (3, size)), jnp.float32)  # many ties
    with devices.tracing_for(platform):
        got = jax.jit(lambda x: _top_k(x, k))(x)
    want = jax.lax.top_k(x, k)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(x), np.asarray(got[1]), 1), want[0])
    assert all(len(set(row)) == k for row in np.asarray(got[1]).tolist())
