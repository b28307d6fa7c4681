"""Reports without a model, and a strict reader of rendered Markdown."""

from html.parser import HTMLParser

from markdown_it import MarkdownIt

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.functional.ratios import RescueEnergies
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.recovery_report import HeldoutPart, RecoveryReport
from optimum_otprune.pruning.report import LayerReport, PruningReport


def layer_report(index: int = 0, rescue: float = 0.5, before: int = 8, after: int = 4) -> LayerReport:
    """One layer whose ratios follow from its energies."""
    energies = RescueEnergies(output=10.0, pruned=4.0, error=4.0 * (1 - rescue), kept=8.0, shift=0.8)
    kept = tuple(range(after))
    error = energies.error / energies.output
    return LayerReport(
        index, before, after, kept, rescue, 0.1, 0.5, 1.0, 0.4, 0.3, error, float("inf"), False, energies
    )


def evaluation(stage: str, perplexity: float, **changes) -> dict:
    """What `OTPruner.evaluate` records."""
    return {
        "perplexity": perplexity,
        "nll": 1.0,
        "num_tokens": 40_000,
        "num_windows": 20,
        "seqlen": 2001,
        "stride": 2001,
        "dtype": "float32",
        "protocol": "windows",
        "data": "Salesforce/wikitext",
        "stage": stage,
        **changes,
    }


CALIBRATION = {"data": "Salesforce/wikitext", "num_samples": 4, "seqlen": 100, "num_tokens": 400}


def make_report(config: OTPruningConfig | None = None, **changes) -> PruningReport:
    """A report of two layers, evaluated before and after."""
    config = config or OTPruningConfig()
    functions = Recipe.resolve(config, {}).functions
    settings = {
        "config": config.to_dict(),
        "options": tuple(config.fewest_options()),
        "references": {field: entry.citation for field, entry in functions.items() if entry.citation},
        "layers": (layer_report(0), layer_report(1, rescue=0.25)),
        "parameters_before": 1000,
        "parameters_after": 700,
        "calibration": {
            "data": "Salesforce/wikitext",
            "num_samples": 4,
            "seqlen": 100,
            "num_tokens": 400,
            "written_samples": 4,
        },
        "base_model": "meta-llama/Llama-3.2-1B",
        "evaluations": (evaluation("dense", 10.0), evaluation("pruned", 12.0)),
        "versions": {"torch": "2.13.0"},
        "size_before": 4_000_000,
        "size_after": 2_800_000,
        "model_type": "llama",
        "base_card": {"license": "llama3.2", "language": ["en"]},
    }
    return PruningReport(**{**settings, **changes})


def lm_eval_content(
    num_parameters: int = 700,
    value: float = 0.25,
    limit: int | None = None,
    model: str = "/home/me/llama-half",
    task: str = "arc_easy",
) -> dict:
    """What lm-eval 0.4.13 writes, shortened: one benchmark of the Hub with two filters, and one task of local data."""
    metrics = {"exact_match,strict-match": value, "exact_match_stderr,strict-match": 0.012}
    metrics |= {"exact_match,flexible-extract": value, "exact_match_stderr,flexible-extract": "N/A"}
    return {
        "results": {
            "gsm8k": {"name": "gsm8k", "alias": "gsm8k", "sample_len": 1319, **metrics},
            task: {"alias": task, "acc,none": value, "acc_stderr,none": 0.012},
        },
        "group_subtasks": {"gsm8k": []},
        "configs": {
            "gsm8k": {"task": "gsm8k", "dataset_path": "openai/gsm8k", "metadata": {"pretrained": model}},
            task: {"task": task, "dataset_path": "json"},
        },
        "versions": {"gsm8k": 3.0, task: 1.0},
        "n-shot": {"gsm8k": 5, task: 0},
        "higher_is_better": {"gsm8k": {"exact_match": True}, task: {"acc": True}},
        "n-samples": {name: {"original": 1319, "effective": 1319} for name in ("gsm8k", task)},
        "config": {
            "model": "hf",
            "model_args": {"pretrained": model},
            "model_num_parameters": num_parameters,
            "model_dtype": "torch.float32",
            "limit": limit,
        },
        "date": 1796053389.57,
        "lm_eval_version": "0.4.13",
        "model_name": model,
        "chat_template": None,
    }


class Page(HTMLParser):
    """Elements and attributes of a card's body, rendered with raw HTML allowed as the Hub does before it sanitizes."""

    def __init__(self, card: str):
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.title = ""
        body = card.split("\n---\n", 1)[1]
        self.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body))

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)
        if self.elements[-1:] == ["h1"]:
            self.title += data.rstrip("\n")

    @property
    def text(self) -> str:
        """All text."""
        return "".join(self.texts)


def make_recovery(**changes) -> RecoveryReport:
    """A report of a recovery that made two kinds of text better."""
    numbers = {"num_windows": 4, "seqlen": 100, "kl_before": 0.2, "kl_after": 0.1, "agreement_before": 0.6}
    numbers |= {"agreement_after": 0.7, "perplexity_dense": 12.5, "perplexity_before": 20.0, "perplexity_after": 15.0}
    settings = {
        "trained": "ffn",
        "trained_parameters": 300,
        "budget": 20_000,
        "num_tokens": 18_000,
        "steps": 10,
        "kept_step": 9,
        "seconds": 12.0,
        "learning_rate": 1e-3,
        "batch_tokens": 2000,
        "seed": 0,
        "data": "user/text",
        "samples": {"given": 10, "written": 40},
        "heldout": (HeldoutPart("given", "user/text", **numbers), HeldoutPart("written", "", **numbers)),
    }
    return RecoveryReport(**{**settings, **changes})
