"""Registered functions with parameters of their own, and those that other packages register."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import RegistryError
from optimum_otprune.functional.importance import ChannelStatistics, channel_importance, importances
from optimum_otprune.functional.marginals import MarginalInputs, distributions, marginal
from optimum_otprune.functional.parameters import as_text
from optimum_otprune.functional.registry import Registry
from optimum_otprune.functional.solvers import solve_transport, solvers
from tests.functional.helpers import make_ffn, normal

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "optimum_otprune" / "commands" / "demo_model"


@pytest.fixture
def registry() -> Registry:
    found: Registry = Registry("test function")

    @found.register("scaled")
    def scaled(inputs, *, power: float = 0.5, steps: int = 3, center: bool = False, mode: str = "mean"):
        """Everything that it was given, as it came. And nothing more.

        A second paragraph.
        """
        return inputs, power, steps, center, mode

    @found.register("plain")
    def plain(inputs):
        return inputs

    return found


@pytest.mark.parametrize(
    ("given", "name", "values"),
    [
        ("scaled", "scaled:power=0.5,steps=3,center=false,mode=mean", (0.5, 3, False, "mean")),
        ("scaled:power=2", "scaled:power=2.0,steps=3,center=false,mode=mean", (2.0, 3, False, "mean")),
        (
            " scaled : mode = a=b:c, center=TRUE ,steps=-4",
            "scaled:power=0.5,steps=-4,center=true,mode=a=b:c",
            (0.5, -4, True, "a=b:c"),
        ),
        ({"name": "scaled"}, "scaled:power=0.5,steps=3,center=false,mode=mean", (0.5, 3, False, "mean")),
        (
            {"name": "scaled", "center": True, "power": np.float64(1e-7), "steps": np.int32(7)},
            "scaled:power=1e-07,steps=7,center=true,mode=mean",
            (1e-7, 7, True, "mean"),
        ),
        ({"name": "scaled", "mode": ""}, "scaled:power=0.5,steps=3,center=false,mode=", (0.5, 3, False, "")),
    ],
)
def test_parameters_are_set_by_a_text_or_a_mapping_and_written_in_one_way(registry, given, name, values):
    entry = registry.entry(given)
    assert (entry.name, entry.function("x")) == (name, ("x", *values))
    assert [type(value) for value in entry.function("x")[1:]] == [float, int, bool, str]
    assert registry.entry(name).name == name
    assert registry[given]("x") == ("x", *values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "scaled:pwer=1",
            r"Unknown parameter of the test function 'scaled': 'pwer'\. Did you mean 'power'\? Known: po",
        ),
        ("scaled:power=high", "parameter 'power' of the test function 'scaled' is 'high'; want a finite number"),
        ("scaled:power=nan", "is 'nan'; want a finite number"),
        ("scaled:power=1e999", "is '1e999'; want a finite number"),
        ("scaled:steps=1.5", "parameter 'steps' .* is '1.5'; want an integer"),
        ("scaled:center=1", "parameter 'center' .* is '1'; want true or false"),
        ("scaled:power", "'scaled:power' is malformed at 'power'; want a name, or 'name:parameter=value'"),
        ("scaled:", "is malformed at ''"),
        ("scaled:=1", "is malformed at '=1'"),
        ("scaled:power=1,power=2", "sets 'power' twice. Give one value"),
        ("scaled:mode=a\nb", "want visible text without commas"),
        ("plain:power=1", "'power' cannot be set: the test function 'plain' has none. Give its name alone"),
        ("scled:power=1", "Unknown test function 'scled'. Did you mean 'scaled'"),
        ({"power": 1}, "names no function; want {'name': 'wanda'"),
        ({"name": "scaled:power=1"}, "names no function"),
        ({"name": "scaled", 1: 2}, "names no function"),
        ({"name": "scaled", "power": None}, "parameter 'power' of 'scaled' is None; want a number, true or false, or"),
        ({"name": "scaled", "mode": "a,b"}, "'mode' of 'scaled' is 'a,b'; want a number, .* without commas"),
        ({"name": "scaled", "steps": 10**5000}, "'steps' of 'scaled' is 1000"),
        ({"name": "scaled", "steps": 2.0}, "is '2.0'; want an integer"),
        (f"scaled:steps={'9' * 400}", "'steps' of the test function 'scaled' is '9+; want an integer of at most 63"),
        (f"scaled:steps={2**63}", "is '9223372036854775808'; want an integer of at most 63 bits"),
        ({"name": "scaled", "power": True}, "is 'true'; want a finite number"),
        (3, "3 is no test function; want a registered name, or a function"),
    ],
)
def test_a_parameter_that_cannot_be_set_is_one_error(registry, given, message):
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        with pytest.raises(RegistryError, match=message):
            registry.entry(given)
    finally:
        sys.set_int_max_str_digits(limit)


def no_default(inputs, *, power: float): ...
def no_type(inputs, *, power=0.5): ...
def wrong_type(inputs, *, power: list = []): ...  # noqa: B006
def wrong_default(inputs, *, power: float = "high"): ...
def truth_for_number(inputs, *, power: int = True): ...
def called_name(inputs, *, name: str = "x"): ...


@pytest.mark.parametrize("function", [no_default, no_type, wrong_type, wrong_default, truth_for_number, called_name])
def test_a_parameter_that_no_configuration_could_hold_is_refused_when_it_is_registered(registry, function):
    with pytest.raises(RegistryError, match=r"of the test function 'new' cannot be set by a configuration. Give it"):
        registry.register("new")(function)
    assert registry.names() == ["scaled", "plain"]


def test_a_default_before_the_star_is_refused(registry):
    with pytest.raises(RegistryError, match=r"'power' of the test function 'new' has a default.* Put it behind `\*`"):

        @registry.register("new")
        def new(inputs, power: float = 0.5): ...


@pytest.mark.parametrize("default", [float("nan"), "a,b"])
def test_a_default_that_cannot_be_written_is_refused(registry, default):
    def function(inputs, *, power: float = 0.5): ...

    function.__kwdefaults__ = {"power": default}
    function.__annotations__ = {"power": type(default).__name__}  # as a string, as of postponed evaluation
    with pytest.raises(RegistryError, match="The parameter 'power' of the test function 'new' is"):
        registry.register("new")(function)


def test_a_function_of_c_that_tells_no_signature_has_no_parameters(registry):
    registry.register("magnitude")(torch.abs)
    assert registry.entry("magnitude").parameters == {}
    with pytest.raises(RegistryError, match="'power' cannot be set: the test function 'magnitude' has none"):
        registry.entry("magnitude:power=1")


def test_an_integer_is_a_default_of_a_number(registry):
    @registry.register("new")
    def new(inputs, *, power: float = 1):
        return power

    assert registry.entry("new").name == "new:power=1.0"


def test_what_a_function_requires_may_be_said_by_an_attribute_or_where_it_is_registered(registry):
    def given(inputs): ...

    assert registry.entry(given).requires == {"activations", "gradients"}
    registry.register("silent")(given)
    given.requires = ("gradients",)
    registry.register("by_attribute")(given)
    registry.register("by_argument", requires=("activations",))(given)
    registry.register("by_empty_argument", requires=())(given)
    found = [
        registry.entry(one).requires for one in (given, "by_attribute", "by_argument", "by_empty_argument", "silent")
    ]
    assert found == [{"gradients"}, {"gradients"}, {"activations"}, set(), set()]


def test_what_is_known_of_a_function_is_told(registry):
    entry = registry.entry("scaled:power=2")
    assert entry.summary == "Everything that it was given, as it came."
    assert [str(parameter) for parameter in entry.parameters.values()][:2] == ["power: float = 0.5", "steps: int = 3"]
    assert registry.entry("plain").summary == ""
    assert as_text("scaled") == "scaled"


@pytest.mark.parametrize("kind", ["importance", "distribution", "solver"])
def test_every_front_door_takes_parameters(kind):
    found = {"importance": importances, "distribution": distributions, "solver": solvers}[kind]

    @found.register("with_a_parameter")
    def function(first, *others, share: float = 0.5):
        if kind == "solver":
            return share * solvers["nearest"](first, *others)
        scores = torch.ones(12 if kind == "importance" else 4)
        return scores * share if kind == "importance" else torch.cat([scores[:3], scores[3:] * share])

    try:
        if kind == "importance":
            scores = channel_importance("with_a_parameter:share=0.25", ChannelStatistics(make_ffn()))
            assert scores.tolist() == [0.25] * 12
        elif kind == "distribution":
            inputs = MarginalInputs(normal(0, 4), torch.ones(4, dtype=torch.bool), {})
            assert marginal({"name": "with_a_parameter", "share": 1}, inputs).tolist() == [0.25] * 4
        else:
            half = torch.tensor([0.5, 0.5], dtype=torch.float64)
            function.meets = (False, False)
            solvers.unregister("with_a_parameter")
            solvers.register("with_a_parameter")(function)
            plan = solve_transport("with_a_parameter:share=0.25", torch.eye(2, dtype=torch.float64), half, half)
            assert float(plan.matrix.sum()) == 0.25
    finally:
        found.unregister("with_a_parameter")


# Functions of other packages

PLUGIN = """
from optimum_otprune.functional.importance import importances

