#!/bin/bash
# A run under SLURM that goes on by itself after preemption and at the end of its time limit:
#
#   sbatch --nodes=2 --time=24:00:00 pipelines/launch/slurm.sh CONFIG.yaml [key=value ...]
#
# One task for each GPU, which is one process of the run. Five minutes before the time limit SLURM
# sends USR1 to this script, which has all tasks save and stop; on preemption likewise, with
# PreemptParameters=send_user_signal. Where SLURM tells the tasks itself, by SIGTERM, they do the
# same. The job is then put back into the queue, unless the run has reached its end or failed, or
# the job was cancelled; it goes on from its newest checkpoint, also on another number of nodes
# (scontrol update JobId=... NumNodes=4).
#
# No launcher stands between SLURM and the tasks, so that their own codes arrive here: 0 after
# SIGTERM, 130 after Ctrl-C, 2 after a mistake in the configuration. torchrun and accelerate launch
# would give 1 in all of these.
#
# Change these as the cluster is; `python` must be that of an environment with clip-align.
#SBATCH --job-name=align
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u

most_restarts=${ALIGN_MOST_RESTARTS:-100}

if [ $# -eq 0 ]; then
    echo "usage: sbatch slurm.sh CONFIG.yaml [key=value ...]" >&2
    exit 2
fi

# Where the run lies and where its bundle goes, as the run itself understands its arguments.
places=$(python -c '
import sys
from pipelines.cli import main, parse
from pipelines.config import ConfigError
try:
    config = parse("pretrain", sys.argv[1:])
except ConfigError as error:
    sys.exit(f"align pretrain: {error}")
print(config.out, config.bundle or config.out / "bundle", sep="\n")
' "$@") || exit 2
{ read -r out; read -r bundle; } <<<"$places"

# The bundle is written last of all: an earlier one in its place is older than the checkpoints.
finished() { [ "$bundle/config.json" -nt "$out/checkpoints" ]; }

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # workers decode beside it, and share the task's cores
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS

asked=no
stop() {
    [ "$asked" = no ] || return 0 # a second SIGTERM would end the tasks while they save
    asked=yes
    echo "slurm.sh: asked to stop; the tasks save"
    scancel --signal=TERM "$SLURM_JOB_ID" # the tasks alone, not this script
}
trap stop USR1
trap 'asked=yes' TERM # the tasks have got it as well

# shellcheck disable=SC2016  # the variables are those of the task
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python -m pipelines.pretrain "$@" --resume
' task "$@" &
tasks=$!
while :; do # a signal ends `wait`, not the tasks
    wait "$tasks"
    status=$?
    kill -0 "$tasks" 2>/dev/null || break
done

if finished; then
    echo "slurm.sh: the run has reached its end: $bundle"
    exit 0
fi
# 0 and 130: stopped with a checkpoint. 143: ended by SIGTERM before the first step.
case $status in
    0 | 130 | 143) again=yes ;;
    *) again=$asked ;;
esac
if [ "$again" = no ]; then
    echo "slurm.sh: the run failed with status $status" >&2
    exit "$status"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge "$most_restarts" ]; then
    echo "slurm.sh: not finished after $most_restarts restarts (ALIGN_MOST_RESTARTS)" >&2
    exit 1
fi
# Where the job is being cancelled, or put back by SLURM itself, it is no longer running.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" != RUNNING ]; then
    echo "slurm.sh: stopped with a checkpoint; the job is ${state:-gone}, and left to SLURM"
    exit 0
fi
echo "slurm.sh: back into the queue"
scontrol requeue "$SLURM_JOB_ID"
