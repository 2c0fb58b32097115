"""Weights out and in: what others read is what we have, and what comes back is what went out."""

import filecmp
import importlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jinja2
import jinja2.sandbox
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import run_speedrun
from conftest import GOLDEN, ROOT, Golden, golden_files, relative_error
from nanochat_jax import export
from nanochat_jax.chats import conversation_of, prompt_of
from nanochat_jax.checkpoint import Checkpointer, load_model, read_done, write_done
from nanochat_jax.config import TokenizerConfig, dump_yaml, load_config
from nanochat_jax.engine.engine import Engine, Request
from nanochat_jax.errors import UserError
from nanochat_jax.model import scaling
from nanochat_jax.model.gpt import init_params
from nanochat_jax.signatures import functions_of
from nanochat_jax.weights import configs, pickles
from nanochat_jax.weights.folder import read_folder
from nanochat_jax.weights.tensors import read_tensors, write_tensors
from nanochat_jax.weights.tokenizer_json import TEMPLATE, from_tiktoken, tokenizer_json
from tokenizer import SPECIAL_TOKENS, StreamDecoder, load_tokenizer
from tokenizer.bytelevel import GUARD, ByteLevelTokenizer
from tokenizer.chat import render, render_prompt
from tokenizer.tokenizer import MAX_PIECE_CHARS
from tokenizer.train import train_tokenizer

