"""How fast the reference, karpathy/nanochat, trained in published runs: what a plan assumes where this code itself has
not been measured. File names are the reference's."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Published:
    """A run of the reference, by its author or by others, and the share of the bf16 peak that its steps reached."""

    gpu: str
    arch: str
    fp8: bool
    depth: int
    mfu: float
    devices: int
    source: str


PUBLISHED = (
    Published("h100", "modern", False, 12, 0.41, 8, "dev/LOG.md, baseline of multi-token prediction"),
    Published("h100", "modern", False, 18, 0.46, 8, "dev/LOG.md, baseline of the mixture of experts"),
    Published("h100", "modern", False, 24, 0.50, 8, "leaderboard run 1: 4.33e19 FLOPs in 10,949 s on 8"),
    Published("h100", "modern", False, 26, 0.48, 8, "dev/LOG.md, fp8: 630k tokens/s on 8"),
    Published("h100", "modern", True, 24, 0.59, 8, "leaderboard run 6, the record: 983k tokens/s on 8"),
    Published("h100", "modern", True, 26, 0.57, 8, "leaderboard run 3: 7226 steps of 2^20 in 9922 s on 8"),
    Published("h100", "classic", False, 20, 0.48, 8, "reports of five $100 runs: 47.9 to 48.7 % on 8"),
    Published("a100", "classic", False, 20, 0.65, 8, "two reports: base in 7 h 6 min with its evaluations on 8"),
    Published("rtx4090", "classic", False, 20, 0.80, 1, "issue 157: 13.8 s for 2^19 tokens on 1"),
)
ASSUMED = 0.40  # where nobody has published anything
LIKE = {"a100_80": "a100", "h200": "h100"}  # the same multiprocessors, more memory


def tabled_mfu(gpu: str, arch: str, fp8: bool, depth: int) -> tuple[float, int, str]:
    """(MFU, of how many devices together, where it is from): between the depths published for the GPU, and beyond them
    as at the nearest."""
    of_gpu = [p for p in PUBLISHED if p.gpu == LIKE.get(gpu, gpu)]
    chosen = [p for p in of_gpu if (p.arch, p.fp8) == (arch, fp8)] or [p for p in of_gpu if not p.fp8]
    if not chosen:
        return ASSUMED, 1, "assumed, nothing is published"
    chosen = sorted(chosen, key=lambda p: p.depth)
    nearest = min(chosen, key=lambda p: abs(p.depth - depth))
    mfu = np.interp(depth, [p.depth for p in chosen], [p.mfu for p in chosen])
    return float(mfu), nearest.devices, f"the reference's d{nearest.depth}: {nearest.source}"


# seconds of evaluation of a $100 run on 8 H100s, by the clock of its report of 11 November 2025: bits per byte and CORE
# after base; the chat tasks, the mean of mid and sft
EVAL_BASE, EVAL_CHAT = 261, 438
