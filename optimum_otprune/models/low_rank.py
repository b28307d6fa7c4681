"""Low-rank updates of FFN weights, added to them at the end. The only door to `peft`, an extra.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, https://arxiv.org/abs/2106.09685.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_otprune.errors import MissingExtraError
from optimum_otprune.models.architectures import find_spec
from optimum_otprune.models.find_ffns import ffn_blocks

_RANK = 16
_SCALE = 2  # times the rank is LoRA's alpha


@contextmanager
def low_rank_updates(model: PreTrainedModel, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """Put updates of rank 16 beside the weight matrices of all FFNs; afterwards they are added to them and gone.

    Args:
        model: The model; its FFN weights change when the block of code ends without an error.
        seed: Seed of the values that the updates begin with; added up they are 0.

    Returns:
        The updates' parameters by name, float32, the only ones with gradients.

    Raises:
        MissingExtraError: If peft is not installed.
    """
    peft = peft_module()
    names = {id(module): name for name, module in model.named_modules()}
    targets = [names[id(module)] for block in ffn_blocks(model) for module in block.modules]
    settings = peft.LoraConfig(
        r=_RANK, lora_alpha=_SCALE * _RANK, target_modules=targets, fan_in_fan_out=find_spec(model)[1].transposed
    )
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        tuner = peft.LoraModel(model, settings, "default")
    updates = {name: part for name, part in model.named_parameters() if "lora_" in name}
    for part in updates.values():
        part.data = part.data.float()
    try:
        yield updates
        tuner.merge_and_unload(safe_merge=True)
    finally:
        vars(model).pop("peft_config", None)


def update_parameters(model: PreTrainedModel) -> int:
    """Return how many parameters the updates of a model's FFNs have; its weights are not read."""
    modules = [module for block in ffn_blocks(model) for module in block.modules]
    return sum(_RANK * sum(module.get_parameter("weight").shape) for module in modules)


def peft_module() -> ModuleType:
    """Return the library.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            "`trained='lora'` needs peft. Install it: pip install 'optimum_otprune[recover]'."
        ) from error
    return peft
