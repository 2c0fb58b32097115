"""python -m nanochat_jax.checkpoint: what it prints of whole, damaged, half-written and foreign folders."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from conftest import ROOT
from nanochat_jax.checkpoint import Checkpointer, store
from nanochat_jax.checkpoint.__main__ import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stages base (steps 10 and 20) and rl (5) of a run without a configuration."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    for stage, steps, last in (("rl", (5,), {"pass@1": 0.25, "reward": 0.5}), ("base", (10, 20), {"loss": 2.125})):
        checkpointer = Checkpointer(run / stage / "checkpoints")
        for step in steps:
            blocks = [{"w": jax.random.normal(jax.random.key(i), (8, 16), jnp.bfloat16)} for i in range(3)]
            state = {"params": {"blocks": blocks, "wte": jnp.ones((32, 8))}, "opt_state": {"m": jnp.ones((32, 8))}}
            state["step"] = jnp.int32(step)
            checkpointer.save(step, state, {"stage": stage, "seed": 7, "tokenizer": "ab12", "step": step, "last": last})
        checkpointer.close()
    (run / "tokenizer").mkdir()
    return run


@pytest.fixture
def hurt(run, tmp_path):
    """A copy whose newest base checkpoint has one wrong bit in an array, beside remains of others."""
    copy = tmp_path / "hurt"
    shutil.copytree(run, copy)
    place = copy / "base" / "checkpoints"
    largest = max((p for p in (place / "20").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = largest.read_bytes()
    wanted = jnp.ones((32, 8)).tobytes()
    at = raw.index(wanted) + len(wanted) // 2
    largest.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    (place / "30.orbax-checkpoint-tmp").mkdir()
    shutil.copytree(place / "10", place / "15.damaged")
    return copy


def json_of(capsys, *argv) -> tuple[int, dict]:
    status = main([*map(str, argv), "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return status, json.loads(out)


def test_ls(run, capsys):
    assert main(["ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "whole" in line]
    assert len(rows) == 3 and all(len(line) <= 80 for line in lines)
    assert "base" in rows[0] and "10" in rows[0] and "2.1250" in rows[1] and "rl" in rows[2] and "0.5000" in rows[2]
    status, found = json_of(capsys, "ls", run)
    assert status == 0 and [(c["stage"], c["step"]) for c in found["checkpoints"]] == [
        ("base", 10),
        ("base", 20),
        ("rl", 5),
    ]
    assert found["checkpoints"][2]["meta"]["last"] == {"pass@1": 0.25, "reward": 0.5}
    assert all(c["state"] == "whole" and c["bytes"] > 1000 for c in found["checkpoints"])


@pytest.mark.parametrize("below", ["base", "base/checkpoints", "base/checkpoints/20"])
def test_a_stage_and_a_single_checkpoint_will_do(run, below, capsys):
    _, found = json_of(capsys, "ls", run / below)
    assert {c["stage"] for c in found["checkpoints"]} == {"base"} and found["checkpoints"][-1]["step"] == 20


def test_show(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # the path on one line
    assert main(["show", str(run / "base")]) == 0
    out = capsys.readouterr().out
    assert "checkpoints/20" in out.replace("\n", "") and "tokenizer" in out and "ab12" in out and "loss 2.125" in out
    assert "params/blocks/*/w" in out and "8 x 16" in out and "bfloat16" in out
    _, found = json_of(capsys, "show", run / "base")
    assert found["parameters"] == 3 * 8 * 16 + 32 * 8 and found["meta"]["seed"] == 7 and found["step"] == 20
    blocks = next(a for a in found["arrays"] if a["name"] == "params/blocks/*/w")
    assert blocks == {**blocks, "count": 3, "shape": [8, 16], "dtype": "bfloat16", "bytes": 3 * 8 * 16 * 2}


def test_verify_reads_every_array(run, hurt, capsys):
    status, found = json_of(capsys, "verify", run)
    assert status == 0 and found["damaged"] == 0 and [c["arrays"] for c in found["checkpoints"]] == [6, 6, 6]
    status, found = json_of(capsys, "ls", hurt / "base")
    states = {c["step"]: c["state"] for c in found["checkpoints"]}
    assert states == {10: "whole", 15: "set aside", 20: "damaged", 30: "half-written"}  # small files have a CRC, too
    status, found = json_of(capsys, "verify", hurt)
    assert status == 1 and found["damaged"] == 1
    assert main(["verify", str(hurt)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["base", "10", "whole"],
        ["base", "15", "set"],
        ["base", "20", "damaged"],
    ]


@pytest.mark.parametrize("at_once", [1, 600, 1 << 28])
def test_a_wrong_bit_is_found_by_the_checksums_alone(hurt, at_once, monkeypatch):
    """As in files too large for a CRC of their own, however few arrays are read at once."""
    monkeypatch.setattr(store, "check_files", lambda path: None)
    place = hurt / "base" / "checkpoints"
    assert store.verify(place / "10", at_once)[0] == 6
    with pytest.raises(store.Damaged, match="is not what was saved"):
        store.verify(place / "20", at_once)


def test_show_of_a_damaged_one_says_why(hurt, capsys):
    assert main(["show", str(hurt / "base" / "checkpoints" / "20")]) == 2
    assert "is damaged: its file ocdbt.process_0/d/" in capsys.readouterr().err


def test_nothing_there(run, tmp_path, capsys):
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    for argv in (["ls", run / "tokenizer"], ["show", run / "nowhere"], ["verify", tmp_path]):
        assert main(list(map(str, argv))) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_an_empty_folder_with_a_number_is_damaged(tmp_path, capsys):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    status, found = json_of(capsys, "verify", tmp_path)
    assert status == 1 and found["checkpoints"][0]["reason"] == "its record arrays is missing"


def test_as_a_command(run):
    out = subprocess.run(
        [sys.executable, "-m", "nanochat_jax.checkpoint", "verify", str(run / "rl"), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and json.loads(out.stdout)["checkpoints"][0]["state"] == "whole", out.stderr
    assert out.stderr == ""
