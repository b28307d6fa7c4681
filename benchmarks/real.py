"""What pruning costs on a real language model, inside and outside the domain that it was calibrated on.

    python benchmarks/real.py --calibration valid.txt --evaluation test.txt --output benchmarks/results/smollm2.json
    python benchmarks/real.py --model FOLDER --output OUT.json --only flap:0.5 "default:0.5"

Without --model it is SmolLM2-135M-Instruct (see `_smollm2.py`), without --calibration and --evaluation WikiText-2 from
the Hub: validation to calibrate, test to evaluate. The second domain, which nothing is calibrated on, is the
documentation of the interpreter that runs this, or --second.

Each cell (a method at a ratio) runs in a process of its own and is kept as soon as it ends. A cell that is in the
result file is not measured again while its settings and the protocol are the same; --fresh measures the chosen cells
again. Each says by which versions and code it was made. `--quick` is another protocol, in a file of its own.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from _cells import Store, table
from _smollm2 import plain_smollm2

from optimum_otprune.models.perplexity import PROTOCOL

ROOT = Path(__file__).resolve().parents[1]
_CELL = Path(__file__).with_name("_real_cell.py")
DENSE = "dense"
DOMAINS = ("evaluation", "second")


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        label: Its name in table and plot.
        options: Of the configuration, as a user gives them.
        share_given: The share of the calibration tokens that is given; the others the dense model writes.
        ratios: The ratios at which it is measured; None for all.
    """

    label: str
    options: Mapping[str, Any]
    share_given: float = 1.0
    ratios: Sequence[float] | None = None


METHODS: dict[str, Method] = {
    "wanda_sp": Method("wanda_sp", {"method": "wanda_sp"}),
    "flap": Method("flap", {"method": "flap"}),
    "least_squares": Method("least_squares", {"method": "least_squares"}),
    "fast": Method("otprune, fast", {"quality": "fast"}, share_given=0.5),
    "default": Method("otprune", {}, share_given=0.5),
    "best": Method("otprune, best", {"quality": "best"}, share_given=0.5),
}


class Protocol(NamedTuple):
    """How much is measured.

    Attributes:
        samples: Calibration samples, given and written together.
        seqlen: Tokens of each, and of an evaluation window.
        windows: The first so many windows of the evaluation text.
        second_windows: The same of the second domain.
    """

    samples: int
    seqlen: int
    windows: int
    second_windows: int


FULL = Protocol(samples=64, seqlen=512, windows=64, second_windows=24)
QUICK = Protocol(samples=16, seqlen=512, windows=8, second_windows=8)


class Cell(NamedTuple):
    """One method at one ratio."""

    name: str
    settings: dict[str, Any]


def plan(args: argparse.Namespace, protocol: Protocol) -> Iterator[Cell]:
    """Every cell of the table, the dense model first."""
    splits = {"calibration_split": "validation", "evaluation_split": "test"}
    data = {"seqlen": protocol.seqlen, "seed": args.seed, **splits}
    yield Cell(DENSE, data)
    for ratio in args.ratios:
        for name, method in METHODS.items():
            if method.ratios is None or ratio in method.ratios:
                size = {"pruning_ratio": ratio, "multiple_of": args.multiple_of}
                given = {"num_samples": round(method.share_given * protocol.samples)}
                yield Cell(f"{name}:{ratio:g}", {**data, **size, **given, **method.options})


def measure_all(cells: Sequence[Cell], store: Store, args: argparse.Namespace, protocol: Protocol) -> list[str]:
    """Measure what the store does not hold; the names of cells whose process failed."""
    waiting = [cell for cell in cells if args.fresh or not store.holds(cell.name, cell.settings)]
    running: dict[Future, Cell] = {}
    failed = []
    with ThreadPoolExecutor(args.workers) as workers:
        while waiting or running:
            while waiting and len(running) < args.workers:
                cell = waiting.pop(0)
                print(f"{cell.name}: begins", flush=True)
                running[workers.submit(measure, cell, args, protocol)] = cell
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                cell, result = running.pop(ended), ended.result()
                if result is None:
                    failed.append(cell.name)
                    continue
                store.keep(cell.name, cell.settings, result)
                print(f"{cell.name}: {told(result)}", flush=True)
                write_results(store, args)
    return failed


