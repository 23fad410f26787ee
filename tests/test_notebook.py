"""The notebook: it runs from the first cell to the last with each framework, and its outputs are kept."""

import nbformat
from nbclient import NotebookClient

from helpers import ROOT, in_make_test

NOTEBOOK = ROOT / "notebooks/managed_spot_training.ipynb"


def check_outputs(notebook):
    """Assert that each code cell was executed, and that its output is what the text promises."""
    text = ""
    pictures = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count
            for output in cell.outputs:
                assert output.output_type != "error", output
                text += output.get("text", "")
                pictures += "image/png" in output.get("data", {})
    assert text.count("\nStarting training from epoch: 6\n") == 1
    assert "exit code: 143\n" in text
    assert "exit code: -9\n" in text
    assert text.count("Resuming training from ") == 2
    assert "\nbit-identical: True\n" in text
    assert "\n8 predictions in " in text
    assert '"EnableManagedSpotTraining": true' in text
    assert pictures == 2


@in_make_test("xgboost")
def test_the_notebook_runs(framework, tmp_path):
    for path in ROOT.iterdir():
        if path.is_dir() and path.name not in ("notebooks", "output"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.read(NOTEBOOK, 4)
    first = notebook.cells[0]
    assert first.source.startswith('FRAMEWORK = "pytorch"')
    first.source = first.source.replace("pytorch", framework, 1)
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    check_outputs(notebook)


def test_the_outputs_are_kept():
    check_outputs(nbformat.read(NOTEBOOK, 4))
