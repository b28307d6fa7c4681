"""Prune a model that one device cannot hold: layers over several GPUs, the rest in main memory and on disk.

    python examples/multi_gpu.py meta-llama/Llama-3.1-70B llama-70b-half --max-memory 0=70GB 1=70GB cpu=200GB
    python examples/multi_gpu.py                          # the embedded model, most of it offloaded to disk

The plan is printed first; with --plan-only that is all, and nothing is loaded.
"""

import argparse
import tempfile
from collections.abc import Sequence

from _demo_model import TEXTS, demo_config, demo_folder

from optimum_otprune import OTPruner, OTPruningConfig


def device_and_size(text: str) -> tuple[int | str, str]:
    device, _, size = text.partition("=")
    return (int(device) if device.isdecimal() else device), size


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: the embedded model")
    parser.add_argument("output", nargs="?", default="pruned")
    parser.add_argument("--max-memory", nargs="+", type=device_and_size, metavar="DEVICE=SIZE")
    parser.add_argument("--calibration-data")
    parser.add_argument("--plan-only", action="store_true")
    args = parser.parse_args(argv)
    if args.model is None:
        model, config, data, memory = demo_folder(), demo_config(), TEXTS, {"cpu": "2MB"}
    else:
        model, config, data, memory = args.model, OTPruningConfig(pruning_ratio=0.5), args.calibration_data, None
    placement = {"device_map": "auto", "max_memory": dict(args.max_memory) if args.max_memory else memory}
    print(OTPruner.plan(model, config, data, **placement))
    if args.plan_only:
        return
    with tempfile.TemporaryDirectory(prefix="otprune-offload-") as folder:
        pruner = OTPruner.from_pretrained(model, config, offload_folder=folder, **placement)
        print(pruner.prune(data))
        print(f"Saved to {pruner.save_pretrained(args.output)}.")


if __name__ == "__main__":
    main()
