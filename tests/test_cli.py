"""The command line, as a user meets it."""

import pytest

from jclt.cli import main, parser
from jclt.files import read_json
from jclt.world.tasks import TASKS


def test_demo_explains_a_prompt_of_each_task_and_most_are_right(capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    *blocks, last = capsys.readouterr().out.split("\n\n")
    shown = {block.split(":")[0]: block.splitlines() for block in blocks}
    assert set(shown) == set(TASKS)
    right = sum(lines[0].endswith(" right") for lines in shown.values())
    assert right >= len(TASKS) - 1 and last.startswith(f"{right} of {len(TASKS)} right")
    for task, lines in shown.items():
        assert "active features; completeness" in lines[2] and sum("->" in line for line in lines[3:]) == 3
        for suffix in ("npz", "json", "png"):
            assert (tmp_path / "demo" / f"{task}.{suffix}").stat().st_size > 1000
    index = read_json(tmp_path / "demo" / "graph-metadata.json")["graphs"]
    assert {entry["slug"] for entry in index} == set(TASKS)


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
    for arguments in (["--help"], ["demo", "--help"], ["train-lm", "--help"], ["attribute", "--help"]):
        with pytest.raises(SystemExit) as stop:
            parser().parse_args(arguments)
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert len(said) > 200
    assert "example: jclt attribute" in said
