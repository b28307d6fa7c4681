"""Train a small mixture of experts (Qwen2-MoE) from the documentation that every CPython carries.

    python examples/train_tiny_moe.py --output tiny-moe

Every layer has 8 experts, of which a token goes to 2, and a shared expert. The recipe is that of the small Llama, with
the load-balancing loss of the model beside it. About 6 minutes on one core; the weights are not part of the package.
"""

import argparse
from collections.abc import Sequence

from _tiny_training import arguments, common_config, train_and_save
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM


def build(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen2MoeForCausalLM:
    """The model before training."""
    config = Qwen2MoeConfig(
        **common_config(tokenizer, args),
        num_experts=args.experts,
        num_experts_per_tok=args.experts_per_token,
        moe_intermediate_size=args.expert_size,
        shared_expert_intermediate_size=args.shared_expert_size,
        norm_topk_prob=True,
        router_aux_loss_coef=args.balance,
    )
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("eager")  # a loop over experts, the fastest on a CPU
    return model


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, epochs=4, batch_size=8, evaluate_every=200)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--expert-size", type=int, default=128, help="channels of a routed expert")
    parser.add_argument("--shared-expert-size", type=int, default=128, help="channels of the shared expert")
    parser.add_argument("--balance", type=float, default=0.01, help="coefficient of the load-balancing loss")
    args = parser.parse_args(argv)
    train_and_save(lambda tokenizer: build(tokenizer, args), args, output_router_logits=True)


if __name__ == "__main__":
    main()
