#!/usr/bin/env bash
# Prune a model by half and measure what it cost. Usage: examples/start.sh [MODEL] [OUTPUT] [OPTIONS OF otprune prune …]
# The same line again goes on where a run was stopped.
set -euo pipefail
MODEL="${1:-meta-llama/Llama-3.2-1B}"
OUTPUT="${2:-pruned/${MODEL##*/}-0.5}"
otprune prune "$MODEL" --output "$OUTPUT" --pruning-ratio 0.5 --eval --resume "${@:3}"
