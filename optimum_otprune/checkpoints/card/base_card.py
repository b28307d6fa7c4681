"""License and language from a model card, as plain checked strings; the only door to `yaml`."""

import logging
import re
from collections.abc import Mapping

import yaml

logger = logging.getLogger(__name__)

# The identifiers that the Hub accepts (https://huggingface.co/docs/hub/repositories-licenses).
_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0
    c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0
    cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m
    deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl
    postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MAX_CHARACTERS = 100_000  # of a card that are searched for front matter, far more than any has
_MAX_LANGUAGES = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")
_LINK = re.compile(r"https://[A-Za-z0-9._~:/?#@!$&*+,;=%-]{1,300}|[A-Za-z0-9._-]{1,100}")
_LANGUAGE = re.compile(r"[a-z]{2,20}(-[A-Za-z0-9]{1,8})*")


def read_base_card(text: str) -> dict[str, object]:
    r"""Return what the front matter of a model card says about license and language.

    From a card without front matter, or with one that is no YAML, nothing is returned; the latter is logged.

    Args:
        text: The text of a README.md.

    Returns:
        The checked entries, as `checked_base_card` returns them.

    Example:
        >>> read_base_card("---\nlicense: llama3.2\nlanguage: [en, de]\ntags: [x]\n---\n# Model")
        {'license': 'llama3.2', 'language': ['en', 'de']}
    """
    found = _FRONT_MATTER.match(text[:_MAX_CHARACTERS])
    if found is None:
        return {}
    try:
        # The base loader makes strings only: `no` is Norwegian, and nothing is executed.
        values = yaml.load(found[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        logger.warning(
            "The base model's card has no readable metadata (%s); no license is copied.", type(error).__name__
        )
        return {}
    return checked_base_card(values) if isinstance(values, dict) else {}


def checked_base_card(values: Mapping[str, object]) -> dict[str, object]:
    """Return the entries that are what they should be: `license`, `license_name`, `license_link`, `language`.

    Args:
        values: The metadata of a card, or the copy of it in a report.

    Returns:
        A mapping of strings, with a list of strings for `language`; what is missing or malformed is left out. A
        license that the Hub does not list becomes `other` with its identifier as `license_name`.
    """
    checked: dict[str, object] = {}
    license_id = _only(values.get("license"))
    if license_id is not None and _NAME.fullmatch(license_id):
        known = license_id.lower() in LICENSES
        checked["license"] = license_id.lower() if known else "other"
        if not known:
            checked["license_name"] = license_id
        for name, pattern in (("license_name", _NAME), ("license_link", _LINK)):
            value = values.get(name)
            if isinstance(value, str) and pattern.fullmatch(value):
                checked[name] = value
    languages = values.get("language")
    if isinstance(languages, str):
        languages = [languages]
    given = languages if isinstance(languages, list) else []
    valid = [entry for entry in given[:_MAX_LANGUAGES] if isinstance(entry, str) and _LANGUAGE.fullmatch(entry)]
    return checked | ({"language": valid} if valid else {})


def _only(value: object) -> str | None:
    """Return a string, or the only one of a list; None if a list has several, since none can be chosen."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else None
