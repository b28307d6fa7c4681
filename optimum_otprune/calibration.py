"""From data of any kind to token ids `(num_samples, seqlen)`, seeded. The only door to `datasets`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.errors import CalibrationDataError

TokenSource: TypeAlias = str | os.PathLike | Sequence[str] | datasets.Dataset | Tensor | np.ndarray

DEFAULT_SEQLEN = 2048
_TOKEN_SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")
_NO_TOKENIZER = (
    "This model has no tokenizer, so text cannot be used. Give token ids of shape (num_samples, seqlen), or a "
    "tokenizer."
)
_JSON_SUFFIXES = (".jsonl", ".json")
_TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw", ".tokens", *_JSON_SUFFIXES)


class TokenData(NamedTuple):
    """Token ids and where they came from.

    Attributes:
        tokens: LongTensor `(num_samples, seqlen)`.
        source: For reports: a Hub id, or what kind of data it was; never a local path.
    """

    tokens: Tensor
    source: str

    def describe(self) -> dict[str, Any]:
        """Entries for a report."""
        num_samples, seqlen = self.tokens.shape
        return {"data": self.source, "num_samples": num_samples, "seqlen": seqlen, "num_tokens": self.tokens.numel()}

    def count_shared_with(self, other: "TokenData") -> int:
        """Return how many of these samples are, token by token, samples of the other too.

        Example:
            >>> TokenData(torch.tensor([[1, 2], [3, 4]]), "").count_shared_with(TokenData(torch.tensor([[3, 4]]), ""))
            1
        """
        others = {sample.numpy().tobytes() for sample in other.tokens.long().cpu()}
        return sum(sample.numpy().tobytes() in others for sample in self.tokens.long().cpu())


class ExpectedSamples(NamedTuple):
    """How many calibration tokens there will be.

    Attributes:
        num_samples: Samples; of text at most so many.
        seqlen: Tokens of each.
        source: As in `TokenData`.
        is_exact: Whether that was read, rather than concluded from the configuration.
    """

    num_samples: int
    seqlen: int
    source: str
    is_exact: bool


class ModelLimits(NamedTuple):
    """What a model accepts.

    Attributes:
        vocab_size: Ids are below this.
        max_positions: Longest sequence, or None.
    """

    vocab_size: int
    max_positions: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelLimits":
        """Those of a model, read from its embeddings and configuration."""
        embeddings = model.get_input_embeddings()
        return cls(embeddings.num_embeddings, getattr(model.config, "max_position_embeddings", None))  # type: ignore

    def seqlen(self, config: OTPruningConfig) -> int:
        """Tokens per window: the configuration's, or 2 048 or the model's positions, whichever is less."""
        if config.seqlen is not None:
            return config.seqlen
        return DEFAULT_SEQLEN if self.max_positions is None else min(DEFAULT_SEQLEN, self.max_positions)


def calibration_tokens(
    data: TokenSource | None,
    config: OTPruningConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: ModelLimits,
) -> TokenData:
    """Return the calibration samples: all rows of a token matrix, else `num_samples` windows without replacement.

    Args:
        data: None for the configuration's dataset, a Hub dataset name, a file (text, JSON lines, or token ids as .npy,
            .safetensors or .pt) or a folder of such or of a dataset, a list of strings, a `datasets.Dataset`, or
            token ids
            `(num_samples, seqlen)` or as one stream.
        config: Names dataset, number and length of samples, and the seed.
        tokenizer: Needed for text only.
        limits: Of the model.

    Raises:
        CalibrationDataError: If the data cannot be found or used; the message says why.
    """
    tokens, source = _tokens(data, config, config.calibration_split, tokenizer, limits)
    if tokens.ndim == 1:
        windows = _windows(tokens, limits.seqlen(config))
        generator = torch.Generator().manual_seed(config.seed)
        chosen = torch.randperm(len(windows), generator=generator)[: config.num_samples].sort().values
        tokens = windows[chosen]
    return TokenData(_checked(tokens, limits), source)


def expected_samples(
    data: TokenSource | None, config: OTPruningConfig, limits: ModelLimits, has_tokenizer: bool | None
) -> ExpectedSamples:
    """Say what `calibration_tokens` would return, without downloading or tokenizing anything; token ids are read.

    Args:
        data: As for `calibration_tokens`.
        config: Names dataset, number and length of samples.
        limits: Of the model.
        has_tokenizer: None if that is not known.

    Raises:
        CalibrationDataError: If the data are known to be of no use: not there, of the wrong kind, or too long.
    """
    if isinstance(data, (np.ndarray, Tensor)) or _is_token_file(data):
        read = calibration_tokens(data, config, None, limits)
        num_samples, seqlen = read.tokens.shape
        return ExpectedSamples(num_samples, seqlen, read.source, is_exact=True)
    if data is None:
        source = config.dataset
    elif isinstance(data, (str, os.PathLike)):
        source = _kind_of_name(data)
    else:
        source = _texts(data, config, config.calibration_split)[1]
    if has_tokenizer is False:
        raise CalibrationDataError(_NO_TOKENIZER)
    seqlen = limits.seqlen(config)
    _check_seqlen(seqlen, limits)
    return ExpectedSamples(config.num_samples, seqlen, source, is_exact=False)


def evaluation_tokens(
    data: TokenSource | None,
    config: OTPruningConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: ModelLimits,
    max_windows: int | None = None,
) -> TokenData:
    """Return consecutive windows without overlap, the tail dropped; rows of a token matrix are windows as they are.

    Args:
        data: As for `calibration_tokens`.
        config: Names dataset and window length.
        tokenizer: Needed for text only.
        limits: Of the model.
        max_windows: Only the first so many.

    Raises:
        CalibrationDataError: If the data cannot be found or used.
    """
    tokens, source = _tokens(data, config, config.evaluation_split, tokenizer, limits)
    windows = _windows(tokens, limits.seqlen(config)) if tokens.ndim == 1 else tokens
    return TokenData(_checked(windows[:max_windows], limits), source)


def _windows(stream: Tensor, seqlen: int) -> Tensor:
    count = len(stream) // seqlen
    if count == 0:
        raise CalibrationDataError(
            f"The data hold {len(stream)} tokens, fewer than one window of {seqlen}. Give more text, or set a "
            "smaller `seqlen`."
        )
    return stream[: count * seqlen].view(count, seqlen)


def _checked(tokens: Tensor, limits: ModelLimits) -> Tensor:
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise CalibrationDataError(
            f"Token ids have shape {tuple(tokens.shape)}; want (num_samples, seqlen), at least one sample."
        )
    if tokens.shape[1] < 2:
        raise CalibrationDataError("Samples of one token predict nothing: give sequences of at least 2 tokens.")
    _check_seqlen(tokens.shape[1], limits)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= limits.vocab_size:
        raise CalibrationDataError(
            f"Token ids go from {low} to {high}, but the model's vocabulary has {limits.vocab_size} (ids 0 to "
            f"{limits.vocab_size - 1}). They were made with another tokenizer."
        )
    return tokens.long()


def _check_seqlen(seqlen: int, limits: ModelLimits) -> None:
    if limits.max_positions is not None and seqlen > limits.max_positions:
        raise CalibrationDataError(
            f"Sequences have {seqlen} tokens, but the model has only {limits.max_positions} positions. Cut them, or "
            f"set `seqlen` to at most {limits.max_positions}."
        )


def _is_token_file(data: object) -> bool:
    return isinstance(data, (str, os.PathLike)) and Path(data).suffix in _TOKEN_SUFFIXES


def _tokens(
    data: TokenSource | None,
    config: OTPruningConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: ModelLimits,
) -> tuple[Tensor, str]:
    """Token ids, a matrix or a stream, and the name of their source."""
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    if isinstance(data, Tensor):
        return _checked_ids(data), "token ids"
    if _is_token_file(data):
        return _checked_ids(_read_tokens(_existing(Path(data)))), "token ids"  # type: ignore[arg-type]
    texts, source = _texts(data, config, split)
    if tokenizer is None:
        raise CalibrationDataError(_NO_TOKENIZER)
    text = "\n\n".join(texts)
    if not text.strip():
        raise CalibrationDataError("The data hold no text: every document is empty. Give at least one window of text.")
    stream = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    return stream, source


def _checked_ids(tokens: Tensor) -> Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise CalibrationDataError(f"Token ids are {tokens.dtype}; want integers.")
    if tokens.ndim not in (1, 2) or tokens.numel() == 0:
        raise CalibrationDataError(
            f"Token ids have shape {tuple(tokens.shape)}; want (num_samples, seqlen), or one stream of ids, not empty."
        )
    return tokens


def _existing(path: Path) -> Path:
    if not path.exists():
        raise CalibrationDataError(f"The file {path.name!r} does not exist. Check the path of the calibration data.")
    return path


def _read_tokens(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise CalibrationDataError(
            f"{path.name} cannot be read as token ids ({type(error).__name__}: {str(error).splitlines()[0]}). Save "
            "one integer array or tensor; pickled objects are refused."
        ) from error
    if isinstance(loaded, dict):
        if "input_ids" not in loaded and len(loaded) != 1:
            raise CalibrationDataError(
                f"{path.name} holds the tensors {', '.join(sorted(loaded))}; want one, or one named 'input_ids'."
            )
        loaded = loaded["input_ids"] if "input_ids" in loaded else next(iter(loaded.values()))
    if not isinstance(loaded, Tensor):
        raise CalibrationDataError(f"{path.name} holds a {type(loaded).__name__}; want one tensor of token ids.")
    return loaded


def _texts(data: Any, config: OTPruningConfig, split: str) -> tuple[list[str], str]:
    if data is None:
        return _hub_texts(config.dataset, config.dataset_config, split, config.text_column), config.dataset
    if isinstance(data, datasets.Dataset):
        return _column(data, config.text_column), "a datasets.Dataset"
    if isinstance(data, (str, os.PathLike)):
        return _named_texts(data, config, split)
    if isinstance(data, (list, tuple)):
        if not data:
            raise CalibrationDataError("The calibration data are an empty list. Give at least one text.")
        wrong = next((entry for entry in data if not isinstance(entry, str)), None)
        if wrong is not None:
            raise CalibrationDataError(f"The list of texts holds a {type(wrong).__name__}; want strings only.")
        return list(data), "texts"
    raise CalibrationDataError(
        f"Data of type {type(data).__name__} are not understood. Give a dataset name, a file, a list of strings, a "
        "datasets.Dataset or a tensor of token ids."
    )


def _named_texts(data: str | os.PathLike, config: OTPruningConfig, split: str) -> tuple[list[str], str]:
    source, path = _kind_of_name(data), Path(data)
    if path.is_dir():
        return _folder_texts(path, config, split), source
    if path.is_file():
        return _file_texts(path, config.text_column), source
    same = data == config.dataset
    return _hub_texts(str(data), config.dataset_config if same else None, split, config.text_column), source


def _kind_of_name(data: str | os.PathLike) -> str:
    """What a name is, for reports: something local, or a dataset of the Hub, which is named."""
    path = Path(data)
    if path.exists():
        return "local folder" if path.is_dir() else "local file"
    looks_local = path.is_absolute() or str(data).startswith((".", "~")) or path.suffix in _TEXT_SUFFIXES
    if looks_local or not isinstance(data, str) or data.count("/") > 1:
        raise CalibrationDataError(f"{path.name!r} is neither a file nor a folder. Check the path of the data.")
    return data


def _file_texts(path: Path, text_column: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationDataError(
            f"{path.name} is not UTF-8 text ({error.reason}). Convert it, or give token ids."
        ) from error
    if path.suffix not in _JSON_SUFFIXES:
        return [text]
    texts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationDataError(
                f"Line {number} of {path.name} is not JSON ({error}). Want one object a line."
            ) from error
        entry = row.get(text_column) if isinstance(row, dict) else row
        if not isinstance(entry, str):
            raise CalibrationDataError(
                f"Line {number} of {path.name} has no text under {text_column!r}. Set `text_column` to the right key."
            )
        texts.append(entry)
    return texts


def _folder_texts(path: Path, config: OTPruningConfig, split: str) -> list[str]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        return _column(
            _split(loaded, split) if isinstance(loaded, datasets.DatasetDict) else loaded, config.text_column
        )
    files = sorted(file for file in path.iterdir() if file.suffix in _TEXT_SUFFIXES and file.name != "README.md")
    if not files:
        raise CalibrationDataError(
            f"The folder {path.name!r} holds no text files ({', '.join(_TEXT_SUFFIXES)}) and no saved dataset."
        )
    return [text for file in files for text in _file_texts(file, config.text_column)]


def _hub_texts(name: str, dataset_config: str | None, split: str, text_column: str) -> list[str]:
    try:
        dataset = datasets.load_dataset(name, dataset_config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationDataError(
            f"The dataset {name!r} (split {split!r}) could not be loaded: it does not exist, or the Hub cannot be "
            "reached "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Offline, give a local text file or token ids "
            "as data."
        ) from error
    return _column(dataset, text_column)


def _split(loaded: datasets.DatasetDict, split: str) -> datasets.Dataset:
    if split not in loaded:
        raise CalibrationDataError(f"The dataset has no split {split!r}; it has {', '.join(loaded)}.")
    return loaded[split]


def _column(dataset: datasets.Dataset, text_column: str) -> list[str]:
    if text_column not in dataset.column_names:
        raise CalibrationDataError(
            f"The dataset has no column {text_column!r}; it has {', '.join(dataset.column_names)}. Set `text_column`."
        )
    return [str(text) for text in dataset[text_column]]
