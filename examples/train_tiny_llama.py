"""Train the small Llama that the package carries, from the documentation that every CPython carries.

    python examples/train_tiny_llama.py --output optimum_otprune/commands/demo_model

About 20 minutes on 2 cores.
"""

from _tiny_training import arguments, common_config, train_and_save
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--intermediate-size", type=int, default=512)
    args = parser.parse_args()

    def build(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        return LlamaForCausalLM(
            LlamaConfig(**common_config(tokenizer, args), intermediate_size=args.intermediate_size)
        )

    train_and_save(build, args)


if __name__ == "__main__":
    main()