def measure(cell: Cell, args: argparse.Namespace, protocol: Protocol) -> dict[str, Any] | None:
    """Run one cell in a process of its own; None if that ends without a result, having said why."""
    wanted = {
        "dense": cell.name == DENSE,
        "model": args.model,
        "options": cell.settings,
        "dtype": args.dtype,
        "device_map": args.device_map,
        "calibration": args.calibration,
        "evaluation": args.evaluation,
        "second": args.second,
        "windows": {"evaluation": protocol.windows, "second": protocol.second_windows},
    }
    threads = str(args.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory(prefix="otprune-real-") as folder:
        given, result = Path(folder, "cell.json"), Path(folder, "result.json")
        given.write_text(json.dumps(wanted), encoding="utf-8")
        done = subprocess.run([sys.executable, str(_CELL), str(given), str(result)], env=environment)
        if done.returncode:
            print(f"{cell.name}: failed with exit code {done.returncode}, see above", flush=True)
            return None
        return json.loads(result.read_text(encoding="utf-8"))


def told(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    first, second = (float(result["domains"][name]["perplexity"]) for name in DOMAINS)
    return f"perplexity {first:.2f}, of the second domain {second:.2f}"


def results(store: Store) -> dict[str, dict[str, Any]]:
    """Every measured cell with its excesses and what they are as shares of FLAP's at the same ratio."""
    cells = store.content["measurements"]
    found = {name: dict(cell) for name, cell in cells.items() if "error" not in cell}
    if DENSE not in found:
        return found
    for name, cell in found.items():
        flap = found.get(f"flap:{name.partition(':')[2]}")
        cell["excess"] = {domain: _excess(cell, found[DENSE], domain) for domain in cell["domains"]}
        if flap is not None:
            shares = {domain: _excess(flap, found[DENSE], domain) for domain in cell["domains"]}
            cell["share_of_flap_excess"] = {
                domain: cell["excess"][domain] / excess for domain, excess in shares.items() if excess > 0
            }
    return found


def _excess(cell: Mapping[str, Any], dense: Mapping[str, Any], domain: str) -> float:
    return cell["domains"][domain]["nll"] - dense["domains"][domain]["nll"]


def rows(store: Store, ratios: Sequence[float]) -> Iterator[list[str]]:
    found = results(store)
    names = [DENSE, *(f"{name}:{ratio:g}" for ratio in ratios for name in METHODS)]
    for name in names:
        if name not in found:
            continue
        cell, (method, _, ratio) = found[name], name.partition(":")
        label = METHODS[method].label if ratio else DENSE
        domains = [cell["domains"][key] for key in DOMAINS]
        shares = cell.get("share_of_flap_excess", {})
        pruning = cell.get("pruning", {})
        yield [
            label,
            f"{float(ratio):.0%}" if ratio else "–",
            *(perplexity(domain["perplexity"]) for domain in domains),
            *(f"{shares[key]:.2f}" if key in shares else "–" for key in DOMAINS),
            *(f"{domain['agreement']:.1%}" for domain in domains),
            *(f"{domain['kl']:.3f}" for domain in domains),
            f"{cell['parameters'] / 1e6:.1f}",
            *(f"{pruning[key]:,.0f}" if pruning else "–" for key in ("cpu_seconds", "wall_seconds")),
            f"{cell['peak_memory'] / 1e9:.1f}",
        ]


def perplexity(value: float | str) -> str:
    return f"{float(value):.2f}" if float(value) < 1000 else f"{float(value):,.0f}"


def page(store: Store, args: argparse.Namespace) -> str:
    """The Markdown file."""
    names = ("perplexity", "of FLAP's excess", "agreement", "KL")
    columns = ["method", "removed", *(column for name in names for column in (name, "2nd"))]
    columns += ["M parameters", "CPU s", "wall s", "peak GB"]
    return table(columns, list(rows(store, args.ratios)))


def write_results(store: Store, args: argparse.Namespace) -> None:
    store.write(results=results(store))
    args.output.with_suffix(".md").write_text(page(store, args), encoding="utf-8")


def header(args: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    """What all cells have in common; no paths."""
    return {
        "model": _named(args.model) | {"dtype": args.dtype},
        "protocol": {**protocol._asdict(), "seed": args.seed, "perplexity": PROTOCOL},
        "calibration": _named(args.calibration, "WikiText-2 (Hub), validation"),
        "evaluation": _named(args.evaluation, "WikiText-2 (Hub), test"),
        "second": _named(args.second, f"the language reference of Python {platform.python_version()}"),
    }


def _named(given: str | None, default: str = "") -> dict[str, str]:
    """A Hub id or the last part of a path, with a digest of the file or of the weights in the folder."""
    if given is None:
        return {"name": default}
    path = Path(given)
    if not path.exists():
        return {"name": given}
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return {"name": path.resolve().name, "sha256": digest.hexdigest()[:16]}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: SmolLM2-135M-Instruct out of a Python package)")
    parser.add_argument("--calibration", help="text, token ids or Hub data set (default: WikiText-2, validation)")
    parser.add_argument("--evaluation", help="text, token ids or Hub data set (default: WikiText-2, test)")
    parser.add_argument("--second", help="the second domain (default: the documentation of this Python)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5], help="shares of FFN channels")
    parser.add_argument("--only", nargs="+", metavar="METHOD:RATIO", help="the cells to measure, such as flap:0.5")
    parser.add_argument("--quick", action="store_true", help="a smaller protocol, in a file of its own")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="cells side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each cell")
    parser.add_argument("--multiple-of", type=int, default=1, help="round the kept width to a multiple of this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--device-map", help="as in transformers (default: CPU)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="where the default model is built")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); table and plot go beside it")
    parser.add_argument("--fresh", action="store_true", help="measure the chosen cells again")
    args = parser.parse_args(argv)
    args.ratios = sorted(set(args.ratios))
    if args.quick:
        args.output = args.output.with_stem(f"{args.output.stem}-quick")
    return args


def chosen(cells: Sequence[Cell], only: Sequence[str] | None) -> list[Cell]:
    """The cells that were asked for by name; the dense model always, since all others are measured against it."""
    if only is None:
        return list(cells)
    unknown = sorted(set(only) - {cell.name for cell in cells})
    if unknown:
        raise SystemExit(f"unknown cells: {', '.join(unknown)}; there are {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if cell.name in {DENSE, *only}]


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    protocol = QUICK if args.quick else FULL
    cells = chosen(list(plan(args, protocol)), args.only)
    args.model = args.model or str(plain_smollm2(args.cache))
    store = Store(args.output, header(args, protocol))
    failed = measure_all(cells, store, args, protocol)
    write_results(store, args)
    print(page(store, args))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
