"""The reference system's command line, unchanged, on top of this package.

    python examples/main.py --model meta-llama/Llama-3.2-1B --prune_method structured_afr_with_intrafusion \
        --pruning_ratio 0.5 --nsamples 128 --strategy_idx 0 --eval --save_model out
    python examples/main.py --model out --prune_method done --eval

`--prune_method` also takes the other methods of this package; `--calibration_data` and `--eval_data` are additions for
machines without a network.
"""

import argparse
import logging
import sys

from optimum_otprune import OTPruneError, OTPruner, OTPruningConfig
from optimum_otprune.config.presets import METHODS

STRATEGIES = ("comprehensive", "conservative", "balanced")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub name or path")
    parser.add_argument("--prune_method", default="structured_afr_with_intrafusion", choices=[*METHODS, "done"])
    parser.add_argument("--pruning_ratio", type=float, default=0.5)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--save_model", help="folder for the pruned model")
    parser.add_argument("--eval", action="store_true", help="perplexity after pruning")
    parser.add_argument("--strategy_idx", type=int, choices=range(len(STRATEGIES)), default=0)
    parser.add_argument("--cache_dir", default="llm_weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration_data")
    parser.add_argument("--eval_data")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.prune_method == "done":
        pruner = OTPruner.from_pretrained(args.model, cache_dir=args.cache_dir)
        print(f"Perplexity: {pruner.evaluate(args.eval_data)['perplexity']:.2f}")
        return
    options = {"method": args.prune_method, "num_samples": args.nsamples, "seed": args.seed}
    if args.prune_method == "structured_afr_with_intrafusion":
        options["strategy"] = STRATEGIES[args.strategy_idx]
    config = OTPruningConfig(pruning_ratio=args.pruning_ratio, **options)
    pruner = OTPruner.from_pretrained(args.model, config, cache_dir=args.cache_dir)
    print(pruner.prune(args.calibration_data))
    if args.eval:
        print(f"Perplexity: {pruner.evaluate(args.eval_data)['perplexity']:.2f}")
    if args.save_model:
        print(f"Saved to {pruner.save_pretrained(args.save_model)}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("optimum_otprune").setLevel(logging.INFO)
    try:
        main()
    except OTPruneError as error:
        sys.exit(f"error: {error}")
