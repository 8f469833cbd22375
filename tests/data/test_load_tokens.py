"""Folders of token shards, and texts, as rows; damaged files are refused in one line."""

import hashlib
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from golden_cases import FOLDER
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from jclt.data.load_tokens import _read_documents, load_tokens, read_text_rows
from jclt.errors import UserError
from jclt.models import Tokenizer, load_tokenizer

TOKENIZER = FOLDER / "llama3"


@pytest.mark.parametrize("length", [7, 16, 100])
def test_rows_of_any_length_are_those_of_the_shards(folder, length):
    rows = load_tokens(folder, length, 96, load_tokenizer(TOKENIZER))
    expected = []
    for path in sorted(folder.glob("tokens-*.npy")):
        shard = np.load(path)
        expected += [shard[at : at + length] for at in range(0, len(shard) - length + 1, length)]
    assert len(rows) == len(expected) and rows.tokens.shape == (len(expected), length)
    index = np.random.default_rng(0).permutation(len(expected))
    tokens, weights = rows.read(index)
    np.testing.assert_array_equal(tokens, np.stack(expected)[index])
    assert tokens.dtype == np.int32 and weights.shape == tokens.shape and (weights == 1).all()


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "header":
        path.write_bytes(b"?" + path.read_bytes()[1:])
    else:
        np.save(path, np.load(path).astype(how))


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("missing", "not found, expected a shard of 124 tokens"),
        ("short", "damaged ("),
        ("empty", "damaged ("),
        ("header", "damaged ("),
        ("int64", "holds int64 of shape (124,), expected 124 tokens of uint16"),
    ],
)
def test_a_damaged_shard_is_refused_in_one_line(folder, tmp_path, how, line):
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out" / "tokens-00001.npy"
    damage(path, how)
    with pytest.raises(UserError) as error:
        load_tokens(tmp_path / "out", 16, 96)
    assert str(error.value).startswith(f"{path}: {line}") and "\n" not in str(error.value)


def test_tokens_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="96 token ids, expected at most 50"):
        load_tokens(folder, 16, 50)
    with pytest.raises(UserError, match=f"tokenised with {TOKENIZER}, expected the model's own tokenizer"):
        load_tokens(folder, 16, 96, Tokenizer(Backend(WordLevel({"a": 0}))))
    with pytest.raises(UserError, match=r"no shard has more than 124 tokens, expected 125 \(one row\)"):
        load_tokens(folder, 125, 96)
    with pytest.raises(UserError, match="no manifest.json, expected a folder made by `jclt tokenize`"):
        load_tokens(tmp_path, 16, 96)
    for content, line in [("{}", "not what `jclt tokenize` writes"), ('{"format": 9}', "format 9, expected format 1")]:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=line):
            load_tokens(tmp_path, 16, 96)


def change_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_shard(folder: Path, number: int, **changes) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    change_manifest(folder, shards=[shard | changes if n == number else shard for n, shard in enumerate(shards)])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tokenizer": None}, "'tokenizer' is damaged, expected its name, digest and vocabulary"),
        ({"tokenizer": {"name": "a", "digest": "b", "vocabulary": "96"}}, "'tokenizer' is damaged"),
        ({"dtype": ["uint16"]}, "'dtype' is ['uint16'], expected uint16 or uint32"),
        ({"shards": {}}, "'shards' is missing, expected a list"),
        ({"shards": []}, "names no shards, expected at least one"),
        ({"shards": [7]}, "shard 0 is damaged, expected its name, tokens and digest"),
        ({"shards": [{"name": "a.npy", "tokens": 1, "digest": "b", "next": [0]}]}, "shard 'a.npy' is damaged"),
    ],
)
def test_a_manifest_with_wrong_fields_is_refused_in_one_line(folder, tmp_path, changes, line):
    shutil.copytree(folder, tmp_path / "out")
    change_manifest(tmp_path / "out", **changes)
    with pytest.raises(UserError) as error:
        load_tokens(tmp_path / "out", 16, 96)
    assert str(error.value).startswith(f"{tmp_path / 'out'}/manifest.json: {line}")


