"""The optional packages stay optional: who imports them, and what is said where one is missing."""

import doctest
import importlib
import subprocess
import sys

import pytest

PACKAGES = ["lightning", "pytorch_lightning", "transformers", "accelerate", "tensorboard"]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_package_imports_none_of_them():
    done = run(
        "import sys, convspectra, convspectra.cli, convspectra.integrations.tensorboard\n"
        f"print(sorted(set({PACKAGES}) & set(sys.modules)))"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("module", "absent", "named"),
    [
        ("lightning", ["lightning", "pytorch_lightning"], "lightning"),
        ("transformers", ["transformers"], "transformers"),
        ("transformers", ["accelerate"], "accelerate"),
    ],
)
def test_a_missing_package_names_the_extra(module, absent, named):
    # A finder in front of all others, since find_spec does not take None in sys.modules for absent.
    done = run(
        f"""
import sys, importlib.abc, importlib.machinery
class Absent(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = super().find_spec(name, path, target)
        return None if name.split(".")[0] in {absent} else found
sys.meta_path[:] = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder] + [Absent]
try:
    import convspectra.integrations.{module}
except ImportError as error:
    print(error.name, "|", error)
"""
    )
    assert done.stdout.strip() == (
        f"{named} | expected the package {named!r}, which is not installed: "
        f"pip install 'convspectra[{module}]'"
    ), done.stderr


@pytest.mark.parametrize("name", ["lightning", "transformers", "tensorboard"])
def test_the_docstrings_are_true(name):
    pytest.importorskip(name)
    failed, attempted = doctest.testmod(importlib.import_module(f"convspectra.integrations.{name}"))
    assert failed == 0
    assert attempted > 0
