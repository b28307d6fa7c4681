"""The auto classes of transformers whose models read text; no torch here, so that a card is rendered fast."""

from collections.abc import Mapping

CAUSAL = "AutoModelForCausalLM"
# Their weights may fit a causal class of the same model type.
HEADLESS = ("AutoModelForMaskedLM", "AutoModelForPreTraining", "AutoModel")
# Those whose models read token ids, and the tasks that the Hub knows them by.
TASKS: Mapping[str, str] = {
    CAUSAL: "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModel": "feature-extraction",
}
