"""A configuration with its names looked up."""

import dataclasses
from collections.abc import Mapping

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options import OPTIONS_BY_NAME
from optimum_otprune.config.resolve import FUNCTION_FIELDS, check_replaced
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.functional.registry import GRADIENTS, Entry
from optimum_otprune.pruning.custom_functions import guarded


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A configuration with its names looked up, or replaced by functions of the user's own.

    Attributes:
        config: The configuration with its names and numbers.
        functions: The function to call, by field; fields that the method does not use are absent.
        custom_functions: Names of those that the user gave in place of the configuration's, by field.
    """

    config: OTPruningConfig
    functions: Mapping[str, Entry]
    custom_functions: Mapping[str, str]

    @classmethod
    def resolve(cls, config: OTPruningConfig, custom: Mapping[str, object]) -> "Recipe":
        """Look up every name of the configuration.

        Args:
            config: The configuration whose names are looked up.
            custom: Functions (or registered names) by field, in place of the configuration's.

        Raises:
            ConfigurationError: If a field takes no function, nothing would call the function, or nothing would read a
                number that was set.
            RegistryError: If a name is unknown.
        """
        functions = {
            field: registry.entry(name)
            for field, registry in FUNCTION_FIELDS.items()
            if (name := getattr(config, field)) is not None
        }
        for field, function in custom.items():
            if function is None:
                continue
            if field not in FUNCTION_FIELDS:
                raise ConfigurationError(f"`{field}` takes no function; {', '.join(FUNCTION_FIELDS)} do.")
            if field not in functions and not (field == "statistics" and "cost" in functions):
                raise ConfigurationError(f"`{field}` would be ignored: the method {config.method!r} does not use it.")
            functions[field] = FUNCTION_FIELDS[field].entry(function)
        replaced = {field: function for field, function in custom.items() if function is not None}
        check_replaced({name: getattr(config, name) for name in OPTIONS_BY_NAME}, replaced)
        guards = {field: guarded(field, entry) for field, entry in functions.items()}
        return cls(config, guards, {field: guards[field].name for field in replaced})

    @property
    def references(self) -> dict[str, Mapping[str, str]]:
        """What the functions were registered with as their publications, by field."""
        return {field: entry.citation for field, entry in self.functions.items() if entry.citation}

    @property
    def transports(self) -> bool:
        """Whether a transport problem is solved."""
        return "cost" in self.functions

    @property
    def weighs_errors(self) -> bool:
        """Whether reconstruction weighs errors by the second moments of the loss's gradients."""
        return bool(self.config.reconstruction_steps) and self.config.error_weighting == "gradient"

    @property
    def needs_moments(self) -> bool:
        """Whether anything reads those second moments."""
        return self.weighs_errors or self.config.allocation == "adaptive"

    @property
    def needs_gradients(self) -> bool:
        """Whether any function reads weight × gradient scores."""
        return any(GRADIENTS in entry.requires for entry in self.functions.values())
