"""What a model card says of quantization."""

from optimum_otprune.checkpoints.card.figures import change, kl, perplexity, share, size
from optimum_otprune.checkpoints.card.markdown import escape
from optimum_otprune.pruning.quantization_report import QuantizationReport


def quantization_facts(quantization: QuantizationReport | None) -> dict[str, str] | None:
    """Return what the card shows of quantization, with strings escaped; None for plain weights.

    Args:
        quantization: The report of it, or None.
    """
    if quantization is None:
        return None
    return {
        "scheme": escape(quantization.scheme),
        "library": escape(quantization.library),
        "package": quantization_tag(quantization),
        "words": escape(quantization.words),
        "dtype": escape(quantization.dtype),
        "count": f"{quantization.quantized_parameters:,}",
        "before": size(quantization.size_before),
        "after": size(quantization.size_after),
        "change": change(quantization.size_after, quantization.size_before),
        "moved": _moved(quantization),
    }


def quantization_tag(quantization: QuantizationReport) -> str:
    """Return the name of the library, in characters that a tag may have."""
    name = quantization.library.partition(" ")[0]
    return "".join(letter for letter in name if letter.isascii() and (letter.isalnum() or letter in "_-"))


def _moved(quantization: QuantizationReport) -> str:
    if quantization.kl is None or quantization.agreement is None:
        return "How far that moved its outputs was not measured."
    return (
        f"On {quantization.num_tokens:,} tokens that the pruned model wrote itself, the quantized one diverges "
        f"from it by {kl(quantization.kl)} nats per token, finds the same next token most likely for "
        f"{share(quantization.agreement)}, and its perplexity goes from {perplexity(quantization.perplexity_before)} "
        f"to {perplexity(quantization.perplexity_after)}."
    )
