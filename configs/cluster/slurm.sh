#!/bin/bash
# Several nodes of eight GPUs under SLURM, one process a node:
#
#     sbatch configs/cluster/slurm.sh                                  # d24 in runs/d24
#     sbatch --nodes=4 configs/cluster/slurm.sh --stages base base.save_every=200
#     RUN_DIR=/scratch/me/d24 sbatch configs/cluster/slurm.sh
#
# from the checkout, which all nodes must see, as they must see the run directory. What follows the script's name goes
# to run_speedrun.py. Two minutes before the time is up SLURM sends SIGUSR1: the run saves and exits with 75, and the
# job queues up again, under its own number, and resumes. So it does after a process or a node is lost.
# An account or a partition: `sbatch --account=... --partition=...`.

#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

MAX_CRASHES=10 # restarts of a job that has ended by a signal, such as for want of memory

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
uv sync --extra gpu || exit 1 # once: not on every node at the same time

# One process that fails must not have SLURM kill the rest: they end by themselves, and say which one it was.
# --cpu-bind: a task is else bound to one core.
srun --kill-on-bad-exit=0 --wait=120 --cpu-bind=none --label \
    uv run --no-sync --extra gpu run_speedrun.py \
    --config configs/d24.yaml --mesh configs/mesh/multi_host.yaml --run-dir "${RUN_DIR:-runs/d24}" "$@"
code=$? # the highest of all processes': 75 saved, or lost another; above 128 killed by a signal; 1, 2 an error

if [ "$code" -eq 75 ] || { [ "$code" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_CRASHES" ]; }; then
    echo "exit status $code: job $SLURM_JOB_ID queues up again and resumes from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
