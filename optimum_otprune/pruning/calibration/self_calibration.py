"""Calibration samples that the dense model writes itself.

Reconstruction fits a layer to the dense layer's outputs, so it needs tokens but no labels, and it overfits where there
are few. Text that the dense model writes is distributed as the model believes text to be, costs no data, and cannot
leak what the model is evaluated on.

Source: Williams, Chrysostomou and Aletras, "Self-calibration for Language Model Quantization and Pruning", NAACL 2025.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models.block_runner import input_device
from optimum_otprune.models.pass_settings import PassSettings

_PROMPT_TOKENS = 16


def self_calibration_tokens(
    model: PreTrainedModel, tokens: Tensor, times: int, settings: PassSettings, seed: int
) -> Tensor:
    """Let the model continue pieces of the calibration samples, sampling from its own distribution.

    A prompt is 16 tokens from a random place of a sample (a quarter of it, if samples are shorter than 64). The
    random state of the process stays as it is.

    Args:
        model: The dense model.
        tokens: The calibration samples, LongTensor `(num_samples, seqlen)`.
        times: Number of new samples for each given one.
        settings: How the model is run; another batch size draws other numbers.
        seed: Seed of the prompts' places and of sampling.

    Returns:
        LongTensor `(times · num_samples, seqlen)`, on the CPU.

    Raises:
        ConfigurationError: If the model cannot generate text.
    """
    check_can_write(model, times)
    seqlen = tokens.shape[1]
    length = min(_PROMPT_TOKENS, max(1, seqlen // 4))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(seqlen - length + 1, (times * len(tokens),), generator=generator)
    samples = tokens.repeat(times, 1)
    prompts = samples.gather(1, starts[:, None] + torch.arange(length))  # (times · num_samples, length)
    device = input_device(model)
    written = []
    with _plain_sampling(model, seqlen - length), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        batches = prompts.split(settings.batch_size)
        for batch in tqdm(batches, desc="Self-calibration", unit="batch", disable=not settings.progress):
            prompt = batch.to(device)
            written.append(model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt)).cpu())  # type: ignore
    return torch.cat(written)


def check_can_write(model: PreTrainedModel, times: int) -> None:
    """Raise an error if a model cannot generate text.

    Raises:
        ConfigurationError: If it cannot; the message says what to set.
    """
    if not model.can_generate():
        raise ConfigurationError(
            f"`self_calibration={times}` lets the model write text, which a {type(model).__name__} cannot. Set "
            "self_calibration=0."
        )


@contextmanager
def _plain_sampling(model: PreTrainedModel, new_tokens: int) -> Iterator[None]:
    """Sample full-length texts from the model's own distribution, whatever its generation settings are.

    The model's own settings are replaced, since they would complete those that are passed to `generate`.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens, pad_token_id=0
    )
    try:
        yield
    finally:
        model.generation_config = own
