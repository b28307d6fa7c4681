"""Prune the embedded model, save it, and load it as anybody would."""

import sys

from _demo_model import TEXTS, demo_pruner
from transformers import AutoModelForCausalLM

output = sys.argv[1] if len(sys.argv) > 1 else "pruned"
pruner = demo_pruner()
report = pruner.prune(TEXTS, progress=False)
print(report)
pruner.save_pretrained(output)
model = AutoModelForCausalLM.from_pretrained(output)
print(f"{model.config.intermediate_size} channels a layer")
