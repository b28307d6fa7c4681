"""What quantization costs a dense and a pruned model: perplexity, bytes and speed of generation.

    python benchmarks/quantization.py --models FOLDER FOLDER --evaluation test.txt --environments .clients \
        --output benchmarks/results/quantization.json

The first model is the dense one. torchao quantizes as transformers loads (`int8`, `int4` in groups of 32); llama.cpp
converts to float16 and quantizes that (`q8_0`, `q4_k_m`), and its own perplexity counts, on the same token ids. `make
test-clients` makes the environment that has both. Cells that are in the output are not measured again.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _cells import Store, digest, environment, table
from clients import converter_in
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.models.quantizers import quantization_config, scheme_named
from optimum_otprune.pruning.calibration.data import evaluation_tokens

GGUF = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
SCHEMES = ("float32", "int8", "int4", *GGUF)
PROMPT, NEW = 8, 64  # tokens
_FLOAT = torch.float32


def mean_nll(logits_of: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """Negative log-likelihood of a token, in nats, over all tokens but the first of each window."""
    total = 0.0
    for window in windows:
        predicted = logits_of(window)[:-1].float().log_softmax(-1)
        total -= float(predicted.gather(1, window[1:, None]).double().sum())
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def by_transformers(folder: Path, scheme: str, windows: Tensor) -> dict[str, Any]:
    """A cell of a model that transformers runs, in float32 where it is not quantized."""
    options = {} if scheme == "float32" else {"quantization_config": quantization_config(scheme_named(scheme), _FLOAT)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=_FLOAT, **options).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        size = sum(file.stat().st_size for file in Path(saved).glob("*.safetensors"))
        nll = mean_nll(lambda window: model(window[None]).logits[0], windows)
        prompt = windows[:1, :PROMPT]
        model.generate(prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        speed = NEW / (time.perf_counter() - start)
    return {"nll": nll, "bytes": size, "tokens_per_second": speed}


def by_llama_cpp(folder: Path, scheme: str, windows: Tensor, converter: Path) -> dict[str, Any]:
    """A cell of a model that llama.cpp converts, quantizes and runs."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as work:
        plain, file = Path(work, "f16.gguf"), Path(work, "quantized.gguf")
        command = [sys.executable, str(converter), str(folder), "--outfile", str(plain), "--outtype", "f16"]
        subprocess.run(command, check=True, capture_output=True)
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.ftype, wanted.nthread = getattr(llama_cpp, GGUF[scheme]), 1
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(file).encode(), wanted):
            raise SystemExit(f"llama.cpp could not quantize {folder.name} to {scheme}")
        length = windows.shape[1]
        model = llama_cpp.Llama(str(file), n_ctx=length, n_threads=1, logits_all=True, verbose=False)

        def logits_of(window: Tensor) -> Tensor:
            model.reset()
            model.eval(window.tolist())
            return torch.from_numpy(model.scores[: len(window)])

        nll = mean_nll(logits_of, windows)
        model.reset()
        model.eval(windows[0, :PROMPT].tolist())
        start = time.perf_counter()
        for position in range(NEW):
            model.eval([int(model.scores[PROMPT + position - 1].argmax())])
        speed = NEW / (time.perf_counter() - start)
        return {"nll": nll, "bytes": file.stat().st_size, "tokens_per_second": speed}


def page(content: dict[str, Any]) -> str:
    """The Markdown file."""
    cells = content["measurements"]
    names = [folder["name"] for folder in content["models"]]
    dense = cells[f"{names[0]} float32"]["bytes"]
    rows = []
    for name in names:
        for scheme in SCHEMES:
            cell = cells.get(f"{name} {scheme}")
            if cell is not None:
                size = cell["bytes"]
                columns = (f"{cell['perplexity']:.2f}", f"{size / 1e6:,.1f}", f"{size / dense:.0%}")
                rows.append([name, scheme, *columns, f"{cell['tokens_per_second']:.1f}"])
    libraries = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    head = ["model", "weights", "perplexity", "MB", "of the dense float32", "tokens/s"]
    return (
        f"# Pruned and quantized\n\n{content['windows']['count']} windows of {content['windows']['seqlen']} tokens of "
        f"{content['evaluation']}. Speed is that of generating {NEW} tokens after {PROMPT}, one thread, by what "
        "runs the format (transformers for float32 and torchao's int8 and int4, llama.cpp for the others), so "
        f"compare it within one column of weights.\n\n{libraries}.\n\n{table(head, rows)}"
    )


def measured(args: argparse.Namespace, windows: Tensor) -> Iterator[tuple[str, dict[str, Any], Callable]]:
    """Name, settings and work of each cell."""
    converter = converter_in(args.environments)
    for folder, name in zip(args.models, args.names):
        for scheme in SCHEMES:
            work = partial(by_llama_cpp, converter=converter) if scheme in GGUF else by_transformers
            yield f"{name} {scheme}", {"scheme": scheme}, partial(work, folder, scheme, windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders, the dense model first")
    parser.add_argument("--names", nargs="+", required=True, help="what the table calls them")
    parser.add_argument("--evaluation", required=True, help="text, token ids or Hub data set")
    parser.add_argument("--evaluation-name", required=True, help="what the page calls it")
    parser.add_argument("--environments", type=Path, required=True, help="folder that `make test-clients` filled")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens (default: 16)")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); the table goes beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dense = OTPruner.from_pretrained(args.models[0], OTPruningConfig(seqlen=512))
    windows = evaluation_tokens(args.evaluation, dense.config, dense.tokenizer, dense.limits, args.windows).tokens
    versions = environment(dense)["versions"] | {name: version(name) for name in ("torchao", "llama-cpp-python")}
    header = {
        "models": [
            {"name": name, "digest": digest(OTPruner.from_pretrained(folder).model.parameters())}
            for folder, name in zip(args.models, args.names)
        ],
        "evaluation": args.evaluation_name,
        "windows": {"count": len(windows), "seqlen": windows.shape[1], "digest": digest([windows])},
        "versions": versions,
    }
    store = Store(args.output, header)
    for name, settings, work in measured(args, windows):
        if not store.holds(name, settings):
            found = work()
            perplexity = float(torch.tensor(found["nll"]).exp())
            store.keep(name, settings, {**found, "perplexity": perplexity})
            print(f"{name}: perplexity {perplexity:.2f}, {found['bytes']:,} bytes", flush=True)
            if f"{args.names[0]} float32" in store.content["measurements"]:
                args.output.with_suffix(".md").write_text(page(store.content), encoding="utf-8")


if __name__ == "__main__":
    main()
