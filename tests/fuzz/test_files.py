"""Every reader, on damaged files: it refuses them in one line that names the file, or reads the undamaged content."""

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import pytest
from graph_lists import replace_lists
from numpy.random import Generator

from fuzz.limits import Fault, check_line, describe_error, fill_pipe_later, format_faults, limit_resources, list_tree
from fuzz.mutations import BYTES, DEEP, LONG, archive, bomb, members, mutations_of, pick, store_member
from fuzz.samples import SAMPLES, Sample, annotated_graph
from jclt.attribution.many_prompts import read_prompts
from jclt.data.load_tokens import load_tokens
from jclt.errors import UserError
from jclt.graphs import Graph, load_graph

pytestmark = pytest.mark.fuzz


@dataclass(frozen=True)
class StoredSample:
    """A sample on disk, and the numbers that are read from it."""

    sample: Sample
    folder: Path
    files: dict[str, bytes]
    numbers: Any

    def restore(self) -> None:
        """Writes the sample's files again. Removes the old files first, since an earlier reader may still map one."""
        for name in list_tree(self.folder.parent) - {"cache", "cache/jclt"}:
            path = self.folder.parent / name
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        shutil.rmtree(self.folder.parent / "cache", ignore_errors=True)
        for name, content in self.files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], StoredSample]:
    """Makes each sample once, when it is first needed."""
    samples: dict[str, StoredSample] = {}

    def find(name: str) -> StoredSample:
        if name not in samples:
            folder = tmp_path_factory.mktemp(name) / "layer_0"  # some layouts take the layer from the path
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
                sample = SAMPLES[name]
                sample.make(folder)
                files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
                loaded = sample.read(folder)  # this also imports whatever is imported late
                samples[name] = StoredSample(sample, folder, files, sample.numbers and sample.numbers(loaded))
        return samples[name]

    return find


def test_every_sound_file_is_read(sound):
    for name in SAMPLES:
        stored = sound(name)
        stored.restore()
        again = stored.sample.read(stored.folder)
        assert stored.sample.numbers is None or are_equal(stored.sample.numbers(again), stored.numbers)


def are_equal(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind == "f") if isinstance(x, np.ndarray) else x == y
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# What a path may hold in place of a file.


def nothing(path: Path) -> None:
    pass


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def unreadable(path: Path) -> None:
    path.write_bytes(b"secret")
    path.chmod(0)


PLACES: tuple[Callable[[Path], None], ...] = (nothing, folder, pipe, link_to_itself, link_to_nothing, unreadable)


def damage(rng: Generator, stored: StoredSample) -> tuple[str, str, bool]:
    """Damages one file of the folder. Returns which and how, and whether only its bytes were changed."""
    name = pick(rng, sorted(stored.files))
    path, content = stored.folder / name, stored.files[name]
    path.unlink()
    kind = rng.random()
    if kind < 0.06:
        place = pick(rng, PLACES)
        place(path)
        return name, place.__name__, False
    if kind < 0.08:
        other = pick(rng, sorted(stored.files))
        path.write_bytes(stored.files[other])
        return name, f"content of {other}", False
    change = pick(rng, mutations_of(name) if len(content) > 1 else BYTES[:1])
    damaged = change(rng, content)
    path.write_bytes(damaged)
    return name, change.__name__, change in BYTES and len(damaged) > 0


