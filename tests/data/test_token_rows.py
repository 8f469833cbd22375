"""Rows, their order, where they come to lie, and batches made ahead of time."""

import hashlib
import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from golden_cases import FOLDER
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from jclt.data.activation_store import create_store
from jclt.data.batches import batch_rows, place, shuffled
from jclt.data.load_tokens import load_tokens, pack_rows, text_rows, text_tokens
from jclt.data.prefetch import mapped_ahead, prefetched
from jclt.data.token_rows import (
    HELD_OUT,
    RESERVED_MOST,
    TokenRows,
    load_rows,
    reserved,
    reserved_rows,
    save_rows,
    trained_rows,
)
from jclt.data.tokenize import tokenize
from jclt.errors import UserError
from jclt.mesh import make_mesh, sharding
from jclt.models import ModelConfig, Tokenizer, load_tokenizer
from jclt.training.config import LmConfig
from jclt.training.lm import find_tokenizer
from jclt.training.run_folder import place_of
from jclt.training.run_rows import find_rows

TOKENIZER = FOLDER / "llama3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven documents in four shards of at least 100 tokens."""
    here = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    for n in range(7):
        (here / f"{n}.txt").write_text(" ".join(f"word{i}" for i in rng.integers(10, 90, 60)))
    tokenize([str(here / "*.txt")], TOKENIZER, str(here / "out"), shard_tokens=100)
    return here / "out"


@pytest.mark.parametrize("count", [1, 2, 3, 10, 16, 17, 1000, 4097, 100_000])
def test_every_epoch_visits_every_row_once(count):
    found = shuffled(np.arange(count), count, (0, 0))
    assert np.array_equal(np.sort(found), np.arange(count))
    assert np.array_equal(shuffled(np.arange(count)[::-1], count, (0, 0)), found[::-1])
    if count > 10:
        assert (shuffled(np.arange(count), count, (0, 1)) != found).mean() > 0.8
        assert (shuffled(np.arange(count), count, (1, 0)) != found).mean() > 0.8