importing = importlib.import_module("nanochat_jax.import")
THEIRS = GOLDEN / "reference_tiny"
VOCAB = 1000  # no multiple of 64, so that tables are padded
ODD = "\u2581\ue000\u2585\x00\x01\x7f \n\r\t\u00a0\u2028\u3000\ufeff\ufffd\u0301e日🙂\U0010ffff<|>_='09aA" + GUARD
TEXT = st.one_of(
    st.text(), st.text(alphabet=ODD), st.lists(st.sampled_from([*ODD, *SPECIAL_TOKENS, "<unk>", "<0x41>"])).map("".join)
)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = [f"Der {i}. Satz — it's «{i * 37}» or 日本語 and Ελληνικά?\r\n\n\n\t{'=' * (i % 20)}\n" for i in range(200)]
    texts = [path.read_text() for path in sorted(ROOT.glob("nanochat_jax/*.py"))] + made
    train_tokenizer(iter(texts), folder, TokenizerConfig(vocab_size=VOCAB), log=lambda _: None)
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=["classic", "modern"])
def run(request, tok, tmp_path_factory):
    """A run directory whose sft stage has random weights, as if trained."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    sizes = ("depth=2", "width=32", "head_dim=16", "n_kv_head=1", "sequence_len=192", f"arch={request.param}")
    config = load_config(None, None, [f"tokenizer.vocab_size={VOCAB}", *(f"model.{size}" for size in sizes)])
    params = init_params(scaling.gpt_config(config.model, VOCAB), 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape, np.float32), params)
    tok.save(folder / "tokenizer")
    checkpointer = Checkpointer(folder / "sft" / "checkpoints")
    meta = {"stage": "sft", "seed": 3, "tokenizer": tok.hash, "config": "abc", "last": {"loss": 1.5}}
    checkpointer.save(30, {"params": params, "opt_state": {"m": params}}, meta)
    checkpointer.close()
    write_done(folder / "sft", {"seconds": 1.0, "metrics": {}})
    (folder / "config.yaml").write_text(dump_yaml(config))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    to = tmp_path_factory.mktemp("out") / "folder"
    assert export.main(["--run-dir", str(run), "--to", str(to)]) == 0
    return to


def bring_in(source, run_dir, *more) -> int:
    return importing.main(["--from", str(source), "--run-dir", str(run_dir), *more])


def params_of(run_dir, stage) -> dict:
    return nnx.to_pure_dict(nnx.split(load_model(run_dir, stage).model)[1])


# --------------------------------------------------------------------------------------------- round trips


def test_round_trip(run, exported, tmp_path):
    """Out, in and out again: the same files; in between a run with the same parameters."""
    assert bring_in(exported, tmp_path / "run") == 0
    assert export.main(["--run-dir", str(tmp_path / "run"), "--to", str(tmp_path / "again")]) == 0
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir()) and "model.safetensors" in names
    assert filecmp.cmpfiles(exported, tmp_path / "again", names, shallow=False) == (names, [], [])
    first, second = load_model(run), load_model(tmp_path / "run")
    assert (second.stage, second.step, second.model.cfg) == ("sft", 30, first.model.cfg)
    for mine, back in zip(jax.tree.leaves(params_of(run, "sft")), jax.tree.leaves(params_of(tmp_path / "run", "sft"))):
        np.testing.assert_array_equal(mine[:VOCAB], back[:VOCAB])  # what pads a table is never read
    assert read_done(tmp_path / "run" / "sft")["imported"]["seed"] == "3"


def test_half_the_size(run, exported, tmp_path):
    """In bfloat16: every number is rounded once, and the files of what comes back are the same again."""
    for source, out in ((run, "a"), (tmp_path / "run", "b")):
        assert export.main(["--run-dir", str(source), "--to", str(tmp_path / out), "--dtype", "bfloat16"]) == 0
        assert out == "b" or bring_in(tmp_path / out, tmp_path / "run") == 0
    names = [path.name for path in (tmp_path / "a").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[1:] == ([], [])
    whole, half = (read_tensors(folder / "model.safetensors")[0] for folder in (exported, tmp_path / "a"))
    for name, array in whole.items():
        assert half[name].dtype == "bfloat16" and half[name].nbytes * 2 == array.nbytes
        np.testing.assert_array_equal(half[name], array.astype(half[name].dtype))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"


def test_header_says_where_it_came_from(run, exported):
    _, notes = read_tensors(exported / "model.safetensors")
    arch = load_model(run).config.model.arch
    want = {"producer": "nanochat_jax", "arch": arch, "stage": "sft", "step": "30", "seed": "3", "config": "abc"}
    assert want.items() <= notes.items() and notes["format"] == "pt"


def test_nothing_is_left_where_it_fails(run, exported, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert export.main(["--run-dir", str(run), "--to", str(tmp_path / "full")]) == 2
    assert "full already" in capsys.readouterr().err
    assert bring_in(exported, tmp_path / "run", "model.depht=3") == 2
    assert "unknown setting model.depht" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


def test_settings_of_later_stages(exported, tmp_path):
    assert bring_in(exported, tmp_path / "run", "--stage", "mid", "sft.max_rows=7", "model.depth=9") == 0
    loaded = load_model(tmp_path / "run")
    assert (loaded.stage, loaded.config.sft.max_rows, loaded.config.model.depth) == ("mid", 7, 2)
    assert read_done(tmp_path / "run" / "mid")["batch_tokens"] > 0
    run = SimpleNamespace(dir=tmp_path / "run")
    for stage in ("sft", "rl", "eval", "report"):  # go on from there
        run_speedrun.needs(run, stage, [stage])
    with pytest.raises(UserError, match="mid needs base"):
        run_speedrun.needs(run, "mid", ["mid"])


# ------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("path", golden_files("classic_*.npz"), ids=lambda p: p.stem)
def test_config_is_that_of_transformers(path):
    golden = Golden(path)
    config = configs.transformers_config(golden.cfg)
    for key, value in config.items():
        if key != "architectures":
            assert golden.meta[key] == value, key
    model, vocab_size = configs.from_transformers(golden.meta)
    back = scaling.gpt_config(model, vocab_size)
    assert configs.transformers_config(back) == config


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-5}, {"final_logit_softcapping": None}, {"rope_parameters": {"rope_theta": 5e5}}]
)
def test_other_architectures_are_refused(change):
    config = configs.transformers_config(scaling.gpt_config(load_config(None, None, ["model.arch=classic"]).model, 512))
    with pytest.raises(UserError, match="this project.s classic architecture has"):
        configs.from_transformers(config | change)


def test_windows_cannot_be_said():
    model = load_config(None, None, ["model.arch=classic", "model.window_pattern=SL"]).model
    with pytest.raises(UserError, match="whole context"):
        configs.transformers_config(scaling.gpt_config(model, 512))


@pytest.mark.parametrize("write", [configs.transformers_config, configs.reference_config])
@pytest.mark.parametrize("own", ["bigram_rows=64", "key_offset=true", "head_values=true"])
def test_what_no_other_code_base_has_cannot_be_said(write, own):
    with pytest.raises(UserError, match=f"model.{own}: no format that is exported has this"):
        write(scaling.gpt_config(load_config(None, None, ["model.arch=classic", f"model.{own}"]).model, 512))


def test_tensors_are_safetensors(tmp_path):
    """What the package of that name reads and writes; the same arrays give the same bytes."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((3, n)).astype(np.float32) for n, name in enumerate("cab")}
    write_tensors(tmp_path / "a", tensors, {"format": "pt", "x": "ü"})
    theirs = safetensors.numpy.load_file(tmp_path / "a")
    assert theirs.keys() == tensors.keys()
    safetensors.numpy.save_file(tensors, tmp_path / "b", {"format": "pt", "x": "ü"})
    back, notes = read_tensors(tmp_path / "b")
    assert notes == {"format": "pt", "x": "ü"} == read_tensors(tmp_path / "a")[1]
    for name, array in tensors.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(back[name], array)
    write_tensors(tmp_path / "c", dict(reversed(tensors.items())), {"format": "pt", "x": "ü"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("cut", [0, 7, 40, -4])
def test_damaged_tensors(tmp_path, cut):
    write_tensors(tmp_path / "a", {"x": np.ones(100, np.float32)}, {})
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:cut])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_tensors(tmp_path / "a")


