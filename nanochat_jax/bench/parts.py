"""Where the time of a step goes: a profile's events, by the part of the step that each kernel belongs to.

The profiler names the instruction behind each event, and the program that instruction's scope (`program.part_of`). What
it does not name, such as a launch in a command buffer, is told by the kernel's name, or counted as other.
"""

import re
from collections import Counter
from pathlib import Path

import jax

from nanochat_jax.planning.program import Program, part_of

_CONTAINERS = {"while", "call", "conditional"}  # their events hold those of what they call
_BY_NAME = (
    ("fmha|sdpa|cudnn", "attention"),
    ("softcap", "loss"),
    ("add_rows", "embedding"),
    ("_mix_|_add_|_rotate_|round_both|memcpy|memset", "elementwise"),
    ("gemm|nvjet|cutlass|cublas", "products"),
    ("nccl", "communication"),
)


def parts_of_program(text: str) -> dict[str, str]:
    """Instruction -> part, over all computations of an optimised program."""
    program = Program(text)
    found = (i for body in program.computations.values() for i in body if i.op not in _CONTAINERS)
    return {i.name: part_of(i, program.inner(i)) for i in found}


def events(trace: Path):
    """(instruction or "", kernel's name, seconds) of everything that ran on the devices."""
    (path,) = trace.rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    on_device = [p for p in planes if p.name.startswith("/device:")]
    for plane in on_device or [p for p in planes if p.name == "/host:CPU"]:
        for line in plane.lines:
            if on_device and not line.name.startswith("Stream"):
                continue  # the same time, told once more
            for event in line.events:
                op = next((str(value) for name, value in event.stats if name == "hlo_op"), "")
                if op or on_device:
                    yield op, event.name, event.duration_ns / 1e9


def by_part(trace: Path, program: str) -> dict[str, float]:
    """Part -> its seconds in a trace, summed over streams or threads, the largest first."""
    parts, seconds = parts_of_program(program), Counter[str]()
    named = {re.sub(r"[.\-]", "_", name): part for name, part in parts.items()}
    containers = re.compile(rf"({'|'.join(_CONTAINERS)})(\.\d+)?$")
    for op, kernel, duration in events(trace):
        if containers.match(op):
            continue
        part = parts.get(op) or named.get(re.sub(r"[.\-]", "_", kernel))
        if part is None:
            part = next((p for pattern, p in _BY_NAME if re.search(pattern, kernel.lower())), "other")
        seconds[part] += duration
    return dict(seconds.most_common())
