"""`quantize_model`: a pruned folder with quantized weights, loaded again and compared before it is called done."""

import dataclasses
import gc
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.checkpoints.card.folder import folder_card
from optimum_otprune.checkpoints.check_loading import check_loading_options
from optimum_otprune.checkpoints.load import load_checkpoint, load_skeleton
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.config.options_file import CONFIG_FILE
from optimum_otprune.errors import ConfigurationError, IntegrityError, NumericalError, UnsupportedModelError
from optimum_otprune.functional.distillation import Divergence, divergence
from optimum_otprune.models.distributed import check_launch, check_single
from optimum_otprune.models.inputs import model_inputs, vocabulary_size
from optimum_otprune.models.modeling_code import MODELING_FILE
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.quantizers import (
    QuantizedLayer,
    Scheme,
    check_fits,
    library_version,
    quantization_config,
    scheme_named,
)
from optimum_otprune.pruning.calibration.data import ModelLimits
from optimum_otprune.pruning.calibration.self_calibration import why_it_cannot_write, written_samples
from optimum_otprune.pruning.quantization_report import QuantizationReport
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.storage.files import writing_folder
from optimum_otprune.storage.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    FileEntry,
    check_plain,
    is_weights_file,
    verify_folder,
    write_manifest,
)
from optimum_otprune.storage.outputs import check_output_folder, noted_places, output_path
from optimum_otprune.storage.untrusted import read_json

_WINDOWS, _SEQLEN = 4, 64  # of what the model writes to be compared on
_SAME = 1e-2  # relative distance of logits that only rounding explains
_BROKEN = 3.0  # nats per token: a text of which nothing is left has more, a coarse scheme has less than one
_CONFIG = "config.json"
_MADE_ANEW = (_CONFIG, REPORT_FILE, CARD_FILE, MANIFEST_FILE)


class _Before(NamedTuple):
    """Token ids, and what the model before quantization makes of them.

    Attributes:
        tokens: LongTensor `(windows, seqlen)`.
        logits: `(windows, seqlen, vocab_size)`, float32 on the CPU.
        predicts_next: Whether the logits are predictions of the next token.
        dtype: The data type of the weights.
    """

    tokens: Tensor
    logits: Tensor
    predicts_next: bool
    dtype: torch.dtype


def quantize_model(
    model: str | os.PathLike,
    output: str | os.PathLike,
    scheme: str = "int8",
    *,
    overwrite: bool = False,
    **loading: Unpack[LoadingOptions],
) -> QuantizationReport:
    """Write a pruned folder anew with quantized weights, which plain transformers loads beside the scheme's library.

    The new folder has the report, a card that names the quantization, and a manifest of its own. It is loaded again
    and compared with what was quantized, and with the model before, on text that the model writes, before it appears.

    Args:
        model: A folder that `save_pretrained` or `otprune prune` wrote; it stays as it is.
        output: The folder to write; it must not exist, or be empty, unless `overwrite`.
        scheme: `"int8"` or `"int4"` (torchao), or `"nf4"` (bitsandbytes).
        overwrite: Whether to replace a folder that holds a saved model and nothing else.
        **loading: Options of loading, such as `dtype` (of the weights that stay as they are), `device_map` and
            `trust_remote_code`.

    Returns:
        What was done, and how far it moved the predictions; the folder's report has it, too.

    Raises:
        ConfigurationError: If there is no such scheme, or an option of loading is unknown or wrong.
        MissingExtraError: If the scheme's library is not installed.
        UnsupportedModelError: If a width does not fit the scheme, the folder is quantized already, or it holds no
            pruned model; nothing is loaded then.
        IntegrityError: If the folder is not as it was saved, or the new one gives other outputs once it is loaded
            again, as with a library that cannot save what it made.
        NumericalError: If nothing is left of the model's predictions.
        OutputError: If the output cannot be written. Nothing half-written stays, whatever the error.
    """
    check_launch()
    check_single("`quantize_model`", "Start one.")
    chosen, options = scheme_named(scheme), check_loading_options(loading)
    _refuse_unread(options)
    source, target = Path(os.path.expanduser(os.fspath(model))), output_path(output)
    places = noted_places(source_model=source, offload_folder=options["offload_folder"])
    check_output_folder(target, overwrite, places=places)
    report = _pruned_report(source)
    version = library_version(chosen)
    skeleton = load_skeleton(os.fspath(source), options)
    layers = check_fits(skeleton.model, chosen, set(report.widths))
    listed = verify_folder(source)
    check_plain(source, listed)
    probe = _probe(os.fspath(source), options)
    size = _weight_files(listed)
    with writing_folder(target, overwrite, size, places) as partial:
        compared = _write(source, partial, chosen, probe, options, listed)
        result = _result(chosen, f"{chosen.library} {version}", layers, probe, (size, _saved_bytes(partial)), compared)
        _complete(partial, dataclasses.replace(report, quantization=result), target.name)
    return result


def _refuse_unread(options: LoadingOptions) -> None:
    """Raise an error for options of loading that would be ignored: a folder of this machine is always verified."""
    for name in ("load_in_8bit", "revision"):
        if options.get(name):
            raise ConfigurationError(f"`{name}` would be ignored: a folder is quantized by `scheme`. Leave it out.")


def _pruned_report(folder: Path) -> PruningReport:
    if not folder.is_dir() or not all((folder / name).is_file() for name in (CONFIG_FILE, REPORT_FILE)):
        raise UnsupportedModelError(
            f"{folder.name[:80]!r} is no folder of a pruned model: want one that `otprune prune` wrote, with "
            f"{REPORT_FILE}. A dense model is quantized by transformers alone (`quantization_config=`)."
        )
    report = PruningReport.load(folder / REPORT_FILE)
    if report.quantization is not None:
        raise UnsupportedModelError(
            f"{folder.name!r} is quantized already ({report.quantization.scheme}). Give the folder that it was made "
            "from."
        )
    return report


