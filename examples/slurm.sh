#!/usr/bin/env bash
# sbatch examples/slurm.sh [MODEL] [OUTPUT]: one node, the model spread over its GPUs by accelerate.
#SBATCH --job-name=otprune
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --mem=200G
#SBATCH --time=08:00:00
#SBATCH --output=otprune-%j.log
set -euo pipefail
MODEL="${1:-meta-llama/Llama-3.1-8B}"
OUTPUT="${2:-pruned/${MODEL##*/}-0.5}"
# Inside a container: singularity exec --nv otprune.sif otprune …
otprune prune "$MODEL" --output "$OUTPUT" --pruning-ratio 0.5 --dtype bfloat16 --device-map auto --eval
