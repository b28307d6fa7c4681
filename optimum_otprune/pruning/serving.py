"""What keeps a pruned model from the programs that serve models: said in the run, the summary and the card alike."""

from collections.abc import Mapping, Sequence

from optimum_otprune.models.save_formats import save_format, save_formats, saved_widths

# For a model whose FFNs had no biases: some programs ignore `mlp_bias` without a message.
_ADDED_BIASES = (
    "The FFNs have gained biases (`mlp_bias`), which transformers reads. SGLang and TGI drop them without a word, and "
    "the model is worse there; `intercept='never'` adds none."
)


def not_read_everywhere(added_biases: bool, widths: Sequence[int], config: Mapping[str, object]) -> list[str]:
    """Return one sentence for each trait of a pruned model that some programs which serve models do not read.

    Which program reads what is in the documentation, on the page about serving. A model without such a trait loads
    wherever the dense one does.

    Args:
        added_biases: Whether the FFNs had no biases before pruning and have some now.
        widths: The channels of each layer.
        config: The configuration, as a report holds it.
    """
    format_name = config.get("non_uniform_format")
    found = [_ADDED_BIASES] if added_biases else []
    if len(set(widths)) > 1 and isinstance(format_name, str) and format_name in save_formats:
        takes_code = save_format(format_name).needs_remote_code
        if takes_code and len(set(saved_widths(format_name, widths))) > 1:
            found.append(
                f"The layers differ in width and are saved as {format_name!r}, which transformers reads with the code "
                "in the folder. vLLM, SGLang, TGI, llama.cpp, CTranslate2, ONNX Runtime and OpenVINO do not load it; "
                "`non_uniform_format='pad'` is for them."
            )
    return found
