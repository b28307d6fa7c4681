"""Render the example cards again from the configuration and report beside them; `--prune` makes these first."""

import argparse
from importlib.resources import as_file, files
from pathlib import Path

from optimum_otprune.checkpoints.card.folder import folder_card, replace_card
from optimum_otprune.checkpoints.card.plots import PLOT_FILE, save_rescue_plot
from optimum_otprune.commands.demo_texts import documentation_texts
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.pruner import OTPruner
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport

HERE = Path(__file__).parent
EXAMPLES = {
    "demo-llama-half": {"pruning_ratio": 0.5},
    "demo-llama-reference-20": {"pruning_ratio": 0.2, "method": "structured_afr_with_intrafusion"},
}
SHARED = {"seqlen": 256, "num_samples": 64, "multiple_of": 32}


def prune(folder: Path, options: dict) -> None:
    """Prune the embedded model, and keep configuration and report."""
    train, validation = documentation_texts("train"), documentation_texts("validation")
    with as_file(files("optimum_otprune.commands") / "demo_model") as model:
        pruner = OTPruner.from_pretrained(model, OTPruningConfig(**SHARED, **options), dtype="float32")
    pruner.evaluate(validation, progress=False)
    pruner.prune(train, progress=False)
    pruner.evaluate(validation, progress=False)
    assert pruner.report is not None
    folder.mkdir(exist_ok=True)
    pruner.config.save_pretrained(folder)
    pruner.report.save(folder / REPORT_FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prune", action="store_true", help="prune the embedded model again; changes the reports")
    arguments = parser.parse_args()
    for name, options in EXAMPLES.items():
        folder = HERE / name
        if arguments.prune:
            prune(folder, options)
        save_rescue_plot(PruningReport.load(folder / REPORT_FILE), folder / PLOT_FILE)
        replace_card(folder, folder_card(folder, has_tokenizer=True))
        print(f"{name}: rendered")


if __name__ == "__main__":
    main()
