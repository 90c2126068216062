"""What importing `rewards` costs and needs."""

import ast
import subprocess
import sys
from pathlib import Path

import rewards

FOLDER = Path(rewards.__file__).parent


def test_modules_import_torch_pil_numpy_and_themselves():
    """Anything heavy is imported inside load(), which is deeper than the top level."""
    allowed = {*sys.stdlib_module_names, "torch", "PIL", "numpy", "rewards"}
    for path in FOLDER.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path.name


def test_listing_the_rewards_loads_nothing_heavy():
    code = (
        "import sys, rewards; rewards.available(); rewards.RewardHub('ocr'); print(sorted(set(sys.modules) & "
        "{'transformers', 'diffusers', 'cv2', 'rapidocr', 'onnxruntime', 'flowrl', 'samplers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_sorted_and_there():
    assert rewards.__all__ == sorted(rewards.__all__)
    assert all(hasattr(rewards, name) for name in rewards.__all__)
