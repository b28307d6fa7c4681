"""A process that talks to the tests' Hub: the client reads its address, token and cache when it is imported.

Jobs are JSON lines on standard input, answers JSON lines on standard output; waiting takes no time.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from optimum_otprune.errors import OTPruneError
from optimum_otprune.storage.hub.preflight import check_hub_access
from optimum_otprune.storage.hub.push import push_file, push_folder, verify_repository

WAITS: list[float] = []


def push(folder: str, repo_id: str, **options: Any) -> dict[str, Any]:
    return push_folder(Path(folder), repo_id, **options)._asdict()


def put(file: str, repo_id: str) -> dict[str, Any]:
    return push_file(Path(file), repo_id)._asdict()


def push_config(repo_id: str, folder: str | None = None, **options: Any) -> str:
    from optimum_otprune.config.configuration import OTPruningConfig

    config = OTPruningConfig(pruning_ratio=0.25)
    if folder is None:
        config.push_to_hub(repo_id, **options)
    else:
        config.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **options)
    return OTPruningConfig.from_pretrained(repo_id).to_json_string()


def save(folder: str, **options: Any) -> str:
    from optimum_otprune.pruner import OTPruner
    from tests.conftest import make_llama

    return str(OTPruner.from_pretrained(make_llama()).save_pretrained(folder, **options))


def push_model(repo_id: str, **options: Any) -> dict[str, Any]:
    from optimum_otprune.pruner import OTPruner
    from tests.conftest import make_llama

    return OTPruner.from_pretrained(make_llama()).push_to_hub(repo_id, **options)._asdict()


def load(repo_id: str, cache_dir: str) -> int:
    from optimum_otprune.pruner import OTPruner

    return OTPruner.from_pretrained(repo_id, verify=True, cache_dir=cache_dir).model.num_parameters()


def command(arguments: list[str]) -> int:
    from optimum_otprune.commands.main import main

    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code
    return 0


JOBS = {
    "check": check_hub_access,
    "command": command,
    "load": load,
    "push": push,
    "push_config": push_config,
    "push_model": push_model,
    "put": put,
    "save": save,
    "verify": verify_repository,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers may come out there
    time.sleep = WAITS.append  # the client's waits and ours
    for line in sys.stdin:
        job = json.loads(line)
        WAITS.clear()
        start = time.monotonic()
        try:
            answer: dict[str, Any] = {"result": JOBS[job["name"]](**job["arguments"])}
        except OTPruneError as error:
            answer = {"errors": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
        answer |= {"waits": list(WAITS), "seconds": time.monotonic() - start}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
