"""`python -m nanochat_jax.scaling sweep FILE`: the command of planning/sweep.py."""

import sys

from nanochat_jax.planning.sweep import main

if __name__ == "__main__":
    sys.exit(main())
