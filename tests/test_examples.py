"""Every example runs, without a warning, and prints something."""

import runpy
from pathlib import Path

import pytest

OPTIONAL = {"accelerate", "lightning", "tensorboard", "transformers"}
EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples():
    assert EXAMPLES


# A warning of Lightning 2.6 itself, with PyTorch 2.13.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, capsys):
    try:
        runpy.run_path(str(path), run_name="__main__")
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"optional package missing: {error}")
    assert capsys.readouterr().out.strip()
