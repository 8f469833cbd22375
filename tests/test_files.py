"""Files read whole or refused in one line, and written whole or not at all."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jclt import files
from jclt.errors import UserError


def refused(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


# Reading.


def test_what_is_no_plain_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for read in (files.read_bytes, files.read_text, files.read_json, files.read_yaml, files.read_lines):
        assert f"{tmp_path / 'absent'}: not found, expected a" in refused(read, tmp_path / "absent")
        assert "folder: is a folder, expected a" in refused(read, tmp_path / "folder")
        assert "loop: cannot be read (Too many levels of symbolic links)" in refused(read, tmp_path / "loop")
        assert "pipe: is no plain file, expected a" in refused(read, tmp_path / "pipe")
        assert "cannot be read (File name too long)" in refused(read, tmp_path / ("x" * 300))
        assert "cannot be read (embedded null byte)" in refused(read, Path("a\0b"))


def test_text_is_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffZürich\r\na\x0cb\u2028c\n\n".encode())
    assert files.read_text(tmp_path / "text") == "Zürich\r\na\x0cb\u2028c\n\n"
    assert files.read_lines(tmp_path / "text") == ["Zürich", "a\x0cb\u2028c", ""]
    (tmp_path / "latin").write_bytes("Zürich".encode("latin-1"))
    assert refused(files.read_text, tmp_path / "latin") == f"{tmp_path / 'latin'}: not UTF-8 text (byte 1)"
    code = (
        f"from jclt.files import *; from pathlib import Path; print(ascii(read_text(Path({str(tmp_path / 'text')!r}))))"
    )
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    assert done.stdout.startswith("'Z\\xfcrich"), done.stderr


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
    assert f"x.json: {line}" in refused(files.read_json, tmp_path / "x.json")


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
    assert f"x.yaml: {line}" in refused(files.read_yaml, tmp_path / "x.yaml")


# Arrays.


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(first: int, last: int, **changes: object) -> dict:
    return {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last]} | changes


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "'b' .* is damaged: lies at bytes 4 to 12, expected 8 to 16"),
        ({"a": entry(4, 12)}, "'a' .* is damaged: lies at bytes 4 to 12, expected 0 to 8"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "'b' .* is damaged: lies at bytes 0 to 8, expected 8 to 16"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, "'b' .* is damaged: lies at bytes 12 to 16, expected 8 to 12"),
        ({"a": entry(0, 8, shape=[3])}, "'a' of type F32 and shape .3. is damaged"),
        ({"a": entry(0, 16)}, "cut off, has 12 bytes of tensors, expected 16"),
        ({"a": entry(0, 8)}, "has 12 bytes of tensors, expected 8 by its header"),
        ({"a": entry(0, 12, dtype="F99")}, "'a' is of type 'F99', expected one that numpy knows"),
        ({"a": entry(0, 12, dtype=["F32"])}, r"'a' is of type \['F32'\], expected one that numpy knows"),
        ({"a": entry(0, 12, shape=[-3])}, "'a' is damaged, expected its dtype, shape and two data_offsets"),
        ({"a": entry(0, 12, shape=3)}, "'a' is damaged, expected its dtype, shape and two data_offsets"),
        ({"a": entry(0, 12, shape=[True])}, "'a' is damaged, expected its dtype, shape and two data_offsets"),
        ({"a": entry(0, 12, data_offsets=[12])}, "'a' is damaged, expected its dtype, shape and two data_offsets"),
        ({"a": [1]}, "'a' is damaged, expected its dtype, shape and two data_offsets"),
        ([1], "not a safetensors file, its header is no JSON object"),
        (b"[" * 100_000, "not a safetensors file, its header is no JSON object"),
        (b'{"a": {}, "a": {}}', "not a safetensors file, its header is no JSON object"),
        (b"\xff{}", "not a safetensors file, its header is no JSON object"),
    ],
)
def test_damaged_safetensors(header, line, tmp_path):
    write_header(tmp_path / "x.safetensors", header, bytes(12))
    with pytest.raises(UserError, match=f"x.safetensors: .*{line}"):
        files.SafetensorsFile(tmp_path / "x.safetensors")


def test_safetensors_of_every_type(tmp_path):
    tensors = {name: np.ones((2, 3), dtype) for name, dtype in files.DTYPES.items() if not name.startswith("F8")}
    tensors |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(7, np.int64)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = files.SafetensorsFile(tmp_path / "x.safetensors")
    for name, want in tensors.items():
        np.testing.assert_array_equal(file.tensor(name), want)
        assert file.tensor(name).dtype == want.dtype


ARRAY = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_an_archive(save, tmp_path):
    save(tmp_path / "x.npz", a=ARRAY, b=np.asfortranarray(ARRAY), c=np.zeros((0, 2)), d=np.array(5))
    file = files.NpzFile(tmp_path / "x.npz")
    assert file.shape("a") == ((300, 40), np.float32)
    for name, want in {"a": ARRAY, "b": ARRAY, "c": np.zeros((0, 2)), "d": np.array(5)}.items():
        np.testing.assert_array_equal(file.tensor(name), want)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flipped_bits_of_an_archive_are_noticed(save, tmp_path):
    """Any one but in fields that say nothing of the content."""
    save(tmp_path / "x.npz", a=ARRAY)
    whole = (tmp_path / "x.npz").read_bytes()
    for at in np.random.default_rng(0).integers(200, len(whole) - 200, 30):
        raw = bytearray(whole)
        raw[at] ^= 4
        (tmp_path / "x.npz").write_bytes(bytes(raw))
        with pytest.raises(UserError, match="'a' is damaged"):
            files.NpzFile(tmp_path / "x.npz").tensor("a")


def test_archives_that_lie(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=ARRAY)
    whole = path.read_bytes()
    for keep in (0, 10, 100, len(whole) - 30):
        path.write_bytes(whole[:keep])
        assert "x.npz: damaged, or not a .npz file (" in refused(files.NpzFile, path)
    np.savez(path, a=np.array([None]))
    assert "'a' is damaged (holds Python objects)" in refused(files.NpzFile(path).tensor, "a")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "a.npy",
            b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999,), }".ljust(128),
        )
        archive.writestr("b.npy", b"no array at all")
        archive.writestr("c", bytes(5000))
    file = files.NpzFile(path)
    assert "'a' is damaged (" in refused(file.tensor, "a")
    assert "'b' is damaged (" in refused(file.tensor, "b")
    assert "'c' unpacks to 5000 bytes, expected at most 100" in refused(file.read, "c", 100)
    assert file.read("c", 5000) == bytes(5000)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("c", b"")
    assert "a member is there twice" in refused(files.NpzFile, path)


def test_mapped_arrays(tmp_path):
    np.save(tmp_path / "x.npy", ARRAY)
    np.testing.assert_array_equal(files.map_array(tmp_path / "x.npy", "an array"), ARRAY)
    raw = (tmp_path / "x.npy").read_bytes()
    for spoilt in (b"", raw[:-1], raw + b"\0", raw.replace(b"'shape': (300", b"'shape': (((("), b"\x93NUMPY\x01\x00"):
        (tmp_path / "x.npy").write_bytes(spoilt)
        line = refused(files.map_array, tmp_path / "x.npy", "an array")
        assert "x.npy: damaged (" in line and line.endswith("expected an array")
    np.save(tmp_path / "x.npy", np.array([None]))
    assert "holds Python objects" in refused(files.map_array, tmp_path / "x.npy", "an array")


# Writing.


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "made" / "x.json"
    files.write_json(path, {"a": 1})
    assert refused(files.write_json, path, {"a": float("nan")}).startswith(f"{path}: not written, a number is not")
    with (
        pytest.raises(UserError, match="x.json: cannot be written .No space left on device."),
        files.new_file(path) as own,
    ):
        own.write_text("half")
        raise OSError(28, "No space left on device")
    assert files.read_json(path) == {"a": 1} and [own.name for own in path.parent.iterdir()] == ["x.json"]
    (tmp_path / "file").write_text("")
    line = refused(files.write_text, tmp_path / "file" / "x", "text")
    assert line.startswith(f"{tmp_path / 'file' / 'x'}: cannot be written (")


def test_errors_of_other_files_pass_through_a_writer(tmp_path):
    with pytest.raises(OSError, match="elsewhere"), files.new_file(tmp_path / "x"):
        raise OSError(5, "Input/output error", "/elsewhere/y")
    with pytest.raises(UserError, match="^another$"), files.new_file(tmp_path / "x"):
        raise UserError("another")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("No space left"), ValueError("other")])
def test_a_folder_is_written_whole_or_not_at_all(error, tmp_path):
    with (
        pytest.raises(ValueError if isinstance(error, ValueError) else UserError),
        files.new_folder(tmp_path / "x") as own,
    ):
        (own / "part").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())
    (tmp_path / "x").mkdir()  # an empty one is taken
    with files.new_folder(tmp_path / "x") as own:
        (own / "part").write_text("whole")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["part"]
    assert "exists already, expected a new folder" in refused(files.check_new_folder, tmp_path / "x")


def test_what_a_killed_process_left_is_cleared_and_what_others_write_is_not(tmp_path):
    mine = files._beside(tmp_path / "x")
    dead = tmp_path / mine.name.replace(f"-{os.getpid()}.", "-99999999999.")
    alive = tmp_path / mine.name.replace(f"-{os.getpid()}.", f"-{os.getppid()}.")
    others = tmp_path / "x.partial"
    for path in (dead, alive, others):
        path.write_text("")
    files.write_text(tmp_path / "x", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"x", alive.name, others.name}


def test_a_folder_that_one_may_write_in(tmp_path):
    files.check_writable(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir() and not list((tmp_path / "new" / "one").iterdir())
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(files.check_writable, tmp_path / "file")
    assert "cannot be written" in refused(files.check_writable, tmp_path / "file" / "one")
