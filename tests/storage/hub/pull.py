"""What a user without this package gets of repositories: digests of files and of logits, as JSON on standard output.

Run as a script with repositories as arguments.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM


def pull(repo_id: str) -> dict[str, object]:
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(repo_id)(input_ids=torch.arange(12)[None]).logits
    files = [path for path in Path(snapshot_download(repo_id)).iterdir() if path.name != ".gitattributes"]
    return {
        "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


if __name__ == "__main__":
    assert "optimum_otprune" not in sys.modules
    sys.modules["optimum_otprune"] = None  # type: ignore[assignment]  # importing it would fail
    torch.set_num_threads(1)
    json.dump({repo_id: pull(repo_id) for repo_id in sys.argv[1:]}, sys.stdout)