# ----------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def theirs(tok):
    made = tokenizers.Tokenizer.from_str(tokenizer_json(tok))
    made.encode_special_tokens = True  # transformers' split_special_tokens
    return made


def same_ids(tok, theirs, text) -> bool:
    return theirs.encode(text, add_special_tokens=False).ids == tok.encode(text)


@settings(max_examples=400, deadline=None)
@given(text=TEXT)
def test_same_ids(tok, theirs, text):
    """On every text but one with the guard of the chat template right before a "|", where it would be taken away."""
    if GUARD + "|" not in text:
        assert same_ids(tok, theirs, text)
        assert theirs.decode(tok.encode(text), skip_special_tokens=False) == text


def test_same_ids_where_pieces_overlap(tok, theirs):
    """Runs and other pieces that begin as they end: there the order of a piece's own pairs matters."""
    pieces = [tok.decode([i]) for i in range(266, tok.vocab_size)]
    pieces = [p for p in pieces if any(p.endswith(p[:n]) for n in range(1, len(p)))]
    rng = random.Random(0)
    assert len(pieces) > 10
    for piece in pieces:
        for _ in range(20):
            letters = "".join(rng.choices(sorted(set(piece)), k=rng.randrange(2, 40)))
            assert same_ids(tok, theirs, letters) and same_ids(tok, theirs, piece * rng.randrange(2, 9) + letters)


@pytest.mark.parametrize("filler", ["x", " ", "\n", "é", "\u2581", "word ", "  ab", "\u2581 a", "日本"])
def test_same_ids_across_stretches(tok, theirs, filler):
    for size in (MAX_PIECE_CHARS - 1, MAX_PIECE_CHARS, MAX_PIECE_CHARS + 1, 2 * MAX_PIECE_CHARS + 5):
        text = (filler * size)[:size]
        assert same_ids(tok, theirs, text) and same_ids(tok, theirs, text + " b" * 99)


@pytest.fixture(scope="module")
def rendered(tok):
    """(messages, add_generation_prompt) -> ids by the template and tokenizer.json, as transformers makes them."""

    def fail(message):
        raise UserError(message)

    source = re.sub(r"\{%-? (end)?generation -?%\}", "", TEMPLATE.read_text())  # transformers' own, for the mask
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(source)
    theirs = tokenizers.Tokenizer.from_str(tokenizer_json(tok))

    def make(messages: list[dict], prompt: bool = False, **more) -> list[int]:
        text = template.render(messages=messages, raise_exception=fail, add_generation_prompt=prompt, **more)
        return theirs.encode(text, add_special_tokens=False).ids

    return make


@st.composite
def conversations(draw) -> list[dict]:
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for i in range(draw(st.integers(1, 4))):
        content = draw(TEXT)
        if i % 2 and draw(st.booleans()):
            kinds = draw(st.permutations(["think", "text", "python", "python_output"]))
            content = [{"type": kind, "text": draw(TEXT)} for kind in kinds]
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return messages