print("loaded")

def register():
    @importances.register("of_another_package", reference="https://example.org/paper", requires=())
    def of_another_package(statistics, *, power: float = 0.5):
        \"\"\"Norm of a channel to a power.\"\"\"
        return statistics.weights.down.float().norm(dim=0) ** power
"""


@pytest.fixture
def installed(tmp_path):
    """Run a script with a distribution on the path whose entry point is given."""

    def run(entry_point: str, *arguments: str, plugin: str = PLUGIN) -> subprocess.CompletedProcess:
        info = tmp_path / "another_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: another-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[optimum_otprune.plugins]\nmine = {entry_point}\n")
        (tmp_path / "another_package.py").write_text(plugin)
        code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n{arguments[0]}"
        return subprocess.run([sys.executable, "-c", code, *arguments[1:]], capture_output=True, text=True)

    return run


LOOK_UP = """
from optimum_otprune.config.configuration import OTPruningConfig
assert OTPruningConfig(importance="wanda", selection="top").importance == "wanda"
print("known names need no plugin")
for _ in range(2):
    config = OTPruningConfig(importance="of_another_package:power=2", selection="top")
    print(config.importance)
"""
MAIN = "from optimum_otprune.commands.main import main; "
COMMAND = f"{MAIN}main(sys.argv[1:])"


def test_a_plugin_is_loaded_once_when_a_name_is_asked_for_that_is_not_known(installed):
    done = installed("another_package:register", LOOK_UP)
    assert done.stdout.splitlines() == ["known names need no plugin", "loaded", *["of_another_package:power=2.0"] * 2]


def test_a_plugin_may_be_a_module_and_is_listed(installed):
    done = installed("another_package", COMMAND, "list", "importances", plugin=f"{PLUGIN}\nregister()")
    shown = done.stdout.partition("  of_another_package\n")[2]
    assert shown.splitlines() == [
        "      Norm of a channel to a power.",
        "      Parameters: power: float = 0.5; as in of_another_package:power=0.5",
        "      Reference: https://example.org/paper",
    ]


@pytest.mark.parametrize(
    ("entry_point", "plugin", "message"),
    [
        ("another_package", "import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_na"),
        ("another_package", "raise SystemExit('enough.')", "SystemExit: enough. Mend it"),
        ("another_package:register", "register = 3", "TypeError: 'another_package:register' is a int; want a module"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_one_error_that_names_it(installed, entry_point, plugin, message):
    done = installed(entry_point, COMMAND, "list", "importances", plugin=plugin)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    start = "otprune list: error: The plugin 'mine' of the package 'another-package' could not be loaded: "
    assert line.startswith(start + message)
    assert line.endswith("Mend it, or uninstall that package.")


PARTLY = f"{PLUGIN}\n    raise ValueError('out of luck')"
LOOK_UP_TWICE = """
from optimum_otprune.errors import RegistryError
from optimum_otprune.functional.costs import costs
for _ in range(2):
    try:
        "nothing" in costs
    except RegistryError as error:
        print(error)
