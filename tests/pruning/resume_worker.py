"""What a test runs in two processes: a run in one go, one that stops before its second layer, and one that goes on."""

import json
import sys
from pathlib import Path

import torch

from optimum_otprune.models.distributed import gathered, is_main_process, num_processes, wait_for_all
from optimum_otprune.pruning import pipeline
from tests.pruning.test_resume import assert_same, interrupt, make_pruner, prune


def counted(original, layers):
    """Replaces what prunes one layer."""

    def prune_layer(block, *arguments):
        layers.append(block.layer)
        return original(block, *arguments)

    return prune_layer


def main(folder: Path) -> None:
    assert num_processes() == 2
    tokens, original = torch.load(folder / "tokens.pt"), pipeline.prune_layer
    for name, options in json.loads((folder / "recipes.json").read_text()).items():
        straight, state = prune(make_pruner(**options), tokens, None), folder / name
        interrupt(make_pruner(**options), tokens, state, layer=1)
        wait_for_all()
        assert len(list(state.glob("layer-*.safetensors"))) == 1
        layers: list[int] = []
        pipeline.prune_layer = counted(original, layers)
        resumed = prune(make_pruner(**options), tokens, state)
        pipeline.prune_layer = original
        assert layers == [1, 2]  # the first one was found
        assert_same(straight, resumed)
        weights = [tensor.tolist() for tensor in resumed.model.state_dict().values()]
        assert all(other == weights for other in gathered(weights))
        resumed.save_pretrained(folder / f"{name}-saved")
        assert not is_main_process() or not state.exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
