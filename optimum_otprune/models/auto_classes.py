"""Which auto class of transformers loads a class of models."""

from collections.abc import Mapping
from typing import Any

from transformers.models.auto import modeling_auto

from optimum_otprune.models.tasks import HEADLESS

_AUTO_CLASSES: Mapping[str, Mapping[str, Any]] = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForSpeechSeq2Seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForPreTraining": modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
}


def auto_classes(name: str) -> list[str]:
    """Return the auto classes that load a class of transformers, the causal one first; none for a custom class.

    Those that leave out a head, or know no task, are named only where no other loads it.

    Args:
        name: The name of a class of transformers.

    Example:
        >>> auto_classes("LlamaForCausalLM"), auto_classes("BertForMaskedLM"), auto_classes("Mine")
        (['AutoModelForCausalLM'], ['AutoModelForMaskedLM'], [])
    """
    found = [
        auto
        for auto, classes in _AUTO_CLASSES.items()
        if any(name == known or (isinstance(known, (tuple, list)) and name in known) for known in classes.values())
    ]
    return [auto for auto in found if auto not in HEADLESS] or found[:1]
