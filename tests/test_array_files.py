"""Arrays on disk are read as they were written, or refused in one line."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jclt import array_files
from jclt.errors import UserError


def get_refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


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
        array_files.SafetensorsFile(tmp_path / "x.safetensors")


def test_safetensors_of_every_type(tmp_path):
    tensors = {name: np.ones((2, 3), dtype) for name, dtype in array_files.DTYPES.items() if not name.startswith("F8")}
    tensors |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(7, np.int64)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = array_files.SafetensorsFile(tmp_path / "x.safetensors")
    for name, want in tensors.items():
        np.testing.assert_array_equal(file.read_tensor(name), want)
        assert file.read_tensor(name).dtype == want.dtype


ARRAY = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_an_archive(save, tmp_path):
    save(tmp_path / "x.npz", a=ARRAY, b=np.asfortranarray(ARRAY), c=np.zeros((0, 2)), d=np.array(5))
    file = array_files.NpzFile(tmp_path / "x.npz")
    assert file.read_shape("a") == ((300, 40), np.float32)
    for name, want in {"a": ARRAY, "b": ARRAY, "c": np.zeros((0, 2)), "d": np.array(5)}.items():
        np.testing.assert_array_equal(file.read_tensor(name), want)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flipped_bits_of_an_archive_are_noticed(save, tmp_path):
    """Except in fields of the zip format that do not affect the content."""
    save(tmp_path / "x.npz", a=ARRAY)
    content = (tmp_path / "x.npz").read_bytes()
    for at in np.random.default_rng(0).integers(200, len(content) - 200, 30):
        raw = bytearray(content)
        raw[at] ^= 4
        (tmp_path / "x.npz").write_bytes(bytes(raw))
        with pytest.raises(UserError, match="'a' is damaged"):
            array_files.NpzFile(tmp_path / "x.npz").read_tensor("a")


def test_archives_with_wrong_headers(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=ARRAY)
    content = path.read_bytes()
    for keep in (0, 10, 100, len(content) - 30):
        path.write_bytes(content[:keep])
        assert "x.npz: damaged, or not a .npz file (" in get_refusal(array_files.NpzFile, path)
    np.savez(path, a=np.array([None]))
    assert "'a' is damaged (holds Python objects)" in get_refusal(array_files.NpzFile(path).read_tensor, "a")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "a.npy",
            b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999,), }".ljust(128),
        )
        archive.writestr("b.npy", b"no array at all")
        archive.writestr("c", bytes(5000))
    file = array_files.NpzFile(path)
    assert "'a' is damaged (" in get_refusal(file.read_tensor, "a")
    assert "'b' is damaged (" in get_refusal(file.read_tensor, "b")
    assert "'c' unpacks to 5000 bytes, expected at most 100" in get_refusal(file.read, "c", 100)
    assert file.read("c", 5000) == bytes(5000)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("c", b"")
    assert "a member is there twice" in get_refusal(array_files.NpzFile, path)


def test_mapped_arrays(tmp_path):
    np.save(tmp_path / "x.npy", ARRAY)
    np.testing.assert_array_equal(array_files.map_array(tmp_path / "x.npy", "an array"), ARRAY)
    raw = (tmp_path / "x.npy").read_bytes()
    for spoilt in (b"", raw[:-1], raw + b"\0", raw.replace(b"'shape': (300", b"'shape': (((("), b"\x93NUMPY\x01\x00"):
        (tmp_path / "x.npy").write_bytes(spoilt)
        line = get_refusal(array_files.map_array, tmp_path / "x.npy", "an array")
        assert "x.npy: damaged (" in line and line.endswith("expected an array")
    np.save(tmp_path / "x.npy", np.array([None]))
    assert "holds Python objects" in get_refusal(array_files.map_array, tmp_path / "x.npy", "an array")


def test_an_array_is_mapped_though_another_thread_disturbs_the_parser_once(tmp_path, monkeypatch):
    path, read, calls = tmp_path / "x.npy", array_files.npy.read_array_header_1_0, []
    np.save(path, np.arange(6))

    def read_at_second_try(file):
        calls.append(file)
        if len(calls) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=21, after=17)")
        return read(file)

    monkeypatch.setattr(array_files.npy, "read_array_header_1_0", read_at_second_try)
    np.testing.assert_array_equal(array_files.map_array(path, "six numbers"), np.arange(6))
    assert len(calls) == 2
