"""Settings: files, overrides, and mistakes, which are one line each."""

import ast
import dataclasses
import operator
import typing
from pathlib import Path

import pytest

import run_speedrun
from evals.tasks import check_names
from nanochat_jax import config as c
from nanochat_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CODE = ("nanochat_jax", "tokenizer", "evals", "server", "run_speedrun.py")


def test_file_mesh_and_overrides_in_this_order(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {depth: 6}\nbase: {ratio: 8, optim: {matrix_lr: 1e-2}}\n")
    (tmp_path / "m.yaml").write_text("fsdp: 2\n")
    got = c.load_config(tmp_path / "a.yaml", tmp_path / "m.yaml", ["base.ratio=9.5", "rl.task=gsm8k", "sft.max_rows="])
    assert (got.model.depth, got.base.ratio, got.mesh.fsdp, got.rl.task) == (6, 9.5, 2, "gsm8k")
    assert got.base.optim.matrix_lr == 0.01 and got.base.optim.embedding_lr == 0.3 and got.sft.max_rows is None
    assert c.load_config(None, None, ["rl.task={gsm8k: 3, spellingbee: 1}"]).rl.task == {"gsm8k": 3, "spellingbee": 1}
    assert c.load_config(None, None, ["mid.optim.lr_scale=3"]).mid.optim.warmup_steps == 0  # a stage's own default
    (tmp_path / "b.yaml").write_text(c.dump_yaml(got))
    assert c.load_config(tmp_path / "b.yaml") == got


def test_next_sets_what_a_person_leaves_open(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {arch: next, depth: 6}\nbase: {optim: {lr_scale: 2}}\n")
    got = c.load_config(tmp_path / "a.yaml", None, ["model.key_offset=false"])
    assert not got.model.key_offset and got.base.optim.batch_power == 0
    assert (got.model.depth, got.base.optim.lr_scale, got.mid.optim.batch_power) == (6, 2, 0.5)
    assert c.load_config(None, None, ["model.arch=next"]) == c.load_config(tmp_path / "a.yaml", None, BACK)
    (tmp_path / "b.yaml").write_text(c.dump_yaml(got))
    assert c.load_config(tmp_path / "b.yaml") == got  # a run directory's file says all of it
    assert not c.load_config(None, None, ["model.arch=modern"]).model.key_offset


@pytest.mark.parametrize(
    "file", sorted(Path(run_speedrun.__file__).parent.glob("configs/*.yaml")), ids=lambda p: p.stem
)
def test_next_leaves_rates_that_a_file_sets_as_they_are(file):
    said, changed = (c.read_settings(file, None, more) for more in ((), ["model.arch=next"]))
    of, instead = (c.from_dict(c.OptimConfig, s.get("base", {}).get("optim", {}), "optim") for s in (said, changed))
    rated = {"matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr"} & set(said.get("base", {}).get("optim", {}))
    power = of.batch_power if rated else 0
    assert instead == dataclasses.replace(of, batch_power=power, centred_head=True)


@pytest.mark.parametrize(
    ("settings", "sample"),
    [
        (["base.batch_tokens=8192"], 8192),
        (["base.batch_tokens=8192", "base.vocab_sample=null"], None),
        (["base.batch_tokens=8192", "base.vocab_sample=512"], 512),
        (["base.batch_tokens=16384"], None),
        (["base.batch_tokens=null"], None),
        (["base.batch_tokens=2048", "tokenizer.vocab_size=8192"], None),
        ([], None),
    ],
)
def test_next_samples_a_large_vocabulary_in_small_batches(settings, sample):
    assert c.load_config(None, None, ["model.arch=next", *settings]).base.vocab_sample == sample


def test_a_run_of_an_earlier_version_is_read_where_what_is_gone_was_off(tmp_path):
    said = c.dump_yaml(c.RunConfig()).replace("    warmup_steps: 40", "    average: 0.0\n    warmup_steps: 40", 1)
    (tmp_path / "config.yaml").write_text(said)
    assert c.read_run_config(tmp_path) == c.RunConfig()
    (tmp_path / "config.yaml").write_text(said.replace("average: 0.0", "average: 0.1"))
    with pytest.raises(UserError, match="unknown setting base.optim.average"):
        c.read_run_config(tmp_path)
    (tmp_path / "config.yaml").write_text("experimnt: {a: {b: 1}}")
    with pytest.raises(UserError, match="unknown setting experimnt"):
        c.read_run_config(tmp_path)


BACK = ["model.depth=4", "base.optim.lr_scale=1"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.dept=4", "unknown setting model.dept: did you mean depth?"),
        ("modle.depth=4", "unknown setting modle: did you mean model?"),
        ("model.depth=four", "model.depth takes an int and not 'four'"),
        ("model.depth=4.5", "model.depth takes an int"),
        ("model.depth=0", "must be at least 1"),
        ("model=4", "model is a section"),
        ("model.depth", "written key=value"),
        ("model.arch=modren", "is not one of modern, classic, next"),
        ("model.width=100", "must be a multiple of model.head_dim"),
        ("model.width=16", "take 24 or more"),
        ("model.window_pattern=SXL", "only the letters S and L"),
        ("tokenizer.vocab_size=100", "too small"),
        ("tokenizer.vocab_size=100000", "does not fit 16 bits"),
        ("base.batch_tokens=1000", "must be a multiple of model.sequence_len"),
        ("data.dir=/no/such/folder", "is not a folder"),
        ("data.source=local", "needs data.dir"),
        ("evals.stages=3", "is not one of base, mid, sft, rl"),
        ("evals.sandbox=never", "is not one of auto, required"),
        ("evals.samples=-1", "must not be negative"),
        ("tracking.samples=-1", "must not be negative"),
        ("evals.temperature=0", "must be more than 0"),
        ("mid.mixture=3", "takes a mapping"),
        ("sft.lora_rank=0", "sft.lora_rank=0 must be at least 1; leave it out"),
        ("rl.task={gsm8k: 0}", "shares of 1 or more"),
        ("rl.task={gsm8k: half}", "rl.task.gsm8k takes an int"),
        ("rl.minibatches=3", "must be a multiple of rl.minibatches=3"),
        ("rl.clip=1.2", "must lie between 0 and 1"),
        ("rl.clip_high=0.3", "must be at least rl.clip, which is None"),
        ("rl.kl=-1", "must not be negative"),
        ("rl.kl=0.05", "rl.kl=0.05 needs rl.top_k=0, not 50"),
        ("rl.clip=0.2", "rl.clip=0.2 needs rl.top_k=0, not 50"),
        ("rl.epochs=2", "rl.epochs=2 needs rl.top_k=0, not 50"),
        ("rl.minibatches=2", "rl.minibatches=2 needs rl.top_k=0, not 50"),
        ("rl.temperature=0.1", "must be at least 0.25"),
        ("base.vocab_sample=32768", "less than tokenizer.vocab_size=32768"),
        ("base.vocab_sample=1", "must be 2 or more"),
        (["model.arch=classic", "base.optim.batch_power=0"], "must be left out with model.arch=classic"),
        ("rl.temperature=nan", "must be a finite number"),
        ("checkpoints.save_minutes=0", "must be more than 0; leave it out"),
        ("model.head_dim=3", "must be even"),
        ("rl.objective=ppo", "is not one of grpo, dpo"),
        ("price_per_hour=[1", "takes a float"),
        ("sft.epochs=0", "must be more than 0"),
        ("sft.epochs=nan", "must be a finite number"),
        ("sft.max_rows=0", "must be at least 1"),
        ("rl.temperature=0", "must be more than 0"),
        ("rl.top_k=-5", "must not be negative"),
        ("rl.max_new_tokens=0", "must be at least 1"),
        ("rl.steps=-1", "must be at least 1"),
        ("base.tokens=0", "must be at least 1"),
        ("base.tokens=1.5", "takes an int and not '1.5'"),
        ("base.batch_tokens=0", "must be at least 1"),
        ("base.save_every=0", "must be at least 1"),
        ("base.eval_every=-1", "must not be negative"),
        ("base.optim.matrix_lr=nan", "must be a finite number"),
        ("base.optim.matrix_lr=-1", "must not be negative"),
        ("base.optim.warmdown=2", "must be at most 1"),
        ("tokenizer.sample_chars=0", "must be at least 1"),
        ("data.pack_buffer=0", "must be at least 1"),
        ("data.hub_shards=0", "must be at least 1"),
        ("model.n_kv_head=0", "must be at least 1"),
        ("model.n_kv_head=3", "must divide the number of heads"),
        ("mesh.data=0", "or -1 for what is left"),
        ("evals.stages=sft,foo", "evals.stages=foo is not one of base, mid, sft, rl"),
        ("seed=-1", "must not be negative"),
        (f"seed={2**64}", "must be at most"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(override, says):
    with pytest.raises(UserError) as e:
        c.load_config(None, None, [override] if isinstance(override, str) else override)
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.text_column=on", "on"),
        ("data.hub_folder=no", "no"),
        ("data.cache_dir=2025-10-01", "2025-10-01"),
        ("tracking.wandb=123", "123"),
        ("base.tokens=1e6", 1_000_000),
        ("base.tokens=010", 10),
        ("base.tokens=1_000", 1000),
        ("base.optim.matrix_lr=1e-3", 0.001),
        ("base.fp8=yes", True),
        ("sft.max_rows=null", None),
        ("base.eval_every=0", 0),
        ("evals.stages=[sft, rl]", ("sft", "rl")),
    ],
)
def test_a_settings_type_says_how_its_text_is_read(tmp_path, override, value):
    name, text = override.split("=")
    section, _, key = name.partition(".")
    for part in reversed(key.split(".")):
        text = f"{{{part}: {text}}}"
    (tmp_path / "x.yaml").write_text(f"{section}: {text}")
    for found in (c.load_config(None, None, [override]), c.load_config(tmp_path / "x.yaml")):
        assert operator.attrgetter(name)(found) == value


def test_a_mapping_takes_the_place_of_another_and_a_dotted_setting_adds_to_it(tmp_path):
    (tmp_path / "x.yaml").write_text("sft: {mixture: {chat: 1}, optim: {lr_scale: 2}}")
    assert c.load_config(tmp_path / "x.yaml", None, ["sft.mixture={gsm8k: 1}"]).sft.mixture == {"gsm8k": 1}
    found = c.load_config(tmp_path / "x.yaml", None, ["sft.mixture.gsm8k=2", "sft={epochs: 3}"]).sft
    assert found.mixture == {"chat": 1, "gsm8k": 2} and (found.optim.lr_scale, found.epochs) == (2, 3)


def test_a_task_that_there_is_none_of_is_refused_before_anything_runs():
    check_names(c.load_config(None, None, ["rl.task={sums: 1}", "evals.chat_tasks=everyday", "mid.mixture={talk: 1}"]))
    for setting in ("evals.chat_tasks=foo", "rl.task=foo", "sft.mixture={foo: 1}"):
        with pytest.raises(UserError, match=f"{setting.split('=')[0]} names 'foo'"):
            check_names(c.load_config(None, None, [setting]))


def test_probabilities_are_compared_where_samples_are_of_all_tokens():
    switches = ["rl.temperature=0.6", "rl.kl=0.05", "rl.clip=0.2", "rl.epochs=2", "rl.minibatches=2", "rl.top_k=0"]
    assert c.load_config(None, None, switches).rl.temperature == 0.6
    assert c.load_config(None, None, ["rl.objective=dpo", "rl.epochs=2"]).rl.top_k == 50  # it has no such ratio


def test_what_only_grpo_has_is_refused_for_dpo():
    assert c.load_config(None, None, ["rl.objective=dpo"]).rl.beta == 0.1
    for setting in ("rl.kl=0.1", "rl.clip=0.2", "rl.zscore=true"):
        with pytest.raises(UserError, match="must be left out with rl.objective=dpo"):
            c.load_config(None, None, ["rl.objective=dpo", setting])


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="no configuration file .* at hand: .*demo.yaml"):
        c.load_config(ROOT / "configs" / "nosuch.yaml")
    (tmp_path / "x.yaml").write_text("a: [1\nb: }")
    with pytest.raises(UserError, match="is not valid YAML"):
        c.load_config(tmp_path / "x.yaml")


OF_RUNS = [
    p for p in sorted((ROOT / "configs").glob("*.yaml")) if "experiment" not in p.name and "miniseries" not in p.name
]


@pytest.mark.parametrize("path", OF_RUNS, ids=lambda p: p.stem)
def test_every_shipped_configuration_loads(path):
    assert isinstance(c.load_config(path), c.RunConfig)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "mesh").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_mesh_loads(path):
    mesh = c.load_config(None, path).mesh
    assert sum(n == -1 for n in dataclasses.astuple(mesh)) <= 1


