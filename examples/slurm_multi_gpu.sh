#!/usr/bin/env bash
# sbatch examples/slurm_multi_gpu.sh split|copies [MODEL] [OUTPUT]: one node with several GPUs, in one of two ways.
#   split   one process; the model is spread over the GPUs, what does not fit goes to main memory and to disk
#   copies  one process a GPU, each with the whole model; the calibration samples are divided among them
#SBATCH --job-name=otprune
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=400G
#SBATCH --time=12:00:00
#SBATCH --output=otprune-%j.log
set -euo pipefail
WAY="${1:-split}"
MODEL="${2:-meta-llama/Llama-3.1-70B}"
OUTPUT="${3:-pruned/${MODEL##*/}-0.5}"
OPTIONS=(--pruning-ratio 0.5 --dtype bfloat16)
# What it will take, before anything is loaded:
[[ "$WAY" != split ]] || otprune prune "$MODEL" --output "$OUTPUT" "${OPTIONS[@]}" --device-map auto --dry-run
case "$WAY" in
  split)
    OFFLOAD="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/otprune-offload-${SLURM_JOB_ID:-$$}"
    trap 'rm -rf "$OFFLOAD"' EXIT
    # --resume: a job that was stopped at its time limit goes on when it is submitted again.
    otprune prune "$MODEL" --output "$OUTPUT" "${OPTIONS[@]}" --device-map auto --offload-folder "$OFFLOAD" --resume
    ;;
  copies)
    GPUS="${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus | wc -l)}"
    accelerate launch --num_processes "$GPUS" --module optimum_otprune prune "$MODEL" --output "$OUTPUT" "${OPTIONS[@]}"
    ;;
  *)
    echo "usage: sbatch examples/slurm_multi_gpu.sh split|copies [MODEL] [OUTPUT]" >&2
    exit 2
    ;;
esac
