"""Calibration samples that the dense model writes itself, each from one random token.

What is calibrated on one kind of text is lost on others. The dense model can write text of all the kinds that it
knows: a random token of the vocabulary sets off prose, code, a table or a conversation, and the model goes on as it
believes such text to be distributed. It needs no labels, no data set and no network, and it cannot leak what the model
is evaluated on.

Sources: Williams, Chrysostomou and Aletras, "Self-calibration for Language Model Quantization and Pruning", NAACL
2025, https://arxiv.org/abs/2410.17170; random first tokens: Liu et al., "LLM-QAT: Data-Free Quantization Aware
Training for Large Language Models", 2023, https://arxiv.org/abs/2305.17888.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options import WRITTEN
from optimum_otprune.errors import ConfigurationError, UnsupportedModelError, raised, warn_user
from optimum_otprune.functional.seeds import seed_of
from optimum_otprune.models.devices import offloaded_bytes
from optimum_otprune.models.faithfulness import SAMPLE_TOKENS, check_parameters, looks_ahead
from optimum_otprune.models.flops import cache_bytes
from optimum_otprune.models.inputs import input_device, vocabulary_size
from optimum_otprune.models.passes import Passes

_MOST_ROWS = 128  # more at once are hardly faster
_COPIES = 3  # of a batch's logits: in the model's dtype, as probabilities, and summed up
_LOADING_RATE = 2e9  # bytes a second that offloaded weights are loaded at: from a fast disk, or to a GPU
_LONGEST_LOADING = 3600  # seconds of mere loading that are still worth it


def num_written(config: OTPruningConfig, num_given: int) -> int:
    """Return how many samples the model is to write.

    Args:
        config: The configuration; `self_calibration` says how many samples are written for each given one.
        num_given: Number of the given samples. If there are none, the model writes as many as there would be in all.
    """
    share = config.self_calibration or 0
    if not num_given:
        return round((1 + share) * config.num_samples)
    return max(1, round(share * num_given)) if share else 0


def check_can_write(
    model: PreTrainedModel, config: OTPruningConfig, given: tuple[int, ...], offloaded: int = 0
) -> int:
    """Return how many samples the model is to write; none where it cannot and nobody has asked for them.

    Args:
        model: The dense model; its weights are not read.
        config: The configuration to prune by.
        given: The shape of the given calibration samples, `(num_samples, seqlen)`.
        offloaded: Bytes of its weights that are loaded each time they are used.

    Raises:
        ConfigurationError: If it cannot write, and the configuration asks for it or there is nothing else to calibrate
            on; the message says what to do.
    """
    num_given, seqlen = given
    asked = num_written(config, num_given)
    reason = why_it_cannot_write(model, asked, seqlen, offloaded) if asked else None
    if reason is None:
        return asked
    if not num_given:
        raise ConfigurationError(
            f"The model is to write its calibration samples itself (`calibration_data={WRITTEN!r}`), but {reason}. "
            "Give text or token ids."
        )
    if "self_calibration" in config.fewest_options():
        raise ConfigurationError(
            f"`self_calibration={config.self_calibration:g}` lets the model write samples, but {reason}. Set "
            "self_calibration=0."
        )
    warn_user(
        f"The model is calibrated on the given samples alone, since {reason}. It will lose more on other kinds of "
        "text, unless the samples are of several kinds. self_calibration=0 silences this."
    )
    return 0


def why_it_cannot_write(model: PreTrainedModel, num_samples: int, seqlen: int, offloaded: int) -> str | None:
    """Return why a model cannot write samples, as the end of a sentence, or None if it can.

    Args:
        model: The model; its weights are not read.
        num_samples: Number of samples to write.
        seqlen: Number of tokens of each.
        offloaded: Bytes of its weights that are loaded each time they are used.
    """
    if not model.can_generate():
        return f"a {type(model).__name__} cannot write text"
    if looks_ahead(model):
        return f"this {type(model).__name__} reads tokens that are yet to come, as encoders do"
    times = seqlen * math.ceil(num_samples / _MOST_ROWS)
    seconds = times * offloaded / _LOADING_RATE
    if seconds > _LONGEST_LOADING:
        return f"its offloaded weights would be loaded {times:,} times, in some {seconds / 3600:.0f} hours"
    return None


def written_samples(passes: Passes, num_samples: int, seed: int) -> Tensor:
    """Let the model write samples from its own distribution, each from a random token of the vocabulary.

    The end of a text does not end a sample. The random state of the process stays as it is, and a sample does not
    depend on those that are written with it, except for rounding.

    Args:
        passes: The dense model, in evaluation mode, which `check_can_write` found fit to write; and samples, which
            are not read, of the length of those to write. As many samples are written at once as their keys and
            values fit in the memory that hidden states may take.
        num_samples: Number of samples.
        seed: Seed of sampling.

    Returns:
        LongTensor `(num_samples, seqlen)`, on the CPU.
    """
    model, seqlen, settings = passes.prunable.model, passes.tokens.shape[1], passes.settings
    device = input_device(model)
    first, rest = (torch.Generator().manual_seed(seed_of(seed, part)) for part in range(2))
    begins = torch.randint(vocabulary_size(model), (num_samples, 1), generator=first)
    draws = torch.rand(num_samples, seqlen - 1, generator=rest)
    written = []
    with _plain_generation(model, seqlen - 1), torch.no_grad():
        together = rows_at_once(model, seqlen, settings.spill.limit)
        batches = list(zip(begins.split(together), draws.split(together)))
        for prompt, batch in tqdm(batches, desc="Writing samples", unit="batch", disable=not settings.progress):
            prompt = prompt.to(device)
            sampled = LogitsProcessorList([_Sampling(batch.to(device))])
            try:
                ids = model.generate(  # type: ignore[operator]
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), logits_processor=sampled
                )
            except (AttributeError, TypeError, ValueError, LookupError) as error:
                raise UnsupportedModelError(
                    f"{type(model).__name__} {raised(error)} when it was to write calibration text. Use "
                    "self_calibration=0, and give calibration data."
                ) from error
            written.append(cast(Tensor, ids).cpu())
    return torch.cat(written)


def samples_alone(passes: Passes, config: OTPruningConfig) -> Tensor:
    """Return `num_samples` samples of a model that is checked and put into evaluation mode.

    Args:
        passes: The dense model, and no samples, of the length of those to write.
        config: The configuration, which has the number of samples and the seed.

    Raises:
        ConfigurationError: If the model cannot write.
        NumericalError: If its weights or outputs are NaN or infinite.
        UnsupportedModelError: If it computes something else than pruning assumes.
    """
    model = passes.prunable.model
    check_parameters(model, passes.prunable.blocks)
    check_can_write(model, config.replace(self_calibration=0), tuple(passes.tokens.shape), offloaded_bytes(model))
    model.eval()
    probe_passes(passes, config.seed).checked()
    return written_samples(passes, config.num_samples, config.seed)


def probe_passes(passes: Passes, seed: int) -> Passes:
    """Return passes over at least one sample, to check a model on: a short one of its own where none is given."""
    if len(passes.tokens):
        return passes
    short = passes.of(passes.tokens[:, :SAMPLE_TOKENS])
    return passes.of(written_samples(short, 1, seed))


class _Sampling(LogitsProcessor):
    """Chooses a token by its probability with given random numbers, one for each sample and place.

    So a sample does not depend on how many are written at once, as it would with the process's own random state.
    """

    def __init__(self, draws: Tensor):
        self._draws = draws

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = self._draws[:, input_ids.shape[1] - 1].to(scores.device)
        summed = scores.float().softmax(dim=-1).cumsum(dim=-1)
        chosen = torch.searchsorted(summed, (draws * summed[:, -1])[:, None], right=True)
        chosen = chosen.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def rows_at_once(model: PreTrainedModel, seqlen: int, room: int) -> int:
    """Return how many samples are written at once.

    Args:
        model: The model; its weights are not read.
        seqlen: Number of tokens of each sample.
        room: Bytes of memory that their keys and values may take. Hidden states of samples wait in as many later on.
    """
    row = seqlen * cache_bytes(model) + 4 * _COPIES * vocabulary_size(model)
    return max(1, min(_MOST_ROWS, room // row))


@contextmanager
def _plain_generation(model: PreTrainedModel, new_tokens: int) -> Iterator[None]:
    """Write texts of full length, whatever the model's generation settings are.

    They are replaced as a whole, since they would complete those that are passed to `generate`.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = own