def attributes_read() -> set[str]:
    """Names that any of our code outside config.py and rules.py reads as attributes."""
    names = set()
    for place in CODE:
        for path in [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"):
            if path.name not in ("config.py", "rules.py"):
                tree = ast.parse(path.read_text())
                names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and type(n.ctx) is ast.Load}
    return names


def sections(cls=c.RunConfig) -> set[type]:
    hints = typing.get_type_hints(cls)
    nested = [t for t in hints.values() if dataclasses.is_dataclass(t)]
    return {cls}.union(*(sections(t) for t in nested)) if nested else {cls}


def test_every_setting_is_read_by_some_code():
    read = attributes_read()
    # the sections mid, sft and rl are taken by the stage's name
    unread = [f"{s.__name__}.{f.name}" for s in sections() for f in dataclasses.fields(s) if f.name not in read]
    assert [name for name in unread if name not in ("RunConfig.mid", "RunConfig.sft")] == []
    assert len(sections()) == 12


def printed(capsys, *argv) -> list[tuple[str, str]]:
    """(`key=default`, comment) of each setting that `run_speedrun.py --settings` lists."""
    assert run_speedrun.main(["--settings", *argv]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line and line[0] != "#"]
    return [(setting.strip().replace(" = ", "=", 1), said) for setting, said in (line.split("   # ") for line in lines)]


