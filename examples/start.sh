#!/usr/bin/env bash
# Prune a model by half and measure what it cost. Usage: examples/start.sh [MODEL] [OUTPUT]
set -euo pipefail
MODEL="${1:-meta-llama/Llama-3.2-1B}"
OUTPUT="${2:-pruned/${MODEL##*/}-0.5}"
otprune prune "$MODEL" --output "$OUTPUT" --pruning-ratio 0.5 --eval
