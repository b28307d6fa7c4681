"""What a model is called with to run on token ids."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.models.devices import execution_device


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that token ids go to."""
    return execution_device(model.get_input_embeddings())


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model's input embeddings hold."""
    size = model.get_input_embeddings().num_embeddings
    assert isinstance(size, int)
    return size


def model_inputs(model: PreTrainedModel, batch: Tensor) -> dict[str, Tensor]:
    """Return the arguments that let a model read token ids: an encoder and its decoder read the same text.

    Args:
        model: The model.
        batch: Token ids `(batch, seqlen)`, on any device.
    """
    ids = batch.to(input_device(model))
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def check_predicts_next(model: PreTrainedModel) -> None:
    """Raise if a model does not predict the next token of a text from the tokens before it.

    Raises:
        UnsupportedModelError: If it has an encoder that reads the text, or no language-model head.
    """
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not go on with a text token by token, so that perplexity and the like say "
            "nothing of it. Measure it on its own task, or leave evaluation and recovery out."
        )