def test_settings_lists_every_setting_once_with_its_default_and_a_comment(capsys):
    def keys(values: dict, path: str = "") -> list[str]:
        nested = [keys(v, f"{path}{k}.") if isinstance(v, dict) else [f"{path}{k}"] for k, v in values.items()]
        return sum(nested, [])

    rows = printed(capsys)
    assert sorted(setting.split("=")[0] for setting, _ in rows) == sorted(keys(c.to_dict(c.RunConfig())))
    assert [setting for setting, said in rows if len(said) < 5] == []
    assert c.load_config(None, None, [setting for setting, _ in rows]) == c.RunConfig()
    assert all(s.__doc__ and not s.__doc__.startswith(s.__name__) for s in sections()), "a section without docstring"


def test_settings_with_a_word(capsys):
    assert [setting for setting, _ in printed(capsys, "LORA_R")] == ["mid.lora_rank=null", "sft.lora_rank=null"]
    assert ("rl.optim.warmdown=1.0", "share of the steps over which the rate falls") in printed(capsys, "rate falls")
    ((setting, said),) = printed(capsys, "spellingbee")
    assert setting == "rl.task=null" and said.endswith("or arithmetic with the embedded data")  # comment lines above it
    assert run_speedrun.main(["--settings", "perplexity"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: no setting has 'perplexity' in its name") and err.count("\n") == 1