def _probe(source: str, options: LoadingOptions) -> _Before:
    """Load the model as it is, let it write some text, and note what it makes of it."""
    model = load_checkpoint(source, options).model.eval()
    seqlen = min(_SEQLEN, ModelLimits.of(model).max_positions or _SEQLEN)
    if why_it_cannot_write(model, _WINDOWS, seqlen, 0) is None:
        lengths = torch.empty(0, seqlen, dtype=torch.long)
        passes = Passes(PrunableModel(model, []), lengths, PassSettings(progress=False))
        tokens = written_samples(passes, _WINDOWS, seed=0)
    else:
        shape = (_WINDOWS, seqlen)
        tokens = torch.randint(vocabulary_size(model), shape, generator=torch.Generator().manual_seed(0))
    predicts_next = not model.config.is_encoder_decoder and model.get_output_embeddings() is not None
    return _Before(tokens, _logits(model, tokens), predicts_next, model.dtype)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the first output of a model, `(windows, …)`, float32 on the CPU, a window at a time."""
    model.eval()
    return torch.cat([model(**model_inputs(model, window[None]))[0].float().cpu() for window in tokens])


def _write(
    source: Path,
    folder: Path,
    scheme: Scheme,
    probe: _Before,
    options: LoadingOptions,
    listed: Mapping[str, FileEntry],
) -> list[Divergence] | None:
    """Write all files but report, card and manifest, and check them; return how far the predictions moved."""
    quantization = quantization_config(scheme, probe.dtype)
    # It is saved before it runs: bitsandbytes repacks weights for a CPU when they are first used, and loses some.
    quantized = load_checkpoint(os.fspath(source), options, quantization=quantization).model
    quantized.save_pretrained(folder, save_original_format=MODELING_FILE not in listed)
    for name in listed:
        if name not in _MADE_ANEW and not is_weights_file(name):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    saved, given = read_json(folder / _CONFIG), read_json(source / _CONFIG)
    dtypes = {name: saved["dtype"] for name in ("dtype", "torch_dtype") if name in given}
    config = {**given, **dtypes, "quantization_config": saved["quantization_config"]}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / _CONFIG).write_text(f"{text}\n", encoding="utf-8")
    logits = _logits(quantized, probe.tokens)
    del quantized
    gc.collect()
    again = load_checkpoint(os.fspath(folder), options, may_be_quantized=True).model
    _check_same(logits, _logits(again, probe.tokens), scheme)
    return _moved(logits, probe, scheme)


def _check_same(logits: Tensor, again: Tensor, scheme: Scheme) -> None:
    distance = float((again - logits).norm() / logits.norm().clamp(min=torch.finfo(torch.float32).tiny))
    if not distance <= _SAME:
        raise IntegrityError(
            f"{scheme.library} does not load what it saved: the outputs of the folder differ from those of the "
            f"quantized model by {distance:.2%}. Nothing was kept. Use another scheme, or another version of "
            f"{scheme.library}."
        )


def _moved(logits: Tensor, probe: _Before, scheme: Scheme) -> list[Divergence] | None:
    """Return how far each window's predictions moved; None where the model does not predict the next token."""
    if not logits.isfinite().all():
        raise NumericalError(
            f"The model that {scheme.library} quantized by `{scheme.name}` gives NaN or infinite outputs. Nothing was "
            "kept. Use another scheme, or another `dtype`."
        )
    if not probe.predicts_next:
        return None
    found = [
        divergence(before[:-1], after[:-1], window[1:])
        for before, after, window in zip(probe.logits, logits, probe.tokens)
    ]
    kl = sum(part.kl for part in found) / _predicted(probe)
    if not kl <= _BROKEN:
        raise NumericalError(
            f"The model that {scheme.library} quantized by `{scheme.name}` has lost its predictions (KL divergence "
            f"{kl:.2f} nats per token from those before). Nothing was kept. Use another scheme, or another version."
        )
    return found


def _predicted(probe: _Before) -> int:
    return len(probe.tokens) * (probe.tokens.shape[1] - 1)


def _result(
    scheme: Scheme,
    library: str,
    layers: list[QuantizedLayer],
    probe: _Before,
    sizes: tuple[int, int],
    compared: list[Divergence] | None,
) -> QuantizationReport:
    count = _predicted(probe)
    sums = None if compared is None else torch.tensor(compared, dtype=torch.float64).sum(0) / count
    moved = None if sums is None else Divergence(*sums.tolist())
    return QuantizationReport(
        scheme=scheme.name,
        library=library,
        words=scheme.words,
        quantized_parameters=sum(layer.inputs * layer.outputs for layer in layers),
        dtype=str(probe.dtype).removeprefix("torch."),
        size_before=sizes[0],
        size_after=sizes[1],
        num_tokens=count,
        kl=None if moved is None else max(moved.kl, 0.0),
        agreement=None if moved is None else moved.agreement,
        perplexity_before=None if moved is None else float(torch.tensor(moved.teacher_nll).exp()),
        perplexity_after=None if moved is None else float(torch.tensor(moved.nll).exp()),
    )


def _complete(folder: Path, report: PruningReport, name: str) -> None:
    report.save(folder / REPORT_FILE)
    (folder / CARD_FILE).write_text(folder_card(folder, name, report=report), encoding="utf-8")
    write_manifest(folder)


def _weight_files(listed: Mapping[str, FileEntry]) -> int:
    return sum(entry.size for name, entry in listed.items() if is_weights_file(name))


def _saved_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if is_weights_file(file.name))
