#!/usr/bin/env bash
# sbatch examples/slurm_multi_gpu.sh split|copies [MODEL] [OUTPUT] [OPTIONS OF otprune prune …]: several GPUs, in one of two ways.
#   split   one process; the model is spread over the GPUs of a node, what does not fit goes to main memory and to disk
#   copies  one task a GPU, on one node or several (sbatch --nodes=2 …), each with the whole model; the calibration samples
#           are divided among them
#SBATCH --job-name=otprune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=400G
#SBATCH --time=12:00:00
#SBATCH --output=otprune-%j.log
# At its time limit the job queues itself again, and goes on: it is told two minutes before, and adds to the same log.
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
set -euo pipefail
WAY="${1:-split}"
MODEL="${2:-meta-llama/Llama-3.1-70B}"
OUTPUT="${3:-pruned/${MODEL##*/}-0.5}"
end() { kill -TERM "$RUNNING"; }
OPTIONS=(--pruning-ratio 0.5 --dtype bfloat16 --resume)
case "$WAY" in
  split)
    # What it will take, before anything is loaded:
    otprune prune "$MODEL" --output "$OUTPUT" "${OPTIONS[@]}" --device-map auto "${@:4}" --dry-run
    OFFLOAD="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/otprune-offload-${SLURM_JOB_ID:-$$}"
    trap 'rm -rf "$OFFLOAD"' EXIT
    otprune prune "$MODEL" --output "$OUTPUT" "${OPTIONS[@]}" --device-map auto --offload-folder "$OFFLOAD" "${@:4}" &
    ;;
  copies)
    end() { scancel --signal=TERM "$SLURM_JOB_ID"; } # the tasks; srun itself would kill them at once
    # The tasks find each other by what torch and accelerate read, as torchrun sets it.
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    export MASTER_ADDR MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
    # shellcheck disable=SC2016  # each task fills in its own numbers
    srun --ntasks="$((SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES))" --ntasks-per-node="$SLURM_GPUS_ON_NODE" \
      --cpus-per-task="$((SLURM_CPUS_ON_NODE / SLURM_GPUS_ON_NODE))" --kill-on-bad-exit=1 bash -c \
      'RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS" exec otprune prune "$@"' \
      task "$MODEL" --output "$OUTPUT" "${OPTIONS[@]}" "${@:4}" &
    ;;
  *)
    echo "usage: sbatch examples/slurm_multi_gpu.sh split|copies [MODEL] [OUTPUT] [OPTIONS]" >&2
    exit 2
    ;;
esac
RUNNING=$! STOPPED= CODE=0
trap 'STOPPED=yes; end' TERM
wait "$RUNNING" || wait "$RUNNING" || CODE=$? # a signal ends the first wait, not the run
# It was told to end before it was done; what was finished is kept in the state beside the output.
if [[ -n "$STOPPED" && "$CODE" != 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
