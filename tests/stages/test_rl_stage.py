"""The RL stage on a model of a few thousand parameters: stopped and resumed, on meshes, with every switch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evals_fakes import ByteTokenizer

from evals.tasks.base import ScoredTask
from nanochat_jax import checkpoint, config, devices
from nanochat_jax.engine.dialogue import Caller
from nanochat_jax.engine.engine import Completion
from nanochat_jax.errors import Interrupted, UserError
from nanochat_jax.mesh.preemption import Stop
from nanochat_jax.model.gpt import graph_of, init_params, merge
from nanochat_jax.stages import common, rl, step
from nanochat_jax.stages.rollouts import Questions, Sampler, training_batch
from nanochat_jax.tracking.tracking import RunLog

TINY = (
    "model.depth=1",
    "model.width=32",
    "model.head_dim=16",
    "model.sequence_len=128",
    "base.batch_tokens=1024",
    "rl.questions=4",
    "rl.samples=4",
    "rl.steps=4",
    "rl.max_new_tokens=12",
    "rl.eval_every=2",
    "rl.eval_questions=2",
    "rl.eval_samples=2",
    "rl.micro_batch=2",
    "rl.optim.lr_scale=1",
)
ALL = (
    "remat=full",
    "optimizer_state=light",
    "rl.task={bytes: 1, length: 1}",
    "rl.top_k=0",
    "rl.temperature=0.8",
    "rl.kl=0.1",
    "rl.clip=0.002",
    "rl.clip_high=0.003",
    "rl.zscore=true",
    "rl.epochs=2",
    "rl.minibatches=2",
)
NOTHING = optax.identity()
MESHES = {"data": ("mesh.data=8",), "data-fsdp": ("mesh.data=4", "mesh.fsdp=2")}


class Toy(ScoredTask):
    """Any answer of a kind that a model which knows nothing gives about half of the time is right."""

    kind = "generative"

    def __init__(self, name, right):
        self.name, self.right = name, right

    def __len__(self):
        return 50

    def __getitem__(self, i):
        messages = [{"role": "user", "content": f"{self.name} {i}?"}, {"role": "assistant", "content": "yes"}]
        return {"messages": messages}

    def evaluate(self, conversation, completion):
        return self.right(completion)


TASKS = {
    "bytes": Toy("bytes", lambda said: sum(said.encode()) % 2 == 0),
    "length": Toy("length", lambda said: len(said) % 2 == 0),
}


class TinyRun(common.Run):
    """A run whose SFT model is made when it is asked for."""

    tokenizer = ByteTokenizer()

    def params_of(self, stage):
        assert stage == "sft"
        rng = np.random.default_rng(1)
        shapes = jax.eval_shape(lambda: init_params(self.gpt_config, 0))
        return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), jnp.float32), shapes)


class StopAfter(Stop):
    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def agreed(self, due=False):
        self.left -= 1
        return self.left == 0, due


def make_run(folder, *settings, stop_after=99):
    folder.mkdir(exist_ok=True)
    checkpoint.write_done(folder / "sft", {"stage": "sft"})
    return TinyRun(folder, config.load_config(None, None, [*TINY, *settings]), RunLog(folder), StopAfter(stop_after))


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Programs are compiled once for all runs, as in a run's own cache."""
    before = jax.config.jax_compilation_cache_dir
    devices.use_compilation_cache(tmp_path_factory.mktemp("compiled"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(rl, "load_task", lambda name, **_: TASKS[name])


def records(folder):
    timing = ("time", "tokens_per_second", "mfu", "memory_gb")
    lines = (folder / "rl" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def saved(run):
    keeper = checkpoint.Checkpointer(run.dir / "rl" / "checkpoints", run.config.checkpoints)
    shape = jax.eval_shape(lambda: {"params": init_params(run.gpt_config, 0)})
    try:
        return keeper.restore(shape)[0]["params"]
    finally:
        keeper.close()


@pytest.mark.slow
def test_stopped_and_resumed_bit_for_bit_with_every_switch_on_a_mesh(tmp_path):
    settings = (*ALL, *MESHES["data-fsdp"])
    done = rl.main(make_run(tmp_path / "whole", *settings))
    with pytest.raises(Interrupted, match="saved at step 2 of 4"):
        rl.main(make_run(tmp_path / "parts", *settings, stop_after=2))
    rl.main(make_run(tmp_path / "parts", *settings))
    whole = records(tmp_path / "whole")
    assert records(tmp_path / "parts") == whole
    ends = [jax.tree.leaves(saved(make_run(tmp_path / d, *settings))) for d in ("whole", "parts")]
    assert all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))

    steps = [r for r in whole if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4] and steps[0]["kl"] == 0 < steps[-1]["kl"]
    assert max(r["clip_fraction"] for r in steps) > 0.05 and all(0 < r["entropy"] < np.log(265) for r in steps)
    assert all(0 <= r["truncated"] <= 1 <= r["completion_tokens"] <= 12 for r in steps)
    assert all(r["reward"] == pytest.approx((r["bytes/reward"] + r["length/reward"]) / 2) for r in steps)
    scored = [r for r in whole if "pass@1" in r]
    assert [r["step"] for r in scored] == [0, 2, 4] and {"bytes/pass@1", "length/pass@2", "pass@2"} <= set(scored[0])
    assert done["task"] == {"bytes": 1, "length": 1} and done["steps"] == 4


def test_what_is_measured_changes_nothing(tmp_path):
    """kl=0, and clipping where there is one update, leave the parameters as they are without, bit for bit."""
    settings = ("rl.task=bytes", "rl.steps=2", "rl.eval_every=0", "rl.top_k=0", *MESHES["data-fsdp"])
    plain, measured = make_run(tmp_path / "a", *settings), make_run(tmp_path / "b", *settings, "rl.kl=0", "rl.clip=0.2")
    rl.main(plain)
    rl.main(measured)
    pairs = zip(jax.tree.leaves(saved(plain)), jax.tree.leaves(saved(measured)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    last = records(tmp_path / "b")[-2]
    assert last["kl"] > 0 and last["clip_fraction"] == 0 and "kl" not in records(tmp_path / "a")[-2]


def test_dpo_learns_to_prefer_what_is_right(tmp_path):
    settings = ("rl.task=bytes", "rl.objective=dpo", "rl.steps=6", "rl.optim.warmdown=0", *MESHES["data-fsdp"])
    rl.main(make_run(tmp_path, *settings))
    steps = [r for r in records(tmp_path) if "loss" in r]
    assert steps[0]["loss"] == pytest.approx(np.log(2)) and steps[0]["margin"] == 0 and "kl" not in steps[0]
    assert steps[-1]["entropy"] != steps[0]["entropy"] and np.mean([r["preferred"] for r in steps[2:]]) > 0.6


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_eight_devices_sample_what_one_does(mesh, tmp_path):
    """From parameters that are on the mesh as the train state's are."""
    found = []
    for name, settings in (("one", ()), ("eight", mesh)):
        run = make_run(tmp_path / name, "rl.task=length", *settings)
        if name == "one":
            run.mesh = None
        params = run.params_of("sft")
        sampler = Sampler(run, merge(graph_of(run.gpt_config, run.dtype), params), slots=16)
        if run.mesh is not None:
            params = common.loop.init_state(run.gpt_config, NOTHING, 0, run.mesh, params).params
            assert len(sampler.engine.arrays[1][0][0].sharding.device_set) == 8
        questions = Questions({"length": TASKS["length"]}, {"length": 1}, 0)
        found.append(sampler(params, [questions[i] for i in range(4)], 4, lambda q, s: common.mix_seed(q, s)))
    one, eight = found
    assert [[c.ids for c in g] for g in one.completions] == [[c.ids for c in g] for g in eight.completions]
    assert np.array_equal(one.rewards, eight.rewards) and len({tuple(c.ids) for c in one.completions[0]}) > 1


class Asking(Toy):
    """Right is who asks the tool and says what it gave."""

    def caller(self, conversation):
        return Caller(frozenset({"f"}), lambda call: "42")

    def reward(self, conversation, said):
        assert [part["type"] for part in said] == ["python", "python_output", "text"]
        return float(said[1]["text"] in said[2]["text"])


class SaysInTurn:
    """An engine of which the first answers are calls and the next ones what was given."""

    def __init__(self, tok, max_len):
        self.tok, self.max_len, self.asked = tok, max_len, []

    def update_params(self, params): ...

    def generate(self, requests):
        self.asked.append(requests)
        tok, call = self.tok, [self.tok.python_start, *b"f()", self.tok.python_end]
        say = [call if tok.output_end not in r.ids else list(b"42" if r.seed % 2 else b"no") for r in requests]
        return [Completion(ids, [1] * len(ids), "stop") for ids in say]


def test_tools_run_between_turns_and_what_they_say_is_not_learned(tmp_path):
    run = make_run(tmp_path, "rl.task=asking", "rl.max_new_tokens=20")
    sampler = Sampler(run, merge(graph_of(run.gpt_config, run.dtype), run.params_of("sft")), slots=4)
    sampler.engine = SaysInTurn(run.tokenizer, 128)
    questions = Questions({"asking": Asking("asking", None)}, {"asking": 1}, 0)
    found = sampler({}, [questions[0], questions[1]], 2, lambda q, s: s)
    tok, output = run.tokenizer, [run.tokenizer.output_start, *b"42", run.tokenizer.output_end]
    assert found.rewards.tolist() == [[0, 1], [0, 1]] and [len(requests) for requests in sampler.engine.asked] == [4, 4]
    whole = found.completions[0][1]
    assert whole.ids == [tok.python_start, *b"f()", tok.python_end, *output, *b"42"]
    assert whole.mask == [1] * 5 + [0] * 4 + [1] * 2
    batch = training_batch(found, tok.assistant_end, tok.bos, 128)
    place = len(found.prompts[0]) - 1  # of the first target of the answer
    assert (batch["weights"][1, place + 5 : place + 9] == 0).all() and (
        batch["targets"][1, place + 5 : place + 9] == -1
    ).all()
    assert (batch["weights"][1, [*range(place, place + 5), *range(place + 9, place + 12)]] > 0).all()
    assert (batch["weights"][0, place : place + 5] < 0).all() and not batch["weights"][0, place + 12 :].any()


class Long(Toy):
    """Every second question is longer than the context."""

    def __getitem__(self, i):
        found = super().__getitem__(i)
        found["messages"][0]["content"] *= 1 + 600 * (i % 2)
        return found


def test_questions_longer_than_the_context_are_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "load_task", lambda *_, **__: Long("length", TASKS["length"].right))
    rl.main(make_run(tmp_path, "rl.task=length", "rl.steps=2"))
    steps = [r for r in records(tmp_path) if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2] and 0 < sum(r["skipped"] for r in steps) < 8
    assert all(np.isfinite(r["loss"]) and r["completion_tokens"] > 0 for r in steps if r["skipped"] < 4)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("of length leaves no room for an answer in model.sequence_len=128") == 1
    held_out = [r["pass@2"] for r in records(tmp_path) if "pass@2" in r]
    assert held_out and all(p <= 0.5 for p in held_out)  # they are wrong there, as in evaluation


def test_a_split_without_questions_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "__len__", lambda self: 0)
    with pytest.raises(UserError, match="rl.task=bytes has no questions in its train split"):
        rl.main(make_run(tmp_path, "rl.task=bytes"))


def test_sequences_that_devices_cannot_share_say_so(tmp_path):
    with pytest.raises(UserError, match="rl: 12 sequences .* multiple of 8"):
        rl.main(make_run(tmp_path, "rl.questions=3", "mesh.data=8", "rl.task=bytes"))


def test_a_micro_batch_that_fits_is_found_beside_what_is_held(tmp_path, monkeypatch):
    class Step:  # needs 100 bytes and 10 for every row, and less where less is kept
        def __init__(self, level):
            self.less = {"none": 0, "block": 20, "full": 40}[level]

        def lower(self, state, batch):
            assert state == "state" and batch["weights"].shape[2] == 64
            self.rows = batch["weights"].shape[1]
            return self

        def compile(self):
            return 100 - self.less + 10 * self.rows

    monkeypatch.setattr(step.memory, "device_bytes", lambda: 300)
    monkeypatch.setattr(step.memory, "needed_bytes", lambda compiled: compiled)
    run = make_run(tmp_path, "rl.micro_batch=16", "remat=none", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=8")
    arrays = {"tokens": np.int32, "weights": np.float32}
    sizes = [step.fit_step(run, "rl", Step, "state", arrays, (16, 64), held) for held in (0, 100, 130)]
    assert [(s.accumulation, s.rows) for s in sizes] == [(1, 16), (2, 8), (4, 4)]
    with pytest.raises(UserError, match="rl: a step needs .* even with 1 rows"):
        step.fit_step(run, "rl", Step, "state", arrays, (16, 64), 200)
    run = make_run(tmp_path / "auto", "rl.micro_batch=16", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=8")
    needs = [step.fit_step(run, "rl", Step, "state", arrays, (16, 64), held) for held in (40, 55, 70)]
    assert [(s.run, s.rows) for s in needs] == [(260, 16), (240, 16), (220, 16)]  # cheapest with the wanted rows
