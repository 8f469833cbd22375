"""Files are read completely or refused in one line, and written completely or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from jclt import files
from jclt.errors import UserError


def get_refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


# Reading.


def test_what_is_not_a_plain_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for read in (files.read_bytes, files.read_text, files.read_json, files.read_yaml, files.read_lines):
        assert f"{tmp_path / 'absent'}: not found, expected a" in get_refusal(read, tmp_path / "absent")
        assert "folder: is a folder, expected a" in get_refusal(read, tmp_path / "folder")
        assert "loop: cannot be read (Too many levels of symbolic links)" in get_refusal(read, tmp_path / "loop")
        assert "pipe: is no plain file, expected a" in get_refusal(read, tmp_path / "pipe")
        assert "cannot be read (File name too long)" in get_refusal(read, tmp_path / ("x" * 300))
        assert "cannot be read (embedded null byte)" in get_refusal(read, Path("a\0b"))


def test_text_is_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffZürich\r\na\x0cb\u2028c\n\n".encode())
    assert files.read_text(tmp_path / "text") == "Zürich\r\na\x0cb\u2028c\n\n"
    assert files.read_lines(tmp_path / "text") == ["Zürich", "a\x0cb\u2028c", ""]
    (tmp_path / "latin").write_bytes("Zürich".encode("latin-1"))
    assert get_refusal(files.read_text, tmp_path / "latin") == f"{tmp_path / 'latin'}: not UTF-8 text (byte 1)"
    code = (
        f"from jclt.files import *; from pathlib import Path; print(ascii(read_text(Path({str(tmp_path / 'text')!r}))))"
    )
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    assert process.stdout.startswith("'Z\\xfcrich"), process.stderr


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[" * 100_000, "not valid JSON (nested too deeply)"),
        ('{"a": ' * 100_000, "not valid JSON (nested too deeply)"),
        ('{"a": 1' + "0" * 6000 + "}", "not valid JSON (Exceeds the limit"),
        ("{", "not valid JSON ("),
        ("[1]", "expected a JSON object"),
        ("", "not valid JSON ("),
    ],
)
def test_damaged_json(content, line, tmp_path):
    (tmp_path / "x.json").write_text(content)
    assert f"x.json: {line}" in get_refusal(files.read_json, tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[" * 20_000, "not valid YAML (nested too deeply)"),
        ("a: 1" + "0" * 6000, "not valid YAML ("),
        ("a: b: c", "not valid YAML ("),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML ("),
        ("a: 2020-99-99", "not valid YAML ("),
        ("words", "expected `name: value` lines"),
    ],
)
def test_damaged_yaml(content, line, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    assert f"x.yaml: {line}" in get_refusal(files.read_yaml, tmp_path / "x.yaml")


# Writing.


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "made" / "x.json"
    files.write_json(path, {"a": 1})
    assert get_refusal(files.write_json, path, {"a": float("nan")}).startswith(f"{path}: not written, a number is not")
    with (
        pytest.raises(UserError, match="x.json: cannot be written .No space left on device."),
        files.create_file(path) as partial,
    ):
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert files.read_json(path) == {"a": 1} and [file.name for file in path.parent.iterdir()] == ["x.json"]
    (tmp_path / "file").write_text("")
    line = get_refusal(files.write_text, tmp_path / "file" / "x", "text")
    assert line.startswith(f"{tmp_path / 'file' / 'x'}: cannot be written (")


def test_errors_of_other_files_pass_through_a_writer(tmp_path):
    with pytest.raises(OSError, match="elsewhere"), files.create_file(tmp_path / "x"):
        raise OSError(5, "Input/output error", "/elsewhere/y")
    with pytest.raises(UserError, match="^another$"), files.create_file(tmp_path / "x"):
        raise UserError("another")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("No space left"), ValueError("other")])
def test_a_folder_is_written_whole_or_not_at_all(error, tmp_path):
    with (
        pytest.raises(ValueError if isinstance(error, ValueError) else UserError),
        files.create_folder(tmp_path / "x") as partial,
    ):
        (partial / "part").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())
    (tmp_path / "x").mkdir()  # an empty one is taken
    with files.create_folder(tmp_path / "x") as partial:
        (partial / "part").write_text("whole")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["part"]
    assert "exists already, expected a new folder" in get_refusal(files.check_new_folder, tmp_path / "x")


def test_leftovers_of_killed_processes_are_removed_and_files_of_others_are_not(tmp_path):
    own_file = files._partial_path(tmp_path / "x")
    dead = tmp_path / own_file.name.replace(f"-{os.getpid()}.", "-99999999999.")
    alive = tmp_path / own_file.name.replace(f"-{os.getpid()}.", f"-{os.getppid()}.")
    others = tmp_path / "x.partial"
    for path in (dead, alive, others):
        path.write_text("")
    files.write_text(tmp_path / "x", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"x", alive.name, others.name}


def test_a_folder_is_checked_for_writing(tmp_path):
    files.check_writable(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir() and not list((tmp_path / "new" / "one").iterdir())
    (tmp_path / "file").write_text("")
    assert "cannot be written" in get_refusal(files.check_writable, tmp_path / "file")
    assert "cannot be written" in get_refusal(files.check_writable, tmp_path / "file" / "one")