"""


def test_a_plugin_that_fails_after_it_registered_something_is_the_same_error_each_time(installed):
    done = installed("another_package:register", LOOK_UP_TWICE, plugin=PARTLY)
    first, second = [line for line in done.stdout.splitlines() if line != "loaded"]
    assert first == second
    assert "could not be loaded: ValueError: out of luck. Mend it, or uninstall that package." in first


LOOK_UP_IN_THREADS = """
from concurrent.futures import ThreadPoolExecutor
from optimum_otprune.functional.importance import importances
with ThreadPoolExecutor(2) as threads:
    print(list(threads.map(importances.__contains__, ["of_another_package"] * 2)))
"""


def test_a_second_thread_waits_for_the_names_of_a_plugin(installed):
    plugin = PLUGIN.replace("def register():", "def register():\n    import time; time.sleep(1)")
    done = installed("another_package:register", LOOK_UP_IN_THREADS, plugin=plugin)
    assert done.stdout.splitlines() == ["loaded", "[True, True]"]


MORE = """
from optimum_otprune.functional.marginals import Strategy, register_strategy
from optimum_otprune.models.save_formats import Pad, save_formats

def register():
    save_formats.register("rv_format")(type("RoundedFormat", (Pad,), {"__doc__": "Of another package."}))
    register_strategy("rv_strategy", Strategy("balanced", "uniform", "robust"))
