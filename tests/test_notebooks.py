"""The notebooks in `examples/notebooks`: what is committed was executed, and it runs again."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
HAS_ALL = all(find_spec(name) for name in ("nbclient", "ipykernel", "matplotlib"))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["demo", "own-importance-and-cost"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_was_executed_in_order_and_shows_results_alone(path):
    assert path.stat().st_size < 100_000
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len(outputs) >= 2
    for output in outputs:
        assert output["output_type"] in ("stream", "execute_result", "display_data")
        assert output.get("name") != "stderr"
        assert not re.search(r"(?:^|[\\s\"'(])/(?:home|root|tmp|usr|work)/", json.dumps(output))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_ALL, reason="nbclient, ipykernel or Matplotlib is missing")
@pytest.mark.filterwarnings("default")  # of libraries that are not this package's
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    texts = [
        output.get("text", "") or output["data"].get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert any("perplexity" in text for text in texts)
    assert not any(output.get("name") == "stderr" for cell in notebook.cells for output in cell.get("outputs", ()))
