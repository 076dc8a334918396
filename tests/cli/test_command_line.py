"""The words of a command line: suggestions, completion, and where help comes from."""

import os
import subprocess
import sys

import pytest

from convspectra.cli._main import COMMANDS, main


def refusal(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as refused:
        main(list(words))
    assert refused.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adit"], "convspectra: error: no command 'adit'; did you mean audit?"),
        (["xyz"], f"convspectra: error: no command 'xyz'; there are {', '.join(COMMANDS)}"),
        (["--verison"], "convspectra: error: no option --verison; did you mean --version?"),
        (
            ["audit", "m.onnx", "--imput=3x4x4"],  # and not that --input is required
            "convspectra audit: error: no option --imput; did you mean --input?",
        ),
        (["show", "a.json", "--htlm", "a"], "convspectra show: error: no option --htlm; did you"),
    ],
)
def test_what_is_misspelled_is_told_with_what_may_be_meant(capsys, words, said):
    assert refusal(capsys, *words).startswith(said)


def test_the_start_of_an_option_is_one(tmp_path, capsys):
    assert main(["show", "--purp", "lipschitz", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_nothing_of_the_inner_parser_is_shown(capsys):
    assert refusal(capsys) == "convspectra: error: the following arguments are required: COMMAND"
    assert refusal(capsys, "show").endswith("the following arguments are required: A.json")
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "usage: convspectra [-h] [--version] COMMAND ..." in printed
    assert all(f"  {name:<12}{text}\n" in printed for name, text in COMMANDS.items())


@pytest.mark.parametrize(
    ("line", "offered"),
    [("convspectra sp", {"spectra"}), ("convspectra spectra --ke", {"--kernel"})],
)
def test_a_shell_completes_commands_and_options(tmp_path, line, offered):
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    variables = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line, "COMP_POINT": str(len(line)),
    }  # fmt: skip
    code = "import sys\nfrom convspectra.cli import main\nsys.exit(main())"
    subprocess.run([sys.executable, "-c", code], env=os.environ | variables, check=True)
    assert set(answer.read_text().split("\n")) == offered
