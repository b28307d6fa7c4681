"""The house stands: imports point downwards, doors are few, files and functions are short."""

import ast
import builtins
import statistics
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "optimum_otprune"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_optimum_register" not in path.parts)

# Each line imports only from lines above it; rooms on one line do not import each other.
FLOORS = (
    ("errors",),
    ("functional", "storage"),
    ("models",),
    ("config",),
    ("pruning",),
    ("checkpoints",),
    ("pruner",),
    ("commands",),
    ("__main__", "__init__"),
)
DOORS = {
    "ot": {"functional/transport/pot.py"},
    "accelerate": {"models/devices.py", "models/distributed.py", "models/training.py"},
    "datasets": {"pruning/calibration/documents.py", "models/perplexity.py"},  # the metric declares its inputs' types
    "pandas": {"pruning/calibration/text_files.py"},
    "pyarrow": {"pruning/calibration/text_files.py"},
    "evaluate": {"models/perplexity.py"},
    "scipy": {"functional/costs.py"},
    "peft": {"models/low_rank.py"},  # an extra
    "torchao": {"models/quantizers.py"},  # an extra
    "optuna": {"pruning/tuning/search.py"},  # an extra
    "matplotlib": {"checkpoints/card/plots.py"},  # an extra
    "jinja2": {"checkpoints/card/templates.py", "pruning/calibration/documents.py"},  # what a chat template raises
    "yaml": {"checkpoints/card/base_card.py"},
    "onnxruntime": {"checkpoints/export/onnx_runtime.py"},  # an extra
    "openvino": {"checkpoints/export/openvino_runtime.py"},  # an extra
    "llama_cpp": {"checkpoints/export/llama_runtime.py"},  # an extra
}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Names of imported modules, those inside functions too."""
    names = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names.append(node.module or "")
    return tuple(names)


def own_imports(path: Path) -> list[Path]:
    """Modules of this package that one imports."""
    found = []
    for name in imports(path):
        if name.split(".")[0] != "optimum_otprune":
            continue
        base = PACKAGE.joinpath(*name.split(".")[1:])
        assert base != PACKAGE, f"{path.name} imports from the package's root"
        found.append(base / "__init__.py" if base.is_dir() else base.with_suffix(".py"))
    return found


def circle_in(edges: Mapping[Path, list[Path]]) -> list[str]:
    """Names along a circle, or nothing."""
    done: set[Path] = set()

    def visit(node: Path, above: tuple[Path, ...]) -> list[str]:
        if node in above:
            return [step.name for step in (*above[above.index(node) :], node)]
        if node not in done:
            for other in edges.get(node, []):
                if circle := visit(other, (*above, node)):
                    return circle
            done.add(node)
        return []

    return next((circle for node in edges if (circle := visit(node, ()))), [])


def test_the_package_shows_nine_rooms():
    shown = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in ("py.typed", "__pycache__")
    }
    assert shown == {room for floor in FLOORS for room in floor}
    assert len(shown - {"__init__", "__main__"}) == 9


def test_imports_point_downwards():
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

    def room(path: Path) -> str:
        return path.relative_to(PACKAGE).parts[0].removesuffix(".py")

    wrong = [
        f"{name_of(path)} -> {name_of(other)}"
        for path in FILES
        for other in own_imports(path)
        if room(other) != room(path) and floor_of[room(other)] >= floor_of[room(path)]
    ]
    assert not wrong


def test_no_modules_and_no_folders_import_each_other_in_a_circle():
    modules = {path: own_imports(path) for path in FILES if path != PACKAGE / "__init__.py"}
    assert not circle_in(modules)
    folders: dict[Path, list[Path]] = {}
    for path, others in modules.items():
        if path.parent != PACKAGE:
            folders.setdefault(path.parent, []).extend(
                o.parent for o in others if o.parent not in (path.parent, PACKAGE)
            )
    assert not circle_in(folders)


def test_a_library_is_imported_through_its_door_only():
    found = {
        library: {name_of(path) for path in FILES if any(name.split(".")[0] == library for name in imports(path))}
        for library in DOORS
    }
    assert found == DOORS


def test_the_hub_is_spoken_to_in_one_place_and_never_by_a_push_of_transformers():
    texts = {name_of(path): path.read_text(encoding="utf-8") for path in FILES}
    assert {name for name, text in texts.items() if "HfApi" in text} == {"storage/hub/client.py"}
    for word in ("upload_folder", "super().push_to_hub", "model.push_to_hub"):
        assert not [name for name, text in texts.items() if word in text]


def test_warnings_name_the_users_line_since_they_are_given_in_one_place():
    assert {name_of(path) for path in FILES if "warnings.warn(" in path.read_text(encoding="utf-8")} == {"errors.py"}


def test_what_a_hub_id_is_is_said_in_one_place():
    assert {path.name for path in FILES if "validate_repo_id" in path.read_text(encoding="utf-8")} == {"client.py"}


def test_the_mathematics_knows_no_models():
    for path in (PACKAGE / "functional").rglob("*.py"):
        assert not {"transformers", "accelerate", "optimum"} & {name.split(".")[0] for name in imports(path)}


def test_files_and_functions_are_short_and_only_commands_print():
    lengths = {name_of(path): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > 400}
    assert statistics.median(lengths.values()) <= 150
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name_of(path)}: {node.name}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert "commands" in path.parts, name_of(path)


def test_no_two_classes_share_a_name():
    classes = [node.name for path in FILES for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)]
    assert not {name for name in classes if classes.count(name) > 1}


def test_no_function_or_class_of_a_module_hides_a_builtin():
    for path in FILES:
        names = {node.name for node in tree_of(path).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert not names & set(dir(builtins)), name_of(path)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, optimum_otprune; assert not {'torch', 'transformers', 'ot', 'datasets'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_is_there():
    import optimum_otprune

    assert all(getattr(optimum_otprune, name) is not None for name in optimum_otprune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        optimum_otprune.nothing  # noqa: B018
