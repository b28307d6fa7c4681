"""What a model writes after a prompt, without chance: at each step the token that it finds most likely."""

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.models.inputs import input_device


def greedy_continuation(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int, assistant: PreTrainedModel | None = None
) -> Tensor:
    """Return the tokens that a model writes after a prompt, whatever its own generation settings are.

    Args:
        model: The model, which is put into evaluation mode.
        prompt: The prompt's token ids, LongTensor `(seqlen,)`.
        new_tokens: How many tokens are written; fewer where the model writes its end of text before.
        assistant: A smaller model of the same vocabulary that drafts what `model` might write, in evaluation mode; the
            tokens stay those of `model`, which checks several drafted ones in one call (speculative decoding, as in
            https://arxiv.org/abs/2211.17192). None for none.

    Returns:
        LongTensor `(new_tokens,)` or shorter, on the CPU, the end of text included.

    Raises:
        UnsupportedModelError: If the model cannot generate text.
    """
    check_can_continue(model)
    own = model.generation_config
    end = None if own is None else own.eos_token_id
    # The model's own settings are replaced, since they would complete those that are passed to `generate`.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=end, pad_token_id=0, use_cache=True
    )
    ids = prompt[None].to(input_device(model))
    try:
        with torch.no_grad():
            written = model.eval().generate(  # type: ignore
                input_ids=ids, attention_mask=torch.ones_like(ids), assistant_model=assistant
            )
    finally:
        model.generation_config = own
    return written[0, len(prompt) :].cpu()


def check_can_continue(model: PreTrainedModel) -> None:
    """Raise an error if a model cannot generate text.

    Raises:
        UnsupportedModelError: If it cannot; the message says what to do.
    """
    if not model.can_generate():
        raise UnsupportedModelError(
            f"A {type(model).__name__} cannot write text, so it has no continuations to show. Give no prompts "
            "(`prompts=()`, or `--no-prompts`)."
        )
