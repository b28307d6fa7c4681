"""What the tests run in one process and in several: a recovery, saved."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from optimum_otprune import OTPruner
from optimum_otprune.models.distributed import num_processes


@patch.object(torch.cpu, "get_capabilities", dict, create=True)  # bfloat16 rounds each part for itself
def main(folder: Path, output: Path, expected_processes: int) -> None:
    assert num_processes() == expected_processes
    tokens = torch.load(folder / "tokens.pt")
    for name, options in json.loads((folder / "options.json").read_text()).items():
        pruner = OTPruner.from_pretrained(folder / "pruned")
        pruner.recover(tokens, base_model=folder / "base", progress=False, **options)
        pruner.save_pretrained(output / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