def test_the_order_looks_shuffled():
    count, keys = 12, 6000
    seen = np.stack([shuffled(np.arange(count), count, (7, key)) for key in range(keys)])
    # Every number at every place, and every pair of neighbours, as often as chance has it: chi-squared over its degrees
    # of freedom is near 1.
    singles = np.stack([np.bincount(seen[:, at], minlength=count) for at in range(count)])
    pairs = np.bincount((seen[:, :-1] * count + seen[:, 1:]).ravel(), minlength=count**2).reshape(count, count)
    pairs = pairs[~np.eye(count, dtype=bool)]
    for counts in (singles, pairs):
        expected = counts.mean()
        assert ((counts - expected) ** 2 / expected).mean() < 1.3
    large = shuffled(np.arange(100_000), 100_000, (0, 0)).astype(float)
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(large, np.arange(100_000))[0, 1]) < 0.02
    halves = np.bincount((large[:1000] // 10_000).astype(int), minlength=10)
    assert halves.min() > 60 and halves.max() < 140


def test_billions_of_rows_cost_what_few_do():
    count = 3_000_000_000_000
    rows = TokenRows(np.broadcast_to(np.uint16(1), (count, 4)), np.broadcast_to(np.float16(1), (count, 4)))
    began = time.perf_counter()
    drawn = np.concatenate([batch_rows(len(rows), 0, step, 1024) for step in (0, 1, count // 1024 - 1)])
    assert time.perf_counter() - began < 0.5
    assert len(set(drawn.tolist())) == 3 * 1024 and 0 <= drawn.min() and drawn.max() < count
    assert abs(drawn.mean() / count - 0.5) < 0.05


@pytest.mark.parametrize("length", [7, 16, 100])
def test_rows_of_any_length_are_those_of_the_shards(folder, length):
    rows = load_tokens(folder, length, 96, load_tokenizer(TOKENIZER))
    want = []
    for path in sorted(folder.glob("tokens-*.npy")):
        shard = np.load(path)
        want += [shard[at : at + length] for at in range(0, len(shard) - length + 1, length)]
    assert len(rows) == len(want) and rows.tokens.shape == (len(want), length)
    index = np.random.default_rng(0).permutation(len(want))
    tokens, weights = rows.read(index)
    np.testing.assert_array_equal(tokens, np.stack(want)[index])
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
def test_a_damaged_shard_gets_one_line(folder, tmp_path, how, line):
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
def test_a_manifest_that_is_built_otherwise_gets_one_line(folder, tmp_path, changes, line):
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
def test_a_shards_name_leads_nowhere_but_into_the_folder(folder, tmp_path, monkeypatch, name):
    """A folder elsewhere names what is written here: under the cache, and nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = f"{tmp_path}/written.npy" if name == "/a.npy" else name
    shutil.copytree(folder, tmp_path / "out")
    content = (folder / "tokens-00001.npy").read_bytes()
    change_shard(tmp_path / "out", 1, name=name, digest=hashlib.sha256(content).hexdigest())
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "out").iterdir():
        memory.pipe(f"/foreign/{path.name}", path.read_bytes())
    memory.pipe(f"/foreign/{name}", content)
    for place_of_tokens in (tmp_path / "out", "memory://foreign"):
        with pytest.raises(UserError, match="is no file's name, expected one such as tokens-00000.npy"):
            load_tokens(place_of_tokens, 16, 96)
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
    opened: list[str] = []
    monkeypatch.setattr(
        "jclt.data.token_rows.hashlib.sha256", lambda *x: opened.append("") or hashlib.new("sha256", *x)
    )
    load_tokens(folder, 7, 96)
    assert len(opened) == 1, "but for the digest of all shards' digests"


@pytest.mark.parametrize("sizes", [[122, 124, 66], [2000, 1300, 30, 5], [6400], [40_000, 3], [16 * RESERVED_MOST, 9]])
def test_a_run_of_any_length_leaves_alone_what_the_evaluation_reads(sizes):
    """Of tokens that are all different, in shards of these sizes."""
    ends = np.cumsum(sizes)
    shards = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    read = [reserved_rows(shards, length).ravel() for length in (2, 16, 64)]
    assert reserved(sum(sizes)) - 2 * len(sizes) <= len(read[0]) <= reserved(sum(sizes)) <= RESERVED_MOST
    for length in (2, 7, 16, 33, 64, 100):
        rows = pack_rows(shards, length, "")
        count = trained_rows(TokenRows(rows, np.zeros(rows.shape)), "a folder")
        assert count <= len(rows) - HELD_OUT
        if count > 0:
            assert rows[np.arange(count)].max() < min(own.min() for own in read if len(own))
        if 0 < count < len(rows) - HELD_OUT:
            assert rows[np.array([count])].max() >= sum(sizes) - reserved(sum(sizes)), "no row is left out for nothing"


def test_of_the_small_world_only_the_runs_own_rows_are_kept_apart():
    rows = TokenRows(np.zeros((1000, 16), np.uint16), np.zeros((1000, 16)))
    assert trained_rows(rows, "world") == 1000 - HELD_OUT > trained_rows(rows, "text.txt") == 937


def test_a_text_that_is_trained_on_and_evaluated_is_cut_at_one_place(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"word{10 + n % 80}" for n in range(3000)))
    tokenizer = load_tokenizer(TOKENIZER)
    ids = text_tokens(tmp_path / "a.txt", tokenizer, (2,))
    for length in (2, 16, 17, 64):
        rows = TokenRows(*text_rows(tmp_path / "a.txt", tokenizer, length, (2,)))
        assert trained_rows(rows, "a.txt") * length <= len(ids) - reserved(len(ids))
        np.testing.assert_array_equal(reserved_rows([ids], length)[0], ids[len(ids) - reserved(len(ids)) :][:length])


def test_damaged_rows_of_a_run_get_one_line(tmp_path):
    save_rows(tmp_path, np.zeros((4, 8), np.uint16), np.ones((4, 8), np.float16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.npy", "weights.npy"]
    (tmp_path / "tokens.npy").write_bytes((tmp_path / "tokens.npy").read_bytes()[:-3])
    with pytest.raises(UserError, match=r"tokens.npy: damaged \(.*\), expected a run's rows \[N, T\]"):
        load_rows(tmp_path)


def test_rows_come_to_lie_where_they_belong_and_are_read_once():
    mesh = make_mesh(2, 4)
    rows = TokenRows(np.arange(400, dtype=np.uint16).reshape(50, 8), np.linspace(0, 1, 400).reshape(50, 8))
    index = batch_rows(len(rows), 0, 3, 16)
    asked: list[np.ndarray] = []

    def read(which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked.append(which)
        return rows.read(which)

    for axes, parts in [(("batch", None), 8), (("tokens", None), 2), ((None, None), 1)]:
        asked.clear()
        placed = sharding(mesh, (16, 8), axes)
        tokens, weights = place(read, index, placed)
        want = jax.device_put(rows.read(index), placed)
        assert tokens.sharding == weights.sharding == placed and tokens.dtype == np.int32
        for got, expected in zip((tokens, weights), want, strict=True):
            np.testing.assert_array_equal(got, expected)
            for mine, theirs in zip(got.addressable_shards, expected.addressable_shards, strict=True):
                np.testing.assert_array_equal(mine.data, theirs.data)
        assert np.array_equal(np.concatenate(asked), index) and len(asked) == parts + 1


def test_activations_of_a_store_are_placed_the_same_way(tmp_path):
    store = create_store(tmp_path / "store", {}, 8, (2, 3, 4), "bfloat16")
    values = np.arange(192, dtype=np.float32).reshape(8, 2, 3, 4)
    store.write(0, values, -values)
    index, mesh = np.array([5, 1, 7, 2]), make_mesh(2, 4)
    inputs, targets = place(store.read, index, NamedSharding(mesh, P("data", None, None, "features")))
    np.testing.assert_array_equal(np.asarray(inputs, np.float32), values[index])
    np.testing.assert_array_equal(np.asarray(targets, np.float32), -values[index])
    assert {shard.data.shape for shard in inputs.addressable_shards} == {(2, 2, 3, 1)}


def test_batches_come_in_order_and_a_few_ahead():
    made: list[int] = []

    def batch(step: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        made.append(step)
        return step * step

    with prefetched(batch, 3, 40, depth=2) as batches:
        for step, got in enumerate(batches, 3):
            assert got == step * step and len(made) <= step - 3 + 3
    assert made == list(range(3, 40))
    with prefetched(batch, 3, 3) as batches:
        assert list(batches) == []


def test_what_goes_wrong_in_a_batch_is_raised_where_it_is_used():
    def batch(step: int) -> int:
        if step == 4:
            raise UserError("shard 4: missing")
        return step

    seen, threads = [], threading.active_count()
    with pytest.raises(UserError, match="shard 4: missing"), prefetched(batch, 0, 9) as batches:
        for got in batches:
            seen.append(got)
    assert seen == [0, 1, 2, 3] and threading.active_count() == threads


def test_stopping_early_leaves_no_thread():
    made: list[int] = []

    def batch(step: int) -> int:
        made.append(step)
        time.sleep(0.01)
        return step

    began, threads = time.perf_counter(), threading.active_count()
    with pytest.raises(KeyError), prefetched(batch, 0, 10_000, depth=5) as batches:
        next(batches)
        raise KeyError
    assert time.perf_counter() - began < 1 and len(made) <= 6 and threading.active_count() == threads


def test_several_workers_keep_the_order():
    def slow(n: int) -> int:
        time.sleep(0.002 * (n % 3))
        return n

    with mapped_ahead(slow, range(50), workers=4, depth=8) as results:
        assert list(results) == list(range(50))


def test_a_run_takes_its_rows_and_its_tokenizer_from_the_folder(folder, tmp_path):
    config = LmConfig(ModelConfig("llama", 96, 16, 2, 2, 32, 32), data=str(tmp_path / "data"), length=16)
    shutil.copytree(folder, config.data)
    tokenizer = find_tokenizer(config)
    assert tokenizer.encode("word10") == [1, 10]

    def rows() -> TokenRows:
        return find_rows(tmp_path / "run", config, 96, tokenizer, (2,), lambda: pytest.fail("no world is asked for"))

    assert rows().digest == rows().digest == load_tokens(folder, 16, 96).digest
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "data.json"]
    shutil.rmtree(config.data)
    tokenize([str(folder.parent / "[0-5].txt")], TOKENIZER, config.data)
    with pytest.raises(UserError, match="other tokens than those that the run in .* began with"):
        rows()
    with pytest.raises(UserError, match="setting 'model.vocabulary': 50, expected at least 96"):
        find_tokenizer(replace(config, model=replace(config.model, vocabulary=50)))


# A run's place.


def test_a_run_on_a_bucket_keeps_its_small_files_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = "memory://bucket/run/"
    home = place_of(url)
    assert home.url == "memory://bucket/run" and home.checkpoints == "memory://bucket/run/checkpoints"
    (home.folder / "coder").mkdir(parents=True)
    (home.folder / "data").mkdir()
    for name in ("config.json", "metrics.jsonl", "coder/W.safetensors", "data/tokens.npy", "metrics.partial"):
        (home.folder / name).write_text(name)
    home.publish()
    system, path = fsspec.url_to_fs(url)
    there = {name.removeprefix(f"{path.rstrip('/')}/") for name in system.find(path)}
    assert there == {"config.json", "metrics.jsonl", "coder/W.safetensors"}
    # Another host, or this one later: what the bucket says counts.
    system.pipe_file(f"{path}/config.json", b"newer")
    assert (place_of(url).folder / "config.json").read_text() == "newer"
    system.rm(path, recursive=True)
    assert not (place_of(url).folder / "config.json").exists()


def test_a_folder_is_its_own_place(tmp_path):
    home = place_of(tmp_path / "run")
    assert home.folder == tmp_path / "run" and home.url is None
    assert home.checkpoints == str(tmp_path / "run" / "checkpoints")
    home.publish()
    assert not home.folder.exists()