"""
MAKE = "from optimum_otprune.config.configuration import OTPruningConfig as C; "


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        (f"{MAKE}print(C(non_uniform_format='rv_format').non_uniform_format)", "rv_format"),
        (f"{MAKE}print(C(strategy='rv_strategy', method='structured_afr_with_intrafusion').strategy)", "rv_strategy"),
        (f"{MAKE}print(C.from_pretrained(sys.argv[1]).non_uniform_format)", "rv_format"),
        (f"{MAIN}main(['list', 'save_formats'])", "  rv_format\n      Of another package.\n"),
        (f"{MAIN}main(['list', 'strategies'])", "  rv_strategy\n      Sets statistics='balanced'"),
        (
            f"{MAIN}main(['prune', {str(DEMO)!r}, '-o', sys.argv[1] + '/o', '--dry-run', '--calibration-data',"
            " sys.argv[1] + '/a.txt', '--non-uniform-format', 'rv_format', '--num-samples', '2', '--seqlen', '16'])",
            "Parameters",
        ),
    ],
)
def test_a_plugin_brings_strategies_and_save_formats(installed, tmp_path, script, shown):
    saved = {**OTPruningConfig().to_dict(), "non_uniform_format": "rv_format"}
    (tmp_path / "otprune_config.json").write_text(json.dumps(saved))
    (tmp_path / "a.txt").write_text("A sentence about nothing in particular.\n" * 50)
    done = installed("another_package:register", script, str(tmp_path), plugin=MORE)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


# The laws

LAWS = """
import torch
from optimum_otprune.functional.importance import importances

@importances.register("just_registered", requires=("activations",), reads=())
def just_registered(statistics, *, power: float = 0.5):
    return statistics.weights.down.float().abs().sum(dim=0) * statistics.hidden_second_moment.float() ** power{more}
"""


@pytest.mark.parametrize(("more", "failing"), [("", 0), (" + torch.arange(12)", 2)])
def test_the_laws_hold_for_an_importance_the_moment_it_is_registered(tmp_path, more, failing):
    (tmp_path / "just_registered.py").write_text(LAWS.format(more=more))
    code = f"import sys, pytest; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import just_registered\n"
    arguments = ["tests/functional/test_importance.py", "-k", "just_registered", "-p", "no:cacheprovider"]
    run = [sys.executable, "-c", f"{code}sys.exit(pytest.main({arguments}))"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    summary = done.stdout.splitlines()[-1]
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == failing, done.stdout
    assert all("test_permuting_channels_permutes_every_importance" in line for line in failed)
    assert (done.returncode == 0) == (failing == 0), summary
