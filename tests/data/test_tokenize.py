"""Tokenising: every format gives the same tokens, and a run that is killed and resumed writes the same bytes."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from golden_cases import FOLDER
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from jclt.cli.main import build_parser, main
from jclt.data import documents
from jclt.data.load_tokens import load_tokens
from jclt.data.tokenize import tokenize
from jclt.errors import UserError
from jclt.models import load_tokenizer

TOKENIZER = FOLDER / "llama3"  # words 4 to 95, <bos> 1 opens a text, <eos> 2 ends it
ROOT = Path(__file__).parents[2]


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"word{i}" for i in rng.integers(10, 40, rng.integers(1, 30))) for _ in range(count)]


def write_lines(path: Path, lines: list[str], field: str = "text") -> Path:
    content = "".join(json.dumps({field: text}) + "\n" for text in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    backend = Backend(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))


def tokenize_plainly(documents: list[str], end: int = 2) -> list[int]:
    tokenizer = load_tokenizer(TOKENIZER)
    assert tokenizer is not None
    return [token for text in documents for token in [*tokenizer.encode(text), end]]


def read_tokens(folder: Path) -> list[int]:
    names = [shard["name"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]
    return np.concatenate([np.load(folder / name) for name in names]).tolist()


def read_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_format_gives_the_same_tokens(tmp_path):
    texts = make_texts(40)
    write_lines(tmp_path / "in" / "a.jsonl", texts[:20])
    write_lines(tmp_path / "in" / "b.jsonl.gz", texts[20:30])
    (tmp_path / "in" / "c").mkdir()
    for n in range(30, 40):
        (tmp_path / "in" / "c" / f"{n}.txt").write_text(texts[n])
    (tmp_path / "in" / "notes.md").write_text("no input")
    manifest = tokenize([str(tmp_path / "in")], TOKENIZER, str(tmp_path / "whole"))
    assert read_tokens(tmp_path / "whole") == tokenize_plainly(texts)
    assert np.load(tmp_path / "whole" / "tokens-00000.npy").dtype == np.uint16
    assert (manifest["documents"], manifest["tokens"]) == (40, len(tokenize_plainly(texts)))
    assert manifest["tokenizer"]["vocabulary"] == 96 and manifest["end"] == 2

    patterns = [str(tmp_path / "in" / "*.jsonl*"), str(tmp_path / "in" / "c" / "*.txt")]
    tokenize(patterns, TOKENIZER, str(tmp_path / "globs"), shard_tokens=50, end="7")
    assert read_tokens(tmp_path / "globs") == tokenize_plainly(texts, 7)
    shards = json.loads((tmp_path / "globs" / "manifest.json").read_text())["shards"]
    assert len(shards) > 5 and all(50 <= shard["tokens"] < 90 for shard in shards[:-1])
    for shard in shards:
        assert np.load(tmp_path / "globs" / shard["name"])[[0, -1]].tolist() == [1, 7]


def test_parquet_gives_the_same_tokens(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed; it comes with the extra `parquet`")
    from pyarrow import parquet

    texts = make_texts(3000)
    parquet.write_table(pyarrow.table({"n": range(3000), "text": texts}), tmp_path / "a.parquet")
    tokenize([str(tmp_path / "a.parquet")], TOKENIZER, str(tmp_path / "out"))
    assert read_tokens(tmp_path / "out") == tokenize_plainly(texts)
    with pytest.raises(UserError, match="a.parquet: no column 'body', expected one of: n, text"):
        tokenize([str(tmp_path / "a.parquet")], TOKENIZER, str(tmp_path / "body"), field="body")
    with pytest.raises(UserError, match="a.parquet: row 1 has no text in 'n'"):
        tokenize([str(tmp_path / "a.parquet")], TOKENIZER, str(tmp_path / "n"), field="n")
    (tmp_path / "bad.parquet").write_text("x" * 100)
    with pytest.raises(UserError, match="bad.parquet: not a Parquet file"):
        tokenize([str(tmp_path / "bad.parquet")], TOKENIZER, str(tmp_path / "bad"))


def test_zstandard_gives_the_same_tokens(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed; fsspec unpacks .zst with it")
    path = write_lines(tmp_path / "a.jsonl", make_texts(40))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(path.read_bytes()))
    tokenize([str(tmp_path / "b.jsonl.zst")], TOKENIZER, str(tmp_path / "out"))
    assert read_tokens(tmp_path / "out") == tokenize_plainly(make_texts(40))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(UserError, match=r"a.parquet: Parquet needs pyarrow, expected `pip install 'jclt\[parquet\]'`"):
        tokenize([str(tmp_path / "a.parquet")], TOKENIZER, str(tmp_path / "out"))


def test_the_number_of_workers_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("jclt.data.tokenize.BATCH_CHARACTERS", 300)
    source = str(write_lines(tmp_path / "a.jsonl", make_texts(300)))
    for workers in (1, 2, 7):
        tokenize([source], TOKENIZER, str(tmp_path / str(workers)), workers=workers, shard_tokens=500)
    assert read_contents(tmp_path / "1") == read_contents(tmp_path / "2") == read_contents(tmp_path / "7")


def test_a_long_text_is_one_document_in_pieces_cut_at_line_breaks(tmp_path, monkeypatch):
    lines = make_texts(50)
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.setattr(documents, "BLOCK_BYTES", 64)
    sources = documents.find_inputs([str(tmp_path / "a.txt")])
    pieces = list(documents.read_pieces(sources[0]))
    assert len(pieces) > 5 and all(piece.text.endswith("\n") for piece in pieces[:-1])
    manifest = tokenize([str(tmp_path / "a.txt"), str(tmp_path / "empty.txt")], TOKENIZER, str(tmp_path / "out"))
    assert read_tokens(tmp_path / "out") == tokenize_plainly(["\n".join(lines)]) and manifest["documents"] == 1


def test_a_large_vocabulary_gets_wider_numbers(tmp_path):
    write_tokenizer(tmp_path / "big", {f"w{i}": i for i in range(70_000)})
    (tmp_path / "a.txt").write_text("w5 w69999")
    tokenize([str(tmp_path / "a.txt")], tmp_path / "big", str(tmp_path / "out"), end="w3")
    tokens = np.load(tmp_path / "out" / "tokens-00000.npy")
    assert tokens.dtype == np.uint32 and tokens.tolist() == [5, 69999, 3]
    with pytest.raises(UserError, match="names no end of text, expected --end with a token or its number"):
        tokenize([str(tmp_path / "a.txt")], tmp_path / "big", str(tmp_path / "other"))


def test_a_killed_run_that_is_resumed_writes_the_same_bytes(tmp_path):
    source = str(write_lines(tmp_path / "a.jsonl", make_texts(25_000)))
    command = [sys.executable, "-m", "jclt", "tokenize", source, "--tokenizer", str(TOKENIZER)]
    command += ["--shard-tokens", "20000", "--workers", "2", "--out"]
    tokenize([source], TOKENIZER, str(tmp_path / "whole"), shard_tokens=20_000)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stderr=subprocess.PIPE)
    deadline = time.time() + 60
    while not (tmp_path / "killed" / "tokens-00003.npy").exists() and time.time() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "killed" / "manifest.json").exists()
    with pytest.raises(UserError, match="not finished, expected the same `jclt tokenize` to be run again to its end"):
        load_tokens(tmp_path / "killed", 16, 96)

    modified = (tmp_path / "killed" / "tokens-00001.npy").stat().st_mtime_ns
    tokenize([source], TOKENIZER, str(tmp_path / "killed"), shard_tokens=20_000, workers=1)
    assert (tmp_path / "killed" / "tokens-00001.npy").stat().st_mtime_ns == modified
    assert read_contents(tmp_path / "killed") == read_contents(tmp_path / "whole")


def test_inputs_and_output_may_be_remote(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = make_texts(30)
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl", write_lines(tmp_path / "a.jsonl", texts).read_bytes())
    manifest = tokenize(["memory://corpus/*.jsonl"], TOKENIZER, "memory://tokens", shard_tokens=100)
    assert manifest["inputs"][0]["name"] == "memory:///corpus/a.jsonl"
    rows = load_tokens("memory://tokens", 8, 96, load_tokenizer(TOKENIZER))
    tokenize([str(tmp_path / "a.jsonl")], TOKENIZER, str(tmp_path / "local"), shard_tokens=100)
    local = load_tokens(tmp_path / "local", 8, 96)
    np.testing.assert_array_equal(rows.tokens[np.arange(len(rows))], local.tokens[np.arange(len(local))])
    assert rows.digest == local.digest
    memory.pipe("/tokens/tokens-00001.npy", b"elsewhere")
    np.testing.assert_array_equal(
        load_tokens("memory://tokens", 8, 96).tokens[np.array([3])], rows.tokens[np.array([3])]
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fresh"))
    with pytest.raises(
        UserError, match=r"memory://tokens/tokens-00001.npy: differs from what manifest.json says of it"
    ):
        load_tokens("memory://tokens", 8, 96)
    memory.rm("/tokens/tokens-00001.npy")
    with pytest.raises(UserError, match=r"memory://tokens/tokens-00001.npy: missing"):
        load_tokens("memory://tokens", 8, 96)
    memory.store.clear()


def test_other_settings_on_the_same_folder_are_refused(tmp_path):
    source, out = str(write_lines(tmp_path / "a.jsonl", make_texts(10))), str(tmp_path / "out")
    manifest = tokenize([source], TOKENIZER, out)
    assert tokenize([source], TOKENIZER, out, workers=1) == manifest
    other = str(write_lines(tmp_path / "b.jsonl", make_texts(10)))
    write_tokenizer(tmp_path / "words", {f"w{i}": i for i in range(50)})
    for change, line in [
        ({"shard_tokens": 9}, "was begun with another 'shard_tokens' (67108864, now 9)"),
        ({"end": "7"}, "was begun with another 'end' (2, now 7)"),
        (
            {"tokenizer": tmp_path / "words", "end": "2"},
            f"was begun with another 'tokenizer' ({TOKENIZER}, now {tmp_path / 'words'})",
        ),
        ({"inputs": [source, other]}, "was begun with another 'inputs'"),
    ]:
        with pytest.raises(UserError) as error:
            tokenize(**({"inputs": [source], "tokenizer": TOKENIZER, "out": out} | change))
        assert str(error.value) == f"{out}: {line}, expected the same or a new folder"


def test_corrected_inputs_are_accepted_as_long_as_no_shard_is_written(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="a.jsonl:1: expected a JSON object"):
        tokenize([str(tmp_path / "a.jsonl")], TOKENIZER, str(tmp_path / "out"))
    write_lines(tmp_path / "a.jsonl", make_texts(3))
    tokenize([str(tmp_path / "a.jsonl")], TOKENIZER, str(tmp_path / "out"))
    assert read_tokens(tmp_path / "out") == tokenize_plainly(make_texts(3))


@pytest.mark.parametrize("content", ["[]", "{}", '{"name": "a web page"}', "{"])
def test_a_manifest_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "a.txt").write_text("word10")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="exists and holds no tokens"):
        tokenize([str(tmp_path / "a.txt")], TOKENIZER, str(tmp_path / "out"))
    assert (tmp_path / "out" / "manifest.json").read_text() == content


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"a.jsonl": b'{"text": "word10"}\n\n{"txt": 1}\n'}, "a.jsonl:3: expected a JSON object with 'text'"),
        ({"a.txt": b"word10 \xff"}, "a.txt: not UTF-8 text (byte 7)"),
        ({"a.txt": b""}, "a.txt: empty, expected text"),
        ({"a.jsonl.gz": b"no gzip"}, "a.jsonl.gz: cannot be read (Not a gzipped file (b'no'))"),
        (
            {"a.jsonl.gz": gzip.compress(b'{"text": "a"}' * 9)[:-12]},
            "a.jsonl.gz: cannot be read (Compressed file ended",
        ),
        ({"a.jsonl.xz": b"no xz"}, "a.jsonl.xz: cannot be read (Input format not supported by decoder)"),
        ({"a.jsonl.zip": b"no zip"}, "a.jsonl.zip: cannot be read (File is not a zip file)"),
        ({"a.jsonl.lz4": b"?"}, "a.jsonl.lz4: fsspec finds no package installed that unpacks this"),
    ],
)
def test_damaged_inputs_are_refused_in_one_line(tmp_path, content, line):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        tokenize([str(tmp_path / next(iter(content)))], TOKENIZER, str(tmp_path / "out"))
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(documents, "BLOCK_BYTES", 100)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 100_000))
    with pytest.raises(UserError, match=r"a.jsonl.gz: a line of more than 1000 bytes \(from byte 0 on\)"):
        list(documents.read_pieces(documents.find_inputs([str(tmp_path / "a.jsonl.gz")])[0]))


def test_json_lines_may_be_as_deep_or_long_as_they_like(tmp_path):
    for line, message in (
        ("[" * 100_000, "a.jsonl:1: not valid JSON (nested too deeply)"),
        ('{"text": ' + "1" * 5000 + "}", "a.jsonl:1: not valid JSON (Exceeds the limit"),
        ("{", "a.jsonl:1: not valid JSON (Expecting property name"),
    ):
        (tmp_path / "a.jsonl").write_text(line + "\n")
        with pytest.raises(UserError) as error:
            list(documents.read_pieces(documents.find_inputs([str(tmp_path / "a.jsonl")])[0]))
        assert message in str(error.value)


def test_pipes_in_a_folder_of_inputs_are_skipped(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("word10")
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "in" / "a.txt")
    os.mkfifo(tmp_path / "in" / "b.txt")
    assert [Path(source.path).name for source in documents.find_inputs([str(tmp_path / "in")])] == ["a.txt", "link.txt"]


def test_a_folder_with_only_leftovers_counts_as_empty(tmp_path):
    source, out = str(write_lines(tmp_path / "a.jsonl", make_texts(10))), tmp_path / "out"
    out.mkdir()
    leftover = out / f"manifest.partial.json.{socket.gethostname()}-{2**22 + 1}.partial"
    leftover.write_text("{")
    tokenize([source], TOKENIZER, str(out))
    assert sorted(read_contents(out)) == ["manifest.json", "tokenizer.json", "tokens-00000.npy"]


def test_the_librarys_setting_of_threads_is_restored(tmp_path, monkeypatch):
    source = str(write_lines(tmp_path / "a.jsonl", make_texts(10)))
    for before in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if before:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        tokenize([source], TOKENIZER, str(tmp_path / f"out {before}"))
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_half_a_surrogate_pair_is_read_as_other_decoders_read_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "word10 \\ud800 word11"}\n')
    tokenize([str(tmp_path / "a.jsonl")], TOKENIZER, str(tmp_path / "out"))
    assert read_tokens(tmp_path / "out") == tokenize_plainly(["word10 \ufffd word11"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"inputs": ["{}/none*.txt"]},
            "input '{}/none*.txt': nothing found, expected a file, a glob, or a folder with",
        ),
        ({"inputs": ["gs2://bucket/a"]}, "'gs2://bucket/a': cannot be opened (Protocol not known: gs2)"),
        ({"tokenizer": Path("none")}, "tokenizer 'none': no tokenizer.json there"),
        ({"end": "word99"}, f"end token 'word99': not in the vocabulary of {TOKENIZER}"),
        ({"end": "96"}, f"end token '96': not in the vocabulary of {TOKENIZER}"),
        ({"workers": 0}, "workers: 0, expected at least 1"),
        ({"shard_tokens": 0}, "shard-tokens: 0, expected at least 1"),
        ({"out": "{}"}, "{}: exists and holds no tokens, expected a new folder or one to resume"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, change, line):
    (tmp_path / "a.txt").write_text("word10")
    fill = lambda x: x.replace("{}", str(tmp_path)) if isinstance(x, str) else x  # noqa: E731
    arguments = {"inputs": ["{}/a.txt"], "tokenizer": TOKENIZER, "out": "{}/out"} | change
    arguments = {name: [fill(v) for v in x] if isinstance(x, list) else fill(x) for name, x in arguments.items()}
    with pytest.raises(UserError) as error:
        tokenize(**arguments)
    assert str(error.value).startswith(fill(line))
    assert not (tmp_path / "out").exists()


def test_the_command_teaches_and_reports(tmp_path, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["tokenize", "--help"])
    assert "example: jclt tokenize 'stories/*.jsonl.gz'" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("word10 word11")
    arguments = ["tokenize", str(tmp_path / "a.txt"), "--tokenizer", str(TOKENIZER), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"done: 4 tokens of 1 documents, 1 shards in {tmp_path / 'out'}\n"
    assert main([*arguments, "--end", "5"]) == 2
    assert capsys.readouterr().err.startswith(f"jclt: {tmp_path / 'out'}: was begun with another 'end' (2, now 5)")
