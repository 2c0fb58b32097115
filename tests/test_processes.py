"""Huge pages: asked for once, where the machine has them, beside what the environment says already."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_jax import processes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def mode(tmp_path, monkeypatch):
    def set_to(text):
        (tmp_path / "enabled").write_text(text)
        monkeypatch.setattr(processes, "_MODE", tmp_path / "enabled")

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return set_to


def test_asked_for_where_the_machine_gives_them(mode, monkeypatch):
    mode("always [madvise] never\n")
    assert processes.huge_pages_environment() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    assert processes.huge_pages_environment() == {"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.hugetlb=1"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # somebody has decided
    assert processes.huge_pages_environment() == {}


def test_not_asked_for_where_they_come_anyway_or_never(mode, tmp_path, monkeypatch):
    for text in ("[always] madvise never\n", "always madvise [never]\n"):
        mode(text)
        assert processes.huge_pages_environment() == {}
    monkeypatch.setattr(processes, "_MODE", tmp_path / "none")  # not Linux
    assert processes.huge_pages_environment() == {}


def test_restart_keeps_the_command_and_the_process(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, pathlib, sys\nfrom nanochat_jax import processes\n"
        f"processes._MODE = pathlib.Path({str(tmp_path / 'enabled')!r})\n"
        "processes.restart_with_huge_pages()\n"
        "print(json.dumps([os.environ['GLIBC_TUNABLES'], sys.argv[1:], os.getpid()]))\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, script, "a b", "--c"], env=env, stdout=subprocess.PIPE, text=True)
    assert json.loads(process.communicate()[0]) == ["glibc.malloc.hugetlb=1", ["a b", "--c"], process.pid]


def test_who_may_not_start_it_again_goes_on(mode, monkeypatch):
    mode("always [madvise] never\n")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    processes.restart_with_huge_pages()
