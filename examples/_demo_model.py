"""What the examples prune: the embedded model, on Python's own documentation, so that they run offline in seconds."""

from importlib.resources import files

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.commands.demo_texts import documentation_texts

TEXTS = documentation_texts("train")[:60]


def demo_folder() -> str:
    return str(files("optimum_otprune.commands") / "demo_model")


def demo_config(**options) -> OTPruningConfig:
    quick = {"quality": "fast", "seqlen": 128, "num_samples": 16}
    return OTPruningConfig(pruning_ratio=0.5, multiple_of=32, **{**quick, **options})


def demo_pruner(**options) -> OTPruner:
    return OTPruner.from_pretrained(demo_folder(), demo_config(**options), dtype="float32")


def show(title: str, pruner: OTPruner) -> None:
    perplexity = pruner.evaluate(documentation_texts("validation"), max_windows=64, progress=False)["perplexity"]
    rescued = "dense" if pruner.report is None else f"rescue ratio {pruner.report.rescue_ratio:.3f}"
    print(f"{title}: perplexity {perplexity:.2f}, {rescued}")
