"""`OTPruningConfig`: the configuration of pruning, names and numbers only."""

import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec

from optimum.configuration_utils import BaseConfig

from optimum_otprune.config.checks import check_option
from optimum_otprune.config.options import BUDGET_FIELDS, OPTIONS, OPTIONS_BY_NAME, VERSION_KEY, PruningOptions
from optimum_otprune.config.options_file import CONFIG_FILE, FOREIGN_KEYS, known_options, read_options_file
from optimum_otprune.config.presets import METHOD_FIELDS, QUALITY_FIELDS
from optimum_otprune.config.resolve import resolve, unused_numbers
from optimum_otprune.errors import ConfigurationError, OutputError, unknown_name, warn_user
from optimum_otprune.storage.files import replace_file
from optimum_otprune.storage.hub.options import HubOptions, filled, keywords
from optimum_otprune.storage.hub.push import PushResult, push_file
from optimum_otprune.storage.outputs import output_path
from optimum_otprune.storage.untrusted import visible, why_no_name

_P = ParamSpec("_P")


def _typed_as(init: Callable[_P, None]) -> Callable[[Callable[..., None]], Callable[_P, None]]:
    """Give a constructor that takes any name the signature of one that lists its fields."""

    def decorator(function: Callable[..., None]) -> Callable[_P, None]:
        return functools.wraps(init)(function)

    return decorator


