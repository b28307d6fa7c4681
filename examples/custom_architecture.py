"""An architecture that the package does not know: one line of data says where its FFN is."""

import torch
from transformers import GPTJConfig, GPTJForCausalLM

from optimum_otprune import FFNSpec, OTPruner, OTPruningConfig, register_architecture

register_architecture(
    "mine", FFNSpec(layers="h", up="mlp.fc_in", down="mlp.fc_out", activation="mlp.act", size_key="n_inner")
)

config = GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, rotary_dim=4, n_positions=32)
pruner = OTPruner.from_pretrained(GPTJForCausalLM(config), OTPruningConfig(pruning_ratio=0.5, multiple_of=1))
report = pruner.prune(torch.randint(64, (16, 32)), progress=False)
print(f"GPT-J: {report.layers[0].intermediate_size_before} -> {report.layers[0].intermediate_size_after} channels")
