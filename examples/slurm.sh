#!/usr/bin/env bash
# sbatch examples/slurm.sh [MODEL] [OUTPUT] [OPTIONS OF otprune prune …]: one node, the model spread over its GPUs by accelerate.
#SBATCH --job-name=otprune
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --mem=200G
#SBATCH --time=08:00:00
#SBATCH --output=otprune-%j.log
# At its time limit the job queues itself again, and goes on: it is told two minutes before, and adds to the same log.
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
set -euo pipefail
MODEL="${1:-meta-llama/Llama-3.1-8B}"
OUTPUT="${2:-pruned/${MODEL##*/}-0.5}"
# Models and data are downloaded to HF_HOME, which all nodes should see; nodes without a network take HF_HUB_OFFLINE=1.
# Inside a container: RUN="singularity exec --nv --bind /data otprune.sif otprune" sbatch examples/slurm.sh (see otprune.def).
RUN="${RUN:-otprune}"

# shellcheck disable=SC2086  # RUN is several words
$RUN prune "$MODEL" --output "$OUTPUT" --pruning-ratio 0.5 --dtype bfloat16 --device-map auto --eval --resume "${@:3}" &
RUNNING=$! STOPPED= CODE=0
trap 'STOPPED=yes; kill -TERM "$RUNNING"' TERM
wait "$RUNNING" || wait "$RUNNING" || CODE=$? # a signal ends the first wait, not the run
# It was told to end before it was done; what was finished is kept in the state beside the output.
if [[ -n "$STOPPED" && "$CODE" != 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
