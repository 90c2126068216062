"""The notebooks run from the first cell to the last, and are stored without output."""

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    names = {
        "01_samplers", "02_quickstart", "03_branching_and_windows", "04_preferences_and_direct_gradients",
        "05_reward_models", "06_video", "07_vlm_grpo",
    }  # fmt: skip
    assert {path.stem for path in NOTEBOOKS} >= names


@every_notebook
def test_it_is_stored_without_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.fixture(scope="module")
def kernel():
    """One kernel, where a reader's Jupyter starts it: its imports take longer than many a notebook."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT / "notebooks"))
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@every_notebook
def test_it_runs(path, kernel):
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    cells = list(notebook.cells)
    # As in a kernel of its own, but for what is loaded; two threads of torch would wait for a core that others use.
    fresh = nbformat.v4.new_code_cell("%reset -f\nimport torch\ntorch.set_num_threads(1)\ndel torch")
    notebook.cells.insert(0, fresh)
    NotebookClient(notebook, km=kernel, timeout=600).execute()
    assert any(cell.get("outputs") for cell in cells)