@settings(max_examples=100, deadline=None)
@given(messages=conversations())
def test_chat_template(tok, rendered, messages):
    assert rendered(messages) == render(tok, {"messages": messages})[0]
    if messages[-1]["role"] == "user":
        assert rendered(messages, prompt=True) == render_prompt(tok, messages)


@st.composite
def objects(draw, inner):
    names = st.sampled_from(["city", "days", "user-id", "from", "unit", "x"])
    properties = draw(st.dictionaries(names, inner, max_size=4))
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | {"required": [name for name in properties if draw(st.booleans())]}


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            *({"type": t} for t in ("string", "integer", "number", "boolean", "null", "array", "object")),
            {"type": "string", "enum": ["a|b", "é"], "description": "one <of> 'two'"},
            {"type": "integer", "enum": [1, 2], "default": 2, "description": "two\nlines"},
            {"enum": [1, "a", None]},
            {"type": ["string", "null"], "title": "X"},
            {},
            True,
            {"type": "integer", "minimum": 1, "maximum": 9, "default": 3},
            {"type": "boolean", "default": False},
        ]
    ),
    lambda inner: st.one_of(
        inner.map(lambda s: {"type": "array", "items": s}),
        inner.map(lambda s: {"type": "object", "additionalProperties": s}),
        st.tuples(inner, inner).map(lambda pair: {"anyOf": list(pair)}),
        objects(inner),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    schema=objects(SCHEMAS), description=TEXT.filter(lambda text: "\n" not in text), thinking=st.sampled_from([0, 1, 9])
)
def test_chat_template_tells_of_tools_and_thoughts(tok, rendered, schema, description, thinking):
    tools = [{"type": "function", "function": {"name": "get-it", "description": description, "parameters": schema}}]
    tools.append({"name": "now"})
    arguments = {"city": "Oslo|", "on": True, "n": None, "d": {"a": [1.5]}}
    calls = [
        {"id": "a", "type": "function", "function": {"name": "get-it", "arguments": arguments}},
        {"id": "b", "type": "function", "function": {"name": "now", "arguments": {"user-id": 3}}},
    ]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "Wait.", "reasoning_content": "e", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
        {"role": "tool", "tool_call_id": "a", "content": "rain|"},
    ]
    functions, budget = functions_of(tools), True if thinking == 1 else thinking
    asked = {"thinking_budget": thinking} if thinking > 1 else {"enable_thinking": bool(thinking)}
    wanted = render_prompt(tok, prompt_of(messages, functions, budget))
    got = rendered(messages, prompt=True, tools=tools, **asked)
    assert tok.decode(got) == tok.decode(wanted)
    assert got == wanted
    row = {"messages": [*messages, {"role": "assistant", "content": "It is noon."}], "tools": tools}
    assert (
        rendered(row["messages"], tools=tools, enable_thinking=True)
        == render(tok, {"messages": conversation_of(row)[0]})[0]
    )


def test_chat_template_refuses_what_no_signature_says(rendered):
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"allOf": [{}]}}}}]
    with pytest.raises(UserError, match="tools: allOf is not of the subset"):
        rendered([{"role": "user", "content": "x"}], tools=tools)


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["system"], ["user", "system"]])
def test_chat_template_refuses_what_we_refuse(tok, rendered, roles):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(UserError):
        render(tok, {"messages": messages})
    with pytest.raises(UserError):
        rendered(messages)


# --------------------------------------------------------------------------------- what others have trained


