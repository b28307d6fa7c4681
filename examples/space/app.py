"""Prune the model that the package carries, live: perplexity, what each layer rescued, and what both models write."""

from functools import cache
from importlib.resources import as_file, files
from typing import NamedTuple

import gradio as gr
import pandas as pd

from optimum_otprune import OTPruner, OTPruningConfig, compare_models
from optimum_otprune.commands.demo_texts import documentation_texts

METHODS = {
    "otprune: elimination, transport and refit": "otprune",
    "flap: fluctuation scores, lost means as biases": "flap",
    "wanda_sp: scores by weights and activations, plain dropping": "wanda_sp",
    "magnitude: small weights, plain dropping": "magnitude",
}
PROMPT = "Return a new"
SEQLEN, SAMPLES, WINDOWS, NEW_TOKENS = 256, 32, 48, 40


class Found(NamedTuple):
    """What the page shows of one pruning."""

    summary: pd.DataFrame
    layers: pd.DataFrame
    dense_text: str
    pruned_text: str


@cache
def demo_texts() -> tuple[list[str], list[str]]:
    return documentation_texts("train"), documentation_texts("validation")


def load(ratio: float, method: str) -> OTPruner:
    config = OTPruningConfig(
        pruning_ratio=ratio, method=method, quality="fast", multiple_of=16, seqlen=SEQLEN, num_samples=SAMPLES
    )
    with as_file(files("optimum_otprune.commands") / "demo_model") as folder:
        return OTPruner.from_pretrained(str(folder), config, dtype="float32")


def prune(percent: float, method: str, prompt: str) -> Found:
    """Prune a fresh copy of the model, and compare it with the dense one on text that neither saw."""
    seen, unseen = demo_texts()
    dense, pruner = load(percent / 100, METHODS[method]), load(percent / 100, METHODS[method])
    report = pruner.prune(seen, progress=False)
    found = compare_models(
        dense.model,
        pruner.model,
        {"unseen documentation": unseen},
        [prompt],
        tokenizer=pruner.tokenizer,
        seqlen=SEQLEN,
        max_windows=WINDOWS,
        new_tokens=NEW_TOKENS,
        progress=False,
    )
    (data,), (text,) = found.data, found.prompts
    summary = pd.DataFrame(
        [
            ("perplexity, lower is better", f"{data.dense_perplexity:.2f}", f"{data.perplexity:.2f}"),
            ("parameters", f"{found.dense.parameters:,}", f"{found.pruned.parameters:,}"),
            ("same next token", "100 %", f"{data.agreement:.0%}"),
            ("rescued", "", f"{report.rescue_ratio:.0%}"),
        ],
        columns=["", "dense", "pruned"],
    )
    layers = pd.DataFrame(
        {
            "layer": [str(layer.layer) for layer in report.layers],
            "kept": [layer.intermediate_size_after for layer in report.layers],
            "rescued, %": [round(100 * layer.rescue_ratio, 1) for layer in report.layers],
        }
    )
    return Found(summary, layers, text.prompt + text.dense, text.prompt + text.pruned)


def shown(percent: float, method: str, prompt: str) -> tuple[pd.DataFrame, gr.BarPlot, pd.DataFrame, str, str]:
    if not prompt.strip():
        raise gr.Error("Give a few words that both models go on with.")
    found = prune(percent, method, prompt)
    lowest = min(0.0, found.layers["rescued, %"].min())  # below 0 is worse than dropping
    plot = gr.BarPlot(found.layers, y_lim=[lowest, 100])
    return found.summary, plot, found.layers, found.dense_text, found.pruned_text


def page() -> gr.Blocks:
    with gr.Blocks(title="Prune a language model live") as blocks:
        gr.Markdown(
            "# Prune a language model live\n"
            "A Llama of 1.2 million parameters, trained on Python's documentation, loses channels of its feed-forward "
            "layers. *Rescued* is the share of the removed channels' output that is still delivered: plain dropping "
            "scores 0, a perfect layer 100 %."
        )
        with gr.Row():
            ratio = gr.Slider(10, 70, value=50, step=5, label="FFN channels to remove, %", elem_id="ratio")
            method = gr.Dropdown(list(METHODS), value=next(iter(METHODS)), label="Method", elem_id="method")
            prompt = gr.Textbox(PROMPT, label="Both models go on with", max_length=200, elem_id="prompt")
        button = gr.Button("Prune", variant="primary", elem_id="prune")
        with gr.Row():
            summary = gr.Dataframe(
                label="Before and after",
                interactive=False,
                column_widths=["44%", "28%", "28%"],
                scale=5,
                wrap=True,
                elem_id="summary",
            )
            plot = gr.BarPlot(
                x="layer", y="rescued, %", title="Rescued by each layer, %", height=220, scale=3, elem_id="plot"
            )
            layers = gr.Dataframe(label="Layer by layer", interactive=False, scale=3, elem_id="layers")
        with gr.Row():
            dense_text = gr.Textbox(label="The dense model writes", lines=6, elem_id="dense")
            pruned_text = gr.Textbox(label="The pruned model writes", lines=6, elem_id="pruned")
        button.click(shown, [ratio, method, prompt], [summary, plot, layers, dense_text, pruned_text])
    return blocks


if __name__ == "__main__":
    page().launch()
