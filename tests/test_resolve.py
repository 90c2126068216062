"""Names in configs: what they resolve to, and what is said when they do not."""

import subprocess
import sys
import textwrap

import pytest

import rewards
from flowrl.resolve import ResolveError, available, check_name, load_file, nearest, resolve


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on the path: a loader, two kinds of classes, a module with several, a helper, and one that explodes."""
    files = {
        "__init__": "",
        "loader": "class Other: ...\ndef load(path): return path",
        "algo": "class Helper: ...\nclass Algo:\n    def loss(self): ...",
        "model": "class Config: ...\nclass Model:\n    def velocity(self): ...",
        "inherits": "from kit.algo import Algo\nclass Child(Algo): ...",
        "single": "class Local: ...",
        "several": "class One:\n    def loss(self): ...\nclass Two:\n    def loss(self): ...",
        "helpers": "def add(a, b): return a + b",
        "explodes": "class Bomb:\n    def loss(self): ...\nraise RuntimeError('boom')",
        "needs_extra": "import surely_not_installed.part\ndef load(): ...",
        "_private": "def load(): ...",
    }
    (tmp_path / "kit").mkdir()
    for name, source in files.items():
        (tmp_path / "kit" / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield "kit"
    for name in [key for key in sys.modules if key == "kit" or key.startswith("kit.")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("loader", "load"),
        ("algo", "Algo"),
        ("model", "Model"),
        ("inherits", "Child"),
        ("single", "Local"),
        ("several.Two", "Two"),
        ("algo.Helper", "Helper"),
        ("kit.several:One", "One"),
        ("kit.algo:", "Algo"),
    ],
)
def test_names_resolve_by_convention(package, name, found):
    assert resolve(name, package).__name__ == found


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "alog",
            ["'alog' is not known in kit", "did you mean 'algo'", "package.module:Name", "./file.py:Name"],
        ),
        ("several", ["several", "several.One", "several.Two"]),
        ("several.Tow", ["no 'Tow'", "did you mean 'Two'"]),
        ("helpers", ["neither a function load() nor a class"]),
        ("explodes", ["importing 'kit.explodes' fails", "RuntimeError: boom"]),
        ("needs_extra", ["imports 'surely_not_installed'", "pip install surely_not_installed"]),
        ("no.such.module:x", ["cannot import 'no.such.module'", "PYTHONPATH", "./file.py:Name"]),
        ("./no_such.py:x", ["does not exist", "no_such.py", "working folder"]),
    ],
)
def test_errors_say_what_where_and_how(package, name, parts):
    with pytest.raises(ResolveError) as caught:
        resolve(name, package)
    for part in parts:
        assert part in str(caught.value)


def test_listing_imports_nothing_and_leaves_helpers_out(package):
    names = available(package)
    assert names == ["algo", "explodes", "inherits", "loader", "model", "needs_extra", "several"]
    assert not any(key.startswith("kit.") for key in sys.modules)


def test_bare_names_are_checked_without_importing(package):
    check_name("explodes", package)
    check_name("several.Two", package)
    check_name("other.package:thing", package)
    with pytest.raises(ResolveError, match="did you mean 'loader'"):
        check_name("laoder", package)
    assert "kit.explodes" not in sys.modules


def test_the_real_packages_list_their_methods_and_engines():
    assert {"flow_grpo", "mix_grpo"} <= set(available("flowrl.algorithms"))
    assert "advantages" not in available("flowrl.algorithms")
    assert {"local", "accelerate"} <= set(available("flowrl.engine"))
    with pytest.raises(ResolveError, match="not a package"):
        available("flowrl.types")


def test_a_users_rewards_py_does_not_shadow_ours(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text("def mine(samples): return [1.0] * len(samples)\n")
    monkeypatch.chdir(tmp_path)
    assert resolve("./rewards.py:mine", "kit")([1, 2]) == [1.0, 1.0]
    assert sys.modules["rewards"] is rewards


def test_a_file_is_loaded_once_and_again_when_edited(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Algo:\n    def loss(self): return 1\n")
    first = resolve(str(file), "kit")
    assert resolve(f"{file}:Algo", "kit") is first
    file.write_text("class Algo:\n    def loss(self): return 2\n")
    assert resolve(str(file), "kit")().loss() == 2


def test_a_file_that_fails_is_named_and_not_kept(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("1 / 0\n")
    with pytest.raises(ResolveError, match=r"broken.py.*fails when loaded: ZeroDivisionError"):
        load_file(str(file))
    assert not [key for key in sys.modules if key.startswith("_flowrl_file_broken")]
    with pytest.raises(ResolveError, match="did you mean 'broken.py'"):
        load_file(str(tmp_path / "brokn.py"))


def test_nearest():
    assert nearest("lr_", ["lr", "eps"]) == " (did you mean 'lr'?)"
    assert nearest("zzz", ["lr", "eps"]) == ""


def test_config_code_is_light():
    """The command line's help must not wait for torch."""
    code = """
        import sys
        import flowrl.config, flowrl.data, flowrl.log, flowrl.metrics, flowrl.faults
        heavy = {"torch", "diffusers", "transformers", "accelerate", "omegaconf", "numpy"} & set(sys.modules)
        sys.exit(str(heavy) if heavy else 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
