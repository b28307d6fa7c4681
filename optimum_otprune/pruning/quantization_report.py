"""The report of quantization: what was done to a pruned model's weights, and how far that moved its predictions."""

import dataclasses
from typing import Any

from optimum_otprune.errors import ReportError
from optimum_otprune.pruning.layer_report import check_entry, known_entries

_LONGEST = 100  # characters of a name


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """The result of quantizing a pruned model.

    Attributes:
        scheme: The name of the scheme, such as `"int8"`.
        library: The library that the result needs to be loaded, with its version.
        words: What was done to a weight, in words.
        quantized_parameters: Number of weights that were quantized; the others stay as they are.
        dtype: The data type of the others.
        size_before: Bytes of the weights' files before.
        size_after: Bytes of the weights' files after.
        num_tokens: Number of tokens that the model was compared on before and after; it wrote them itself.
        kl: Mean divergence of the quantized model's predictions from those before, in nats per token; None where the
            model does not predict the next token.
        agreement: Share of the tokens at which both find the same token the most likely; None likewise.
        perplexity_before: Perplexity of what the model wrote, before quantization; None likewise.
        perplexity_after: The same after quantization.
    """

    scheme: str
    library: str
    words: str
    quantized_parameters: int
    dtype: str
    size_before: int
    size_after: int
    num_tokens: int
    kl: float | None
    agreement: float | None
    perplexity_before: float | None
    perplexity_after: float | None

    @classmethod
    def read(cls, values: object, where: str, unknown: list[str]) -> "QuantizationReport":
        """Read an entry of a report that may come from anybody.

        Args:
            values: The entry.
            where: Its name, for messages.
            unknown: A list that gets the names of entries that are not known here.

        Raises:
            ReportError: If an entry is missing, of another kind, or out of range.
        """
        found = cls(**known_entries(values, [field.name for field in dataclasses.fields(cls)], where, unknown))
        found.check(where)
        return found

    def check(self, where: str, is_finite: bool = True) -> None:
        """Raise an error if an entry has the wrong type or is out of range.

        Args:
            where: The name of the report's entry, for messages.
            is_finite: Whether to refuse NaN and infinity, as in files.

        Raises:
            ReportError: If there is one; the message names the first such entry.
        """
        for name in ("scheme", "library", "words", "dtype"):
            value = getattr(self, name)
            check_entry(f"{where}.{name}", value, str)
            if not 0 < len(value) <= _LONGEST:
                raise ReportError(f"`{where}.{name}` of the report is {value!r:.60}; want up to 100 characters.")
        for name in ("quantized_parameters", "size_before", "size_after", "num_tokens"):
            check_entry(f"{where}.{name}", getattr(self, name), int, 0)
        for name, least in (("kl", 0.0), ("agreement", 0.0), ("perplexity_before", 1.0), ("perplexity_after", 1.0)):
            if getattr(self, name) is not None:
                check_entry(f"{where}.{name}", getattr(self, name), float, least, is_finite)

    def to_dict(self) -> dict[str, Any]:
        """Return the report JSON-ready."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"Quantization: {self.scheme} by {self.library} ({self.words})",
            f"  {self.quantized_parameters:,} weights; the others are {self.dtype}",
            f"  Files of the weights: {self.size_before:,} -> {self.size_after:,} bytes",
        ]
        if self.kl is not None:
            lines.append(
                f"  On {self.num_tokens:,} tokens that the model wrote itself: KL {self.kl:.4f}, agreement "
                f"{self.agreement:.1%}, perplexity {self.perplexity_before:.2f} -> {self.perplexity_after:.2f}"
            )
        return "\n".join(lines)
