"""The command line, as a user meets it."""

import pytest

from jclt.cli import main, parser
from jclt.world.tasks import TASKS


def test_demo_shows_a_prompt_of_each_task_and_most_are_right(capsys):
    assert main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: line for line in lines[1:-1]}
    assert set(shown) == set(TASKS)
    assert sum(line.endswith(" right") for line in shown.values()) >= len(TASKS) - 1
    assert lines[-1].startswith(f"{sum(line.endswith(' right') for line in shown.values())} of {len(TASKS)} right")


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            ["train-lm", "small-wrld"],
            "config 'small-wrld': neither a preset nor a .py file; did you mean 'small-world'?",
        ),
        (["train-lm", "small-world", "--set", "stesp=4"], "setting 'stesp': unknown; did you mean 'steps'?"),
        (
            ["train-lm", "small-world", "--set", "model.width=big"],
            "setting 'model.width': got big, expected a whole number",
        ),
    ],
)
def test_mistakes_get_one_line_and_exit_status_2(capsys, command, line):
    assert main(command) == 2
    assert capsys.readouterr().err == f"jclt: {line}\n"


def test_help_names_every_command_and_each_explains_itself(capsys):
    for arguments in (["--help"], ["demo", "--help"], ["train-lm", "--help"]):
        with pytest.raises(SystemExit) as stop:
            parser().parse_args(arguments)
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert len(said) > 200
    assert "example: jclt train-lm" in said