def test_a_manifest_may_have_a_byte_order_mark_but_must_be_utf_8(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    text = path.read_text()
    path.write_text(text, encoding="utf-8-sig")
    assert len(load_tokens(tmp_path / "out", 16, 96)) == len(load_tokens(folder, 16, 96))
    path.write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=r"manifest.json: not UTF-8 text \(byte 0\)"):
        load_tokens(tmp_path / "out", 16, 96)


@pytest.mark.parametrize("name", ["/a.npy", "../a.npy", "..", ".", "", "b/a.npy", "b\\a.npy", "a\n.npy", "a\0.npy"])
def test_the_name_of_a_shard_cannot_lead_out_of_the_folder(folder, tmp_path, monkeypatch, name):
    """The manifest of a remote folder names the files that are written here; they are written only to the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = f"{tmp_path}/written.npy" if name == "/a.npy" else name
    shutil.copytree(folder, tmp_path / "out")
    content = (folder / "tokens-00001.npy").read_bytes()
    change_shard(tmp_path / "out", 1, name=name, digest=hashlib.sha256(content).hexdigest())
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "out").iterdir():
        memory.pipe(f"/foreign/{path.name}", path.read_bytes())
    memory.pipe(f"/foreign/{name}", content)
    for url in (tmp_path / "out", "memory://foreign"):
        with pytest.raises(UserError, match="is no file's name, expected one such as tokens-00000.npy"):
            load_tokens(url, 16, 96)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    memory.store.clear()


def test_tokens_are_compared_with_their_digest_and_with_the_vocabulary(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out" / "tokens-00002.npy"
    shard = np.load(path)
    shard[5] ^= 1
    np.save(path, shard)
    with pytest.raises(UserError) as error:
        load_tokens(tmp_path / "out", 16, 96)
    assert str(error.value) == f"{path}: differs from what manifest.json says of it, expected it as it was written"
    shard[5] = 60_000
    np.save(path, shard)
    change_shard(tmp_path / "out", 2, digest=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(UserError) as error:
        load_tokens(tmp_path / "out", 16, 96)
    assert str(error.value) == f"{path}: holds token id 60000, expected at most 95, the vocabulary's last"


def test_tokens_are_read_from_end_to_end_once(folder, monkeypatch):
    load_tokens(folder, 16, 96)
    hashes: list[str] = []
    monkeypatch.setattr(
        "jclt.data.load_tokens.hashlib.sha256", lambda *x: hashes.append("") or hashlib.new("sha256", *x)
    )
    load_tokens(folder, 7, 96)
    assert len(hashes) == 1, "only the digest of all shards' digests"


def test_json_lines_and_their_faults(tmp_path):
    file, tokenizer = tmp_path / "data.jsonl", load_tokenizer(TOKENIZER)
    file.write_text('{"text": "word10 word11 word12"}\n' * 40)
    rows, weights = read_text_rows(file, tokenizer, 16, ())
    assert rows.shape == (10, 16) == weights.shape
    assert rows[0, :4].tolist() == [1, 10, 11, 12]
    file.write_text('{"text": "word10"}\n{"txt": 1}\n')
    with pytest.raises(UserError, match="data.jsonl:2: expected a JSON object with 'text'"):
        read_text_rows(file, tokenizer, 16, ())
    file.write_text('{"text": "word10"}\n')
    with pytest.raises(UserError, match="2 tokens, expected at least 16"):
        read_text_rows(file, tokenizer, 16, ())


def test_text_keeps_its_blank_lines_and_json_lines_their_numbers(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n\ntwo\n")
    assert _read_documents(plain) == ["one\n\ntwo\n"]
    lines.write_text('{"text": "one"}\n\n{"text": "t\u2028wo"}\n', encoding="utf-8")
    assert _read_documents(lines) == ["one", "t\u2028wo"]
    lines.write_text('{"text": "one"}\n\n{}\n')
    with pytest.raises(UserError, match="a.jsonl:3: expected a JSON object with 'text'"):
        _read_documents(lines)
