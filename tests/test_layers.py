"""The house stands: imports point downwards, doors are few, files and functions are short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "optimum_otprune"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_optimum_register" not in path.parts)

# Each line may import from itself and from the lines above it.
LAYERS = (
    ("version", "errors", "references", "registry", "methods", "quantities", "ratios", "untrusted"),
    ("options", "option_checks", "options_file"),
    ("functional",),
    ("compatibility", "manifest", "retries", "hub_client", "hub_access", "hub"),
    ("outputs", "files"),
    ("resolution", "configuration", "comparison", "layer_report", "report"),
    ("state",),
    ("devices", "heap", "spill", "processes", "digests"),
    ("architectures",),
    (
        "documentation",
        "token_ids",
        "text_files",
        "documents",
        "tokenization",
        "overlap",
        "calibration",
        "block_runner",
        "streaming",
        "reverse_pass",
        "faithfulness",
        "layer_data",
        "gradients",
        "self_calibration",
        "perplexity",
        "custom_functions",
        "compression",
        "flops",
    ),
    ("widths", "feasibility", "prepared", "layer_store", "resume"),
    ("budget", "outcome", "pipeline"),
    ("markdown", "base_card", "reproduction", "citations", "plots", "findings", "card_metadata", "card"),
    ("sources", "loading", "loading_options", "model_files", "checkpoint", "folder_card"),
    ("search_space", "latency", "benchmarking", "trials", "fingerprint", "tuning"),
    ("expectations", "plan", "planning"),
    ("sharing", "pruner"),
    ("commands", "__main__"),
    ("__init__",),
)
DOORS = {
    "ot": {"functional/pot.py"},
    "accelerate": {"devices.py", "processes.py"},
    "datasets": {"documents.py", "perplexity.py"},  # the metric declares the types of its inputs
    "pandas": {"text_files.py"},
    "pyarrow": {"text_files.py"},
    "evaluate": {"perplexity.py"},
    "scipy": {"compression.py"},
    "optuna": {"tuning.py"},  # an extra
    "matplotlib": {"plots.py"},  # an extra
    "jinja2": {"card.py", "documents.py"},  # what a chat template raises
    "yaml": {"base_card.py"},
}


def layer_of(path: Path) -> int:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = [index for index, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} has no layer: add it to the table here and to CONTRIBUTING.md"
    return found[0]


def imports(path: Path) -> list[str]:
    """Names of imported modules, those inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names.append(node.module or "")
    return names


def own_imports(path: Path) -> list[Path]:
    found = []
    for name in imports(path):
        if name.split(".")[0] != "optimum_otprune":
            continue
        base = PACKAGE.joinpath(*name.split(".")[1:])
        assert base != PACKAGE, f"{path.name} imports from the package's root"
        found.append(base / "__init__.py" if base.is_dir() else base.with_suffix(".py"))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    upwards = [other.name for other in own_imports(path) if layer_of(other) > layer_of(path)]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle():
    edges = {path: own_imports(path) for path in FILES if path != PACKAGE / "__init__.py"}
    done: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, f"circle: {[step.name for step in (*above, path)]}"
        if path not in done:
            for other in edges.get(path, []):
                visit(other, (*above, path))
            done.add(path)

    for path in edges:
        visit(path, ())


@pytest.mark.parametrize("library", DOORS)
def test_a_library_is_imported_through_its_door_only(library):
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users == DOORS[library]


def test_the_hub_is_spoken_to_in_one_place_and_never_by_a_push_of_transformers():
    speakers = {path.name for path in FILES if "HfApi" in path.read_text(encoding="utf-8")}
    assert speakers == {"hub_client.py"}
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not any(name in text for name in ("upload_folder", "super().push_to_hub", "model.push_to_hub")), (
            path.name
        )


def test_the_mathematics_knows_no_models():
    for path in (PACKAGE / "functional").glob("*.py"):
        assert not {"transformers", "accelerate", "optimum"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short_and_only_commands_print(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert "commands" in path.parts


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, optimum_otprune; assert not {'torch', 'transformers', 'ot', 'datasets'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_is_there():
    import optimum_otprune

    assert all(getattr(optimum_otprune, name) is not None for name in optimum_otprune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        optimum_otprune.nothing  # noqa: B018
