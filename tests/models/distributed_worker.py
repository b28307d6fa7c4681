"""What the tests run in several processes: each recipe on this process's part of the samples, then saved."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.models.agreement import DenseOutputs
from optimum_otprune.models.distributed import num_processes


@patch.object(torch.cpu, "get_capabilities", dict, create=True)  # bfloat16 rounds each part for itself
def main(folder: Path, output: Path, expected_processes: int) -> None:
    assert num_processes() == expected_processes
    tokens = torch.load(folder / "tokens.pt")
    for name, options in json.loads((folder / "recipes.json").read_text()).items():
        dense = folder / options.pop("model", "dense")
        pruner = OTPruner.from_pretrained(dense, OTPruningConfig(**options))
        kept = DenseOutputs()
        pruner.evaluate(tokens, batch_size=5, progress=False, dense=kept)
        pruner.prune(tokens, batch_size=3, progress=False)
        pruner.evaluate(tokens, batch_size=5, progress=False, dense=kept)
        pruner.evaluate(tokens, batch_size=5, progress=False, dense=dense)
        pruner.save_pretrained(output / name)
        assert (output / name / "config.json").is_file()  # in every process, whichever wrote it


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