def examine(stored: StoredSample, name: str, bytes_alone: bool = False) -> list[Fault]:
    """The faults in reading the folder, in which this file is damaged."""
    earlier, loaded, faults, waited = list_tree(stored.folder.parent), None, [], []
    try:
        with fill_pipe_later(stored.folder / name) as waited, limit_resources(stored.sample.memory) as faults:
            loaded = stored.sample.read(stored.folder)
            if stored.sample.numbers is not None:
                loaded = stored.sample.numbers(loaded)
    except UserError as error:
        fault = check_line(
            str(error), str(stored.folder), "memory://tokens", *(Path(part).name for part in stored.files)
        )
        faults += [fault] if fault else []
    except Exception as error:  # the tests look for these
        faults.append(describe_error(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | pytest.exit.Exception):
            raise
        faults.append(describe_error(error))  # a hang, or a panic of a library in Rust
    else:
        if bytes_alone and name.endswith(stored.sample.checked) and not are_equal(loaded, stored.numbers):
            faults.append(Fault("read as other numbers", "though a checksum tells"))
    allowed = [f"layer_0/{part}" for part in stored.sample.writes] + [*stored.sample.writes]
    for path in sorted(list_tree(stored.folder.parent) - earlier):
        if not any(path.startswith(part) or part.startswith(path) for part in allowed):
            faults.append(Fault("something is written", path))
    return faults + waited


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_files_are_refused_in_one_line_or_read(name, sound, draw, monkeypatch):
    stored = sound(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(stored.folder.parent / "cache"))
    count = max(1, round(draw.inputs * stored.sample.share / sum(sample.share for sample in SAMPLES.values())))
    faults: dict[str, list[str]] = {}
    for number in range(count) if draw.only is None else [draw.only]:
        rng = np.random.default_rng([draw.seed, zlib.crc32(name.encode()), number])
        stored.restore()
        file, how, bytes_alone = damage(rng, stored)
        for fault in examine(stored, file, bytes_alone):
            faults.setdefault(fault.cause, []).append(f"number {number}, {file}, {how}: {fault.detail}")
    stored.restore()
    assert not faults, f"\n{format_faults(faults)}"


# Inputs that once caused a fault.


def header(**entries: Any) -> Callable[[bytes], bytes]:
    """Changes these fields of the first tensor in a header of safetensors."""

    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header_fields = json.loads(data[8 : 8 + length])
        first = next(name for name in header_fields if name != "__metadata__")
        header_fields[first] = header_fields[first] | entries
        text = json.dumps(header_fields).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return change


def values(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def raw(text: str) -> Callable[[bytes], bytes]:
    return lambda data: text.encode()


def in_archive(name: str, content: bytes) -> Callable[[bytes], bytes]:
    """Replaces a member of the archive, or adds one."""

    def change(data: bytes) -> bytes:
        others = [part for part in members(data) if part.name != name.encode()]
        return archive([*others, store_member(name.encode(), content)])

    return change


def with_bomb(data: bytes) -> bytes:
    return archive([*members(data), bomb()])


def flip_bit(share: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = int(share * len(data))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return change


def edge_within_a_layer(data: bytes) -> bytes:
    content = json.loads(data)
    features = [node["node_id"] for node in content["nodes"] if node["feature_type"] == "cross layer transcoder"]
    content["links"].append({"source": features[1], "target": features[0], "weight": 1.0})
    return json.dumps(content).encode()


EXAMPLES: list[tuple[str, str, Callable[[bytes], bytes] | str]] = [
    ("model-gpt2", "config.json", raw(DEEP)),
    ("model-gpt2", "config.json", raw('{"n_layer": ' + LONG + "}")),
    ("model-gpt2", "config.json", values(n_layer=4 * 10**12)),
    ("model-gpt2", "config.json", values(n_layer=40_000_000)),
    ("model-llama3-shards", "config.json", values(num_hidden_layers=4 * 10**12)),
    ("model-llama3-shards", "config.json", values(hidden_size=10**400)),
    ("model-llama3-shards", "config.json", values(rope_scaling={"rope_type": 3})),
    ("model-llama3-shards", "config.json", values(model_type=["llama"])),
    ("model-gemma3", "config.json", values(num_hidden_layers=4 * 10**12)),
    ("model-gemma3", "config.json", values(layer_types=None, sliding_window_pattern="two")),
    ("model-gpt2", "generation_config.json", raw(DEEP)),
    ("model-llama3-shards", "model.safetensors.index.json", values(weight_map=["a"])),
    ("model-llama3-shards", "model.safetensors.index.json", values(weight_map={"a": "../../outside"})),
    ("model-llama3-shards", "model.safetensors.index.json", values(weight_map={"a": "a\x1b[31m\nb"})),
    ("model-llama3-shards", "model.safetensors.index.json", raw(DEEP)),
    ("model-gpt2", "model.safetensors", header(dtype="F4")),
    ("model-gpt2", "model.safetensors", header(dtype=None)),
    ("model-gpt2", "model.safetensors", header(shape=None)),
    ("model-gpt2", "model.safetensors", header(shape=[-8, -8])),
    ("model-gpt2", "model.safetensors", header(data_offsets=[0])),
    ("model-gpt2", "model.safetensors", header(data_offsets=[4, 260])),
    ("model-gpt2", "tokenizer.json", raw(DEEP)),
    ("coder-jclt-clt", "config.json", raw(DEEP)),
    ("coder-jclt-clt", "W_enc_0.safetensors", header(data_offsets=[4, 196])),
    ("coder-circuit-tracer-clt", "config.yaml", raw("[" * 5_000)),
    ("coder-circuit-tracer-clt", "config.yaml", raw("# " + "]" * 9_000 + "\n" + "[" * 5_000)),
    ("coder-circuit-tracer-clt", "config.yaml", raw(f"k: {LONG}")),
    ("coder-circuit-tracer-clt", "config.yaml", raw("scan: 0001-99-99")),
    ("coder-saelens", "layer_0/cfg.json", values(metadata="text")),
    ("coder-saelens", "layer_0/cfg.json", values(architecture={"a": 1})),
    ("coder-gemma-scope", "layer_0/params.npz", flip_bit(0.2)),
    ("coder-gemma-scope", "layer_0/params.npz", lambda data: data[: len(data) // 2]),
    ("coder-gemma-scope", "layer_0/params.npz", with_bomb),
    ("graph-npz", "graph.npz", in_archive("bias.npy", b"no array")),
    ("graph-npz", "graph.npz", in_archive("bias.npy", b"\x93NUMPY\1\0\4\0{{{(")),
    ("graph-json", "graph.json", raw(DEEP)),
    ("graph-json", "graph.json", edge_within_a_layer),
    ("graph-json", "graph.json", values(nodes=[], links=[], metadata={"prompt_tokens": ["a"] * 20_000})),
    ("prompts-txt", "prompts.txt", lambda data: "Grüße\n".encode("latin-1")),
    ("prompts-jsonl", "prompts.jsonl", raw('{"prompt": 5}')),
    ("prompts-jsonl", "prompts.jsonl", raw('{"prompt": {"a": 1}}')),
    ("prompts-jsonl", "prompts.jsonl", raw(DEEP)),
    ("tokens", "manifest.json", lambda data: data.decode().encode("utf-16")),
    ("tokens", "manifest.json", raw('{"format": 1}')),
    ("tokens", "manifest.json", values(shards={})),
    ("tokens", "manifest.json", raw(DEEP)),
    ("tokens", "tokens-00000.npy", lambda data: b"\x93NUMPY\1\0\4\0{{{("),
    ("tokens", "tokens-00000.npy", flip_bit(0.99)),
    ("tokens", "tokens-00000.npy", lambda data: data[:-2] + (60_000).to_bytes(2, "little")),
    ("documents-jsonl", "text.jsonl", raw(DEEP)),
    ("run", "config.json", raw(DEEP)),
    *(
        (name, file, place.__name__)
        for name, file in (
            ("model-gpt2", "config.json"),
            ("model-gpt2", "model.safetensors"),
            ("coder-circuit-tracer-clt", "config.yaml"),
            ("graph-json", "graph.json"),
            ("prompts-txt", "prompts.txt"),
            ("tokens", "tokens-00000.npy"),
        )
        for place in (folder, pipe, link_to_itself)
    ),
]
"""Sample, file, and its change. Each of them once caused a traceback, a hang or wrong numbers."""
PASSED_OVER: list[tuple[str, str, Callable[[bytes], bytes] | str]] = [
    ("model-gpt2", "tokenizer.json", lambda data: b"\xef\xbb\xbf" + data),
    ("graph-npz", "graph.npz", with_bomb),
    ("graph-npz", "graph.npz", in_archive("more.npy", b"no array")),
    ("graph-json-gz", "graph.json.gz", lambda data: gzip.compress(b" " * (1 << 20)) * 512 + data),
    ("tokens", "manifest.json", lambda data: b"\xef\xbb\xbf" + data),
    ("run", "metrics.jsonl", raw(DEEP)),
    ("run", "metrics.jsonl", raw('{"loss": 1.0}')),
    ("run", "metrics.jsonl", raw('{"step": 1, "loss": "small"}')),
    ("run", "metrics.jsonl", raw("5\n[]\nnull")),
    ("run", "metrics.jsonl", "folder"),
    ("run", "metrics.jsonl", "pipe"),
]
"""The same for changes that may also be read: unknown members or lines are ignored."""


def label(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__qualname__", "").split(".")[0].strip("<>")


@pytest.mark.parametrize(("name", "file", "change"), [*EXAMPLES, *PASSED_OVER], ids=label)
def test_what_was_found_once_is_refused(name, file, change, sound, monkeypatch):
    stored = sound(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(stored.folder.parent / "cache"))
    stored.restore()
    path = stored.folder / file
    path.unlink()
    if isinstance(change, str):
        next(place for place in PLACES if place.__name__ == change)(path)
    else:
        path.write_bytes(change(stored.files[file]))
    faults = examine(stored, file, bytes_alone=True)
    if not faults and (name, file, change) in EXAMPLES:
        with pytest.raises(UserError):
            stored.sample.read(stored.folder)
    stored.restore()
    assert not faults


def test_a_manifest_writes_nowhere_but_into_the_cache(sound, monkeypatch, tmp_path):
    """The shards of a remote folder have file names, not paths."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache" / "within"))
    stored = sound("tokens-remote")
    for name in (str(tmp_path / "outside.npy"), "../../../../outside.npy", "..", "a/b.npy", "", "a\x1b[31m\nb"):
        stored.restore()
        manifest = json.loads(stored.files["manifest.json"])
        old, manifest["shards"][0]["name"] = manifest["shards"][0]["name"], name
        memory = fsspec.filesystem("memory")
        memory.store.clear()
        for path, content in stored.files.items():
            memory.pipe_file(f"/tokens/{path}", content)
        memory.pipe_file("/tokens/manifest.json", json.dumps(manifest).encode())
        if Path(name).name not in ("", ".."):  # folders
            memory.pipe_file(os.path.normpath(f"/tokens/{name}"), stored.files[old])
        with pytest.raises(UserError) as error:
            load_tokens("memory://tokens", 7)
        assert check_line(str(error.value), "tokens") is None
        assert not [path for path in list_tree(tmp_path) if "outside" in path or path.endswith("b.npy")]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["adjacency", "bias", "rest", "values", "activations", "logit_probabilities"])
def test_a_graph_whose_numbers_are_none_is_not_loaded(name, bad, tmp_path):
    graph = annotated_graph()
    array = getattr(graph, name).copy()
    array.flat[np.flatnonzero(array)[0] if array.any() else 0] = bad
    check_refused(replace_lists(graph, **{name: array}), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"features": np.array([[-5, 0, 17], [2, 1, 40]])},
        {"features": np.array([[0, 10**6, 17], [2, 1, 40]])},
        {"errors": np.array([[1, 10**6]])},
        {"logit_positions": np.array([-3])},
        {"logit_probabilities": np.array([-0.5], np.float32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_graph_of_nodes_that_cannot_be_is_not_loaded(change, tmp_path):
    check_refused(replace_lists(annotated_graph(), **change), tmp_path)


def check_refused(graph: Graph, folder: Path) -> None:
    """Either the writer or the reader refuses the graph."""
    with pytest.raises(UserError) as error:
        graph.save(folder / "graph.npz")
        load_graph(folder / "graph.npz")
    assert check_line(str(error.value), "graph") is None


def test_a_prompt_is_a_line_whatever_signs_stand_in_it(tmp_path):
    text = "one\x0c\x0b\x1c\x1d\x1e\x85\u2028\u2029 prompt"
    (tmp_path / "prompts.txt").write_bytes(f"{text}\r\nanother\n".encode())
    assert [line.prompt for line in read_prompts(tmp_path / "prompts.txt")] == [text, "another"]
    line = json.dumps({"prompt": text}, ensure_ascii=False).encode()
    (tmp_path / "prompts.jsonl").write_bytes(line + b"\n" + line)
    assert [line.prompt for line in read_prompts(tmp_path / "prompts.jsonl")] == [text, text]