class OTPruningConfig(PruningOptions, BaseConfig):
    """The options of pruning; saved beside the pruned model as `otprune_config.json`.

    Every option has a default that works. Fields that a method decides are None when given as None or left unset, and
    are filled in from the method, so a configuration always shows what will be done; a field stays None where the
    method has no use for it. A copy with other values is made by `config.replace(...)`, not by `dataclasses.replace`.

    Args:
        **options: The fields of `optimum_otprune.config.options.PruningOptions`; `otprune prune --help` says what each
            means.

    Raises:
        ConfigurationError: If a name is unknown, a value has the wrong type or is out of range, or an option
            contradicts another one or the method.

    Example:
        >>> config = OTPruningConfig(pruning_ratio=0.5)
        >>> config.method, config.selection, config.compensation
        ('otprune', 'obs', 'ridge')
    """

    CONFIG_NAME = CONFIG_FILE
    FULL_CONFIGURATION_FILE = CONFIG_FILE
    model_type = "otprune"  # a label in the file; never registered with AutoConfig

    @_typed_as(PruningOptions.__init__)
    def __init__(self, **options: Any):
        self._fill(options, asked=set(options))

    @classmethod
    def assembled(
        cls, values: Mapping[str, object], asked: Collection[str], saved: Collection[str] = ()
    ) -> "OTPruningConfig":
        """Make a configuration and drop values that nobody asked for where nothing reads them.

        Args:
            values: Values by name, as for the constructor.
            asked: Names of the values that were asked for; it is an error if nothing reads one of them.
            saved: Names of the values that come from a saved configuration; they may name functions and formats that
                are not registered here, since the configuration may not be used to prune again.

        Raises:
            ConfigurationError: If a name or value is wrong, as in the constructor.
        """
        config = cls.__new__(cls)
        config._fill(values, set(asked), saved)
        return config

    def _fill(self, options: Mapping[str, object], asked: set[str], saved: Collection[str] = ()) -> None:
        given = {name: value for name, value in options.items() if name not in FOREIGN_KEYS and name != VERSION_KEY}
        for name in given:
            if name not in OPTIONS_BY_NAME:
                raise ConfigurationError(unknown_name("option", name, OPTIONS_BY_NAME))
        # Nothing is forwarded: the base class drops unknown names and pops those of generation parameters in silence.
        BaseConfig.__init__(self)
        absent = _absent_budgets(given)
        values = {
            option.name: None
            if option.name in absent
            else check_option(option, given.get(option.name, option.default), option.name in saved)
            for option in OPTIONS
        }
        explicit = {name for name, value in given.items() if value is not None}
        values.update(resolve(values, explicit, explicit & asked, saved))
        for name, value in values.items():
            setattr(self, name, value)
        self.optimum_otprune_version = str(options.get(VERSION_KEY, version("optimum_otprune")))

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as `to_dict`: a file that names every value stays true when defaults change."""
        return self.to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OTPruningConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"OTPruningConfig {self.to_json_string()}"

    def replace(self, **changes: Any) -> "OTPruningConfig":
        """Return a copy with some options changed.

        A changed `method` or `quality` decides its fields again; a new ratio or target takes the old one's place; what
        a change leaves without a use is dropped.
        """
        values = _without_replaced_budget(self.to_dict(), changes)
        values.pop(VERSION_KEY)
        if changes.get("method", self.method) != self.method:
            values = {name: value for name, value in values.items() if name not in (*METHOD_FIELDS, *QUALITY_FIELDS)}
        elif changes.get("quality", self.quality) != self.quality:
            values = {name: value for name, value in values.items() if name not in QUALITY_FIELDS}
        return OTPruningConfig.assembled({**values, **changes}, asked=changes, saved=set(values) - set(changes))

    def fewest_options(self) -> dict[str, Any]:
        """Return the fewest options that make an equal configuration: method, ratio or target, and changed ones.

        Example:
            >>> OTPruningConfig(method="flap", pruning_ratio=0.5, seed=3).fewest_options()
            {'pruning_ratio': 0.5, 'method': 'flap', 'seed': 3}
        """
        given = {name: getattr(self, name) for name in OPTIONS_BY_NAME}
        anchors = {name: given[name] for name in ("method", *BUDGET_FIELDS) if given[name] is not None}
        default = OTPruningConfig(**anchors)
        fewest = {name: value for name, value in given.items() if name in anchors or value != getattr(default, name)}
        for name in [name for name in fewest if name not in anchors]:
            fewer = {other: value for other, value in fewest.items() if other != name}
            if self._is_made_by(fewer):
                fewest = fewer
        return fewest

    def _is_made_by(self, options: Mapping[str, Any]) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the constructor of this configuration has warned already
            try:
                made = OTPruningConfig(**options)
            except ConfigurationError:  # an option that only makes sense beside one that was left out
                return False
        return all(getattr(made, name) == getattr(self, name) for name in OPTIONS_BY_NAME)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from a dictionary, such as the content of a file.

        Options that this version does not know are left out with a warning if a newer version wrote them. Numbers that
        nothing reads are left out if the dictionary is a saved one, since they had no effect either when it was
        written.

        Args:
            config_dict: Values by name.
            **kwargs: Options that override those of the dictionary, checked like those of the constructor;
                `return_unused_kwargs=True` also returns the names that are no options.

        Raises:
            ConfigurationError: If a name or value is wrong, as in the constructor.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        if not isinstance(config_dict, Mapping):
            raise ConfigurationError(f"A configuration is an object of options by name, got {config_dict!r:.60}.")
        values = known_options(config_dict)
        overrides = {name: value for name, value in kwargs.items() if name in OPTIONS_BY_NAME}
        unused = {name: value for name, value in kwargs.items() if name not in OPTIONS_BY_NAME}
        config = cls(**values) if VERSION_KEY not in config_dict else cls._of_file(values)
        if overrides:
            config = config.replace(**overrides)
        return (config, unused) if return_unused else config

    @classmethod
    def _of_file(cls, values: Mapping[str, object]) -> "OTPruningConfig":
        config = cls.assembled(values, asked=METHOD_FIELDS, saved=values)
        unused = unused_numbers({name: getattr(config, name) for name in OPTIONS_BY_NAME})
        given = {name: values[name] for name in unused if values.get(name) is not None}
        unread = [f"`{name}={value!r}`" for name, value in given.items() if value != getattr(config, name)]
        if unread:
            warn_user(
                f"This configuration sets {', '.join(unread)}, which nothing reads with its other options. It is left "
                "out."
            )
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Read `otprune_config.json` from a folder, a repository of the Hub, or a file of any name.

        Args:
            pretrained_model_name_or_path: The folder, repository or file.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, and options that override the file's.

        Raises:
            ConfigurationError: If it cannot be found or read, or is not valid.
        """
        filled(HubOptions, {option: value for option, value in kwargs.items() if option in keywords(HubOptions)})
        name = os.path.expanduser(str(pretrained_model_name_or_path))
        reason = why_no_name(name)
        if reason is not None:
            raise ConfigurationError(
                f"No pruning configuration can be named {visible(name, 60)!r} ({reason}). Give a file, a folder that "
                f"holds {CONFIG_FILE!r}, or a Hub id of the form 'user/name'."
            )
        try:
            return super().from_pretrained(name, **kwargs)
        except OSError as error:
            raise ConfigurationError(
                f"No pruning configuration could be read from "
                f"{os.path.basename(str(pretrained_model_name_or_path))!r}: want a file {CONFIG_FILE!r} there, valid "
                f"JSON. ({str(error).strip().splitlines()[0]})"
            ) from error

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, object]:
        """Read a file, as the base class asks for it."""
        return read_options_file(Path(json_file))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `otprune_config.json` into a folder, and upload it if `push_to_hub` is set.

        Args:
            save_directory: The folder, which is made if it does not exist.
            push_to_hub: Whether to upload the file to the repository `repo_id` as well (default: the folder's name).
            **kwargs: The options of `push_to_hub`.

        Raises:
            OutputError: If the folder or the file in it cannot be written.
            HubError: If the upload fails; see `push_to_hub`.
        """
        folder = output_path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / CONFIG_FILE, self.to_json_string().encode())
        except OSError as error:
            raise OutputError(
                f"{CONFIG_FILE!r} could not be written into {folder.name!r}: {error.strerror}. Give a folder "
                "that can be written."
            ) from error
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.abspath(folder))), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> PushResult:
        """Put `otprune_config.json` into a repository, whose other files stay.

        Args:
            repo_id: `user/name`, or a name alone for the token's own user; made if it does not exist.
            **kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message`, `deadline`, as for
                `OTPruner.push_to_hub`.

        Raises:
            HubError: If the upload fails; the class says why.
        """
        kwargs.setdefault("commit_message", "Upload a pruning configuration")
        with tempfile.TemporaryDirectory(prefix="otprune-push-") as folder:
            self.save_pretrained(folder)
            return push_file(Path(folder) / CONFIG_FILE, repo_id, **kwargs)


def _absent_budgets(given: Mapping[str, object]) -> set[str]:
    """Return those of the ratio and the targets that another one replaces."""
    budgets = [name for name in BUDGET_FIELDS if given.get(name) is not None]
    if len(budgets) > 1:
        both = " and ".join(f"`{name}={given[name]!r}`" for name in budgets)
        raise ConfigurationError(f"{both} say in more than one way how much to prune. Give one of them.")
    return set(BUDGET_FIELDS) - set(budgets) if budgets else set()


def _without_replaced_budget(values: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    replaced = BUDGET_FIELDS if any(changes.get(name) is not None for name in BUDGET_FIELDS) else ()
    return {name: value for name, value in values.items() if name not in replaced}
