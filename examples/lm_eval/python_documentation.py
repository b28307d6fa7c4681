"""The items of the task, from the file beside this one: a path in the YAML would start at the working directory."""

from pathlib import Path

import datasets


def load(**_: object) -> dict[str, datasets.Dataset]:
    file = Path(__file__).with_suffix(".jsonl")
    return {"test": datasets.Dataset.from_json(str(file))}