@pytest.fixture(scope="module")
def foreign():
    """A tiktoken encoding as it was pickled, and the same vocabulary as a run has it."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks, pattern, special = pickles.read_tiktoken(THEIRS / "tokenizer.pkl")
    encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return encoding, ByteLevelTokenizer(from_tiktoken(ranks, pattern, special))


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(TEXT, st.text(alphabet="aban =\n")))
def test_foreign_vocabulary(foreign, text):
    encoding, tok = foreign
    ids = tok.encode(text)
    assert ids == encoding.encode_ordinary(text) and tok.decode(ids) == text
    stream = StreamDecoder(tok)
    assert "".join([*map(stream.push, ids), stream.flush()]) == text
    assert tok.token_bytes()[ids].sum() == len(text.encode())


def test_foreign_vocabulary_in_a_folder(foreign, tmp_path):
    _, tok = foreign
    tok.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ByteLevelTokenizer) and again.hash == tok.hash and again.text == tok.text
    assert again.bos == tok.vocab_size - len(SPECIAL_TOKENS)
    assert again.encode_batch(["", "a b"]) == [[], tok.encode("a b")]
    with pytest.raises(UserError, match="lone surrogate U\\+D800"):
        again.encode("\ud800")
    described = json.loads(tok.text)
    for change, message in (
        ({"normalizer": {"type": "NFC"}}, "changes text"),
        ({"decoder": {"type": "Fuse"}}, "not byte-level BPE, but decodes by Fuse"),
        ({"added_tokens": []}, "no special token"),
        ({"model": {}}, "not a tokenizer.json"),
    ):
        with pytest.raises(UserError, match=message):
            ByteLevelTokenizer(json.dumps(described | change))


def test_a_package_that_is_missing(foreign, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="uv sync --extra hf"):
        ByteLevelTokenizer(foreign[1].text)


def test_what_the_reference_saves(tmp_path, capsys):
    """Its weights give its logits, out of a run with its vocabulary."""
    assert bring_in(THEIRS, tmp_path / "run") == 2
    assert "add --stage" in capsys.readouterr().err
    assert bring_in(THEIRS, tmp_path / "run", "--stage", "base") == 0
    loaded, golden = load_model(tmp_path / "run"), np.load(THEIRS / "logits.npz")
    assert (loaded.stage, loaded.step, loaded.config.model.arch) == ("base", 7, "modern")
    logits = nnx.jit(lambda model, tokens: model(tokens))(loaded.model, golden["tokens"])
    assert relative_error(logits[:, ::20], golden["logits"]) < 1e-5
    for out in ("a", "b"):  # and out again, to files that come back to the same
        assert export.main(["--run-dir", str(tmp_path / "run"), "--to", str(tmp_path / out)]) == 0
        shutil.rmtree(tmp_path / "run")
        assert bring_in(tmp_path / out, tmp_path / "run") == 0
    names = [path.name for path in (tmp_path / "a").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[1:] == ([], [])


def test_classic_weights_under_the_references_names(run, exported, tmp_path):
    """As the reference of October 2025 stored them, in several files, in bfloat16."""
    weights = read_folder(exported)
    if weights.model.arch == "modern":
        tensors = {k: v for k, v in weights.tensors.items() if not k.startswith("smear")}
        with pytest.raises(UserError, match="between the two"):
            configs.from_reference_config({}, tensors)
        return
    table = [("model.embed_tokens", "transformer.wte"), ("model.layers", "transformer.h"), ("self_attn.", "attn.")]
    table += [("q_proj", "c_q"), ("k_proj", "c_k"), ("v_proj", "c_v"), ("o_proj", "c_proj")]
    table += [("fc1", "c_fc"), ("fc2", "c_proj")]
    named = {}
    for name, array in weights.tensors.items():
        for ours, its in table:
            name = name.replace(ours, its)
        named[name] = array
    cfg = load_model(run).model.cfg
    config = {"model_config": {key: getattr(cfg, key) for key in configs.SIZES}}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    files = {name: f"part{i % 2}.safetensors" for i, name in enumerate(named)}
    for file in set(files.values()):
        write_tensors(tmp_path / "in" / file, {k: v for k, v in named.items() if files[k] == file}, {})
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert bring_in(tmp_path / "in", tmp_path / "run", "--stage", "sft", "--tokenizer", str(run / "tokenizer")) == 0
    for mine, back in zip(jax.tree.leaves(params_of(run, "sft")), jax.tree.leaves(params_of(tmp_path / "run", "sft"))):
        np.testing.assert_array_equal(mine[:VOCAB], back[:VOCAB])


class Evil:
    def __reduce__(self):
        return os.system, ("false",)


def test_a_pickle_runs_nothing(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="which has no place there"):
        pickles.read_tiktoken(tmp_path / "tokenizer.pkl")
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(UserError, match="which has no place there"):
        pickles.read_torch(tmp_path / "model.pt")


def test_folders_that_hold_no_weights(exported, tmp_path, capsys):
    def refused(folder, *more) -> str:
        assert bring_in(folder, tmp_path / "run", "--stage", "sft", *more) == 2
        return capsys.readouterr().err

    copy = tmp_path / "copy"
    assert "no weights that this project knows" in refused(tmp_path / "nowhere")
    shutil.copytree(exported, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refused(copy)
    tensors, notes = read_tensors(exported / "model.safetensors")
    write_tensors(copy / "model.safetensors", {k: v for k, v in tensors.items() if "wte" not in k}, notes)
    if config["model_type"] != "nanochat":
        assert "lack 'transformer.wte.weight'" in refused(copy)
    write_tensors(copy / "model.safetensors", {**tensors, "lm_head.bias": np.zeros(3, np.float32)}, notes)
    assert "of another architecture: they hold lm_head.bias" in refused(copy)
    shutil.copyfile(exported / "model.safetensors", copy / "model.safetensors")
    sizes = config if config["model_type"] == "nanochat" else config["model_config"]
    sizes["vocab_size"] += 100
    (copy / "config.json").write_text(json.dumps(config))
    assert f"has {VOCAB} tokens and the weights {VOCAB + 100}" in refused(copy)
    del sizes["vocab_size"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "does not describe a model (KeyError: 'vocab_size')" in refused(copy)


# ------------------------------------------------------------------------------------ beside transformers


def wanted(loaded, path: Path, conversations, texts, tokens=64) -> None:
    """What `transformers_child.py` compares with, as path.json and path.npz; the first messages are the prompts."""
    tok, model = loaded.tokenizer, loaded.model
    length = model.cfg.sequence_len
    engine, prompts = Engine(model, slots=1, max_len=length), []
    for conversation in conversations:
        ids = render_prompt(tok, conversation[:1])
        greedy = engine.generate([Request(ids, tokens, temperature=0.0)])[0].ids
        prompts.append((conversation[:1], ids, greedy))
    forward = nnx.jit(lambda model, rows: model(rows))
    rows = [[*ids, *greedy, *[0] * (length - len(ids) - len(greedy))] for _, ids, greedy in prompts]
    logits = np.concatenate([np.asarray(forward(model, np.array([row]))) for row in rows])
    rendered = [(messages, *render(tok, {"messages": messages})) for messages in conversations]
    value = {"texts": [(t, tok.encode(t)) for t in texts], "conversations": rendered, "prompts": prompts}
    path.with_suffix(".json").write_text(json.dumps(value))
    np.savez(path.with_suffix(".npz"), logits=logits)


@pytest.mark.skipif(
    "NANOCHAT_TRANSFORMERS_PYTHON" not in os.environ,
    reason="set NANOCHAT_TRANSFORMERS_PYTHON to a Python that has torch and transformers",
)
def test_transformers_loads_it(run, exported, tmp_path):
    loaded = load_model(run)
    if loaded.config.model.arch == "modern":
        pytest.skip("transformers has no model type for the modern architecture")
    parts = [{"type": "text", "text": "Well: "}, {"type": "python", "text": "1+1"}]
    parts += [{"type": "python_output", "text": "2"}, {"type": "text", "text": "2 <|user_end|>"}]
    asked = [f"What is {i} + {i}? <|bos|> |" for i in range(20)]
    talks = [[{"role": "user", "content": text}, {"role": "assistant", "content": parts}] for text in asked]
    wanted(loaded, tmp_path / "wanted", talks, [*asked, "\u2581 日本 \x00"])
    command = [os.environ["NANOCHAT_TRANSFORMERS_PYTHON"], Path(__file__).with_name("transformers_child.py")]
    done = subprocess.run(
        [*command, exported, tmp_path / "wanted"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"] == "NanoChatForCausalLM" and found["not_loaded"] == 0
    assert found["largest_logit_difference"] < 1e-4
    for key in ("conversations", "masks", "prompts", "greedy"):
        assert found[key] == [20, 20], key
    assert found["texts"] == [21, 21]
