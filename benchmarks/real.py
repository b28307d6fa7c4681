"""What pruning costs on a real language model, inside and outside the domain that it was calibrated on.

    python benchmarks/real.py --calibration valid.txt --evaluation test.txt --output benchmarks/results/smollm2.json
    python benchmarks/real.py --model FOLDER --output OUT.json --only flap:0.5 default:0.5

Without --model it is SmolLM2-135M-Instruct (see `_smollm2.py`), without --calibration and --evaluation WikiText-2 from
the Hub: validation to calibrate, test to evaluate. The second domain, which nothing is calibrated on, is the language
reference that every Python carries for `help()`, or --second.

Each cell (a method at a ratio) runs in a process of its own and is kept as soon as it ends. A cell that is in the
result file is not measured again while its settings and the protocol are the same; --fresh measures the chosen cells
again. Each keeps by which versions and code it was made. `--quick` is another protocol, in a file of its own.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _cells import Store
from _real_pages import curves, done, page, parted, quality_table, results, told
from _real_plan import DENSE, DOMAINS, Cell, Protocol, chosen_cells, chosen_protocol, every_cell
from _smollm2 import NAME, plain_smollm2

from optimum_otprune import OTPruner
from optimum_otprune.models.perplexity import PROTOCOL

CACHE = Path(__file__).resolve().parents[1] / ".bench"
_CELL = Path(__file__).with_name("_real_cell.py")
_TOKENS = "--samples × --seqlen tokens"


class Bench:
    """The cells of one result file.

    Args:
        args: The command line.
        protocol: How much is measured.
    """

    def __init__(self, args: argparse.Namespace, protocol: Protocol):
        self.args, self.protocol = args, protocol
        self.header = _header(args, protocol)
        if not args.fresh or args.only:
            refuse_other_protocol(args.output, self.header)
        self.store = Store(args.output, self.header, args.fresh and not args.only)
        self.processes: set[subprocess.Popen] = set()

    def measure(self, cells: Sequence[Cell], fresh: Sequence[str]) -> list[str]:
        """Measure what is not there, or is in `fresh`; the names of cells whose process failed."""
        waiting = [cell for cell in cells if cell.name in fresh or not self.store.holds(cell.name, cell.settings)]
        running: dict[Future, Cell] = {}
        failed: list[str] = []
        with ThreadPoolExecutor(self.args.workers) as workers, self._stopping():
            while waiting or running:
                failed += [cell.name for cell in waiting if cell.base in failed]
                waiting = [cell for cell in waiting if cell.name not in failed]
                blocked = {cell.name for cell in (*waiting, *running.values())}
                ready = [cell for cell in waiting if cell.base not in blocked]
                for cell in ready[: self.args.workers - len(running)]:
                    waiting.remove(cell)
                    print(f"{cell.name}: begins", flush=True)
                    running[workers.submit(self._run, cell)] = cell
                for ended in wait(running, return_when=FIRST_COMPLETED).done:
                    cell, result = running.pop(ended), ended.result()
                    if result is None:
                        failed.append(cell.name)
                    else:
                        self._keep(cell, result)
        return failed

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Whatever ends this early, SIGTERM included, ends the cells that run: nobody would read their results."""
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            yield
        except BaseException:
            for process in tuple(self.processes):
                process.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def _keep(self, cell: Cell, result: dict[str, Any]) -> None:
        if cell.base is not None and "error" not in result:  # it may have gone on with a model that was there
            result.setdefault("pruning", self.store.content["measurements"][cell.base]["pruning"])
        self.store.keep(cell.name, cell.settings, result)
        print(f"{cell.name}: {told(result)}", flush=True)
        self.write()

    def given(self, cell: Cell) -> dict[str, Any]:
        """What the process of a cell has to know."""
        args = self.args
        return {
            **cell.settings,
            "dense": cell.name == DENSE,
            "model": args.model,
            "loading": {"dtype": args.dtype, "device_map": args.device_map},
            "data": {"calibration": args.calibration, "evaluation": args.evaluation, "second": args.second},
            "windows": {"evaluation": self.protocol.windows, "second": self.protocol.second_windows},
            "pruned": self._folder(cell),
        }

    def _run(self, cell: Cell) -> dict[str, Any] | None:
        """Run one cell in a process of its own; None if that ends without a result, having said why."""
        threads = str(self.args.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with tempfile.TemporaryDirectory(prefix="otprune-real-") as folder:
            given, result = Path(folder, "cell.json"), Path(folder, "result.json")
            given.write_text(json.dumps(self.given(cell)), encoding="utf-8")
            process = subprocess.Popen([sys.executable, str(_CELL), str(given), str(result)], env=environment)
            self.processes.add(process)
            code = process.wait()
            self.processes.remove(process)
            if code:
                print(f"{cell.name}: failed with exit code {code}, see above", flush=True)
                return None
            return json.loads(result.read_text(encoding="utf-8"))

    def _folder(self, cell: Cell) -> str | None:
        """Where the pruned model is kept that recovery goes on with; None for cells that nothing is based on."""
        base = cell.base or cell.name
        if base not in {other.base for other in every_cell(self.args, self.protocol)}:
            return None
        made_of = json.dumps([self.header, base, cell.settings["options"]], sort_keys=True)
        key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        return str(self.args.cache / f"{base.replace(':', '-')}-{key}")

    def write(self) -> None:
        """Write result file, table and plot of what is there."""
        found, args = results(self.store.content["measurements"]), self.args
        titles = {
            name: getattr(args, f"{name}_name") or self.header[name]["name"] for name in ("calibration", *DOMAINS)
        }
        self.store.write(results=found, titles=titles)
        if DENSE not in self.store.content["measurements"]:
            return
        self._plot()
        output = self.args.output.with_suffix(".md")
        output.write_text(page(self.store.content, self.args.output.with_suffix(".png")), encoding="utf-8")

    def _plot(self) -> None:
        cells = self.store.content["measurements"]
        if find_spec("matplotlib") is None or len(done(cells)) < 2:
            return
        from _plots import domains_plot

        titles = [self.store.content["titles"][domain] for domain in DOMAINS]
        model = self.store.content["model"]["name"]
        domains_plot(curves(cells), titles, model, self.args.output.with_suffix(".png"))


def refuse_other_protocol(output: Path, header: Mapping[str, Any]) -> None:
    """Stop before cells that took hours are mixed with others, or lost."""
    if not output.exists():
        return
    found = json.loads(output.read_text(encoding="utf-8"))
    changed = [name for name, value in header.items() if found.get(name) != value]
    if changed:
        differences = "; ".join(f"{name}: {found.get(name)} there, {header[name]} now" for name in changed)
        raise SystemExit(
            f"{output.name} was measured otherwise ({differences}). Name another --output, or start over by --fresh "
            "without --only."
        )


def _header(args: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    """What all cells have in common; no paths."""
    numbers = {key: value for key, value in protocol._asdict().items() if key not in ("ratios", "left_out")}
    return {
        "model": _named(args.model) | {"dtype": args.dtype},
        "protocol": {**numbers, "seed": args.seed, "multiple_of": args.multiple_of, "perplexity": PROTOCOL},
        "calibration": _named(args.calibration, "WikiText-2, validation"),
        "evaluation": _named(args.evaluation, "WikiText-2, test"),
        "second": _named(args.second, f"Python {platform.python_version()}'s language reference"),
    }


def _named(given: str | None, default: str = "") -> dict[str, str]:
    """A Hub id or the last part of a path, with a digest of the file or of the weights in the folder."""
    if given is None:
        return {"name": default}
    path = Path(given)
    if not path.exists():
        return {"name": given}
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return {"name": path.resolve().name, "sha256": digest.hexdigest()[:16]}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"folder or Hub id (default: {NAME} out of a Python package)")
    parser.add_argument(
        "--calibration", help="text, token ids or Hub data set (default: WikiText-2 by its Hub id, validation)"
    )
    parser.add_argument("--evaluation", help="text, token ids or Hub data set (default: the same, test)")
    parser.add_argument("--second", help="the second domain (default: the language reference of this Python)")
    for part in ("calibration", "evaluation", "second"):
        parser.add_argument(f"--{part}-name", metavar="NAME", help="of that text in table and plot")
    parser.add_argument("--quick", action="store_true", help="a smaller protocol, in a file of its own")
    parser.add_argument("--ratios", type=float, nargs="+", help="shares of FFN channels (default: 0.2 0.3 0.5)")
    parser.add_argument("--samples", type=int, help=f"calibration: {_TOKENS} in all (default: 64)")
    parser.add_argument("--seqlen", type=int, help="tokens of a sample and of a window (default: 512)")
    parser.add_argument("--windows", type=int, help="windows of the evaluation text (default: 64)")
    parser.add_argument("--second-windows", type=int, help="windows of the second domain (default: 24)")
    parser.add_argument("--only", nargs="+", metavar="METHOD:RATIO", help="the cells to measure, such as flap:0.5")
    parser.add_argument("--fresh", action="store_true", help="measure the chosen cells again")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="cells side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each cell")
    parser.add_argument("--multiple-of", type=int, default=1, help="round the kept width to a multiple of this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--device-map", help="as in transformers (default: CPU)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the default model and of pruned ones")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); table and plot go beside it")
    args = parser.parse_args(argv)
    if args.quick:
        args.output = args.output.with_stem(f"{args.output.stem}-quick")
    return args


def can_be_measured(cell: Cell) -> bool:
    """Whether this version of the package can train a pruned model, where the cell wants that."""
    return cell.base is None or hasattr(OTPruner, "recover")


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Refuse to run beside another run that writes the same file, whose cells would be lost."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run writes {output.name}; use --workers for cells side by side") from None
        yield


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    protocol = chosen_protocol(args)
    cells = [cell for cell in chosen_cells(every_cell(args, protocol), args.only) if can_be_measured(cell)]
    args.model = args.model or str(plain_smollm2(args.cache))
    with alone(args.output):
        bench = Bench(args, protocol)
        asked = args.only or [cell.name for cell in cells]
        failed = bench.measure(cells, asked if args.fresh else ())
        bench.write()
    if DENSE in bench.store.content["measurements"]:
        for cells in parted(bench.store.content["measurements"]):
            if len(cells) > 1:
                print(f"\n{quality_table(cells)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
