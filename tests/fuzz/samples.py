"""Tiny valid files of every kind that jclt reads, each with its reader."""

import bz2
import gzip
import hashlib
import json
import lzma
import pickle
import shutil
import sys
import types
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import jax
import numpy as np
import pytest
from coder_samples import CLT, PLT, RULES, SAE, random_coder
from gguf_files import write_gguf
from graph_lists import hand_graph
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import jclt
from fuzz.limits import MOST_MEMORY
from fuzz.mutations import BOMB, archive, store_member
from jclt.attribution.many_prompts import read_prompts
from jclt.coders import load_coder, save_coder
from jclt.data.documents import find_inputs, read_pieces
from jclt.data.load_tokens import load_tokens
from jclt.data.token_rows import load_rows, save_rows
from jclt.data.tokenize import tokenize
from jclt.graphs import export_json, import_json, load_graph, read_circuit_tracer
from jclt.models import Model, ModelConfig, RopeScaling, Tokenizer, declare, load_model, save_model
from jclt.training.config import TrainConfig
from jclt.training.inspect import inspect_run
from jclt.training.run_folder import is_begun


class Sample(NamedTuple):
    """`make` fills a new folder with valid files, `read` reads this folder and returns the result."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    checked: tuple[str, ...] = ()
    """Suffixes of files with a checksum: if damaged, they are refused or give the same `numbers`."""
    numbers: Callable[[Any], Any] | None = None
    writes: tuple[str, ...] = ()
    """Names in the folder or beside it that the reader may write."""
    share: float = 1.0
    """The share of the inputs, relative to the other samples: less for slow readers."""
    memory: int = MOST_MEMORY
    """Bytes of memory that the reader may need at the peak."""


# Models.

WORDS = {letter: number for number, letter in enumerate([*"abĠ", "ab", "Ġab", "<|endoftext|>"])}
MERGES = [("a", "b"), ("Ġ", "ab")]


def tiny_tokenizer() -> Tokenizer:
    backend = Backend(models.BPE(vocab=WORDS, merges=MERGES))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


SIZES: dict[str, Any] = {"vocabulary": 8, "width": 8, "layers": 2, "heads": 2, "mlp_width": 8, "context": 16}
GPT2 = ModelConfig(
    family="gpt2",
    **SIZES,
    norm="layer",
    activation="gelu_tanh",
    gated=False,
    qkv_bias=True,
    attn_out_bias=True,
    mlp_bias=True,
    learned_positions=True,
    tied=True,
    bos_token=5,
    stop_tokens=(5,),
)
LLAMA3 = ModelConfig(
    family="llama", **SIZES, kv_heads=1, rope_scaling=RopeScaling("llama3", 8.0), bos_token=5, stop_tokens=(5, 4)
)
GEMMA3 = ModelConfig(
    family="gemma3_text",
    **SIZES,
    head_width=4,
    activation="gelu_tanh",
    norm_offset=1.0,
    post_norms=True,
    qk_norm=True,
    scaled_embedding=True,
    tied=True,
    local_layers=(0,),
    window=4,
    rope_local_base=20.0,
)
QWEN2 = ModelConfig(family="qwen2", **SIZES, qkv_bias=True, local_layers=(1,), window=4)


def random_model(config: ModelConfig) -> Model:
    weights = declare(config)
    keys = jax.random.split(jax.random.key(0), len(weights))
    params = {name: weight.init(key, np.float32) for key, (name, weight) in zip(keys, weights.items(), strict=True)}
    return Model(config, params, tiny_tokenizer(), "tiny")


def model_sample(config: ModelConfig, shard_bytes: int = 10**9, vocabulary: bool = False) -> Sample:
    def make(folder: Path) -> None:
        save_model(random_model(config), folder, shard_bytes=shard_bytes)
        settings = {"eos_token_id": [5, 4], "bos_token_id": 5, "max_new_tokens": 3}
        (folder / "generation_config.json").write_text(json.dumps(settings))
        if vocabulary:
            (folder / "tokenizer.json").unlink()
            (folder / "vocab.json").write_text(json.dumps(WORDS))
            (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))

    return Sample(make, load_model)


def gguf_sample(config: ModelConfig, kind: str = "F32") -> Sample:
    def make(folder: Path) -> None:
        source, tokens = folder.with_name(folder.name + " source"), [*WORDS, "[pad]", "[more]"][: SIZES["vocabulary"]]
        save_model(random_model(config), source)
        folder.mkdir()
        keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": [" ".join(pair) for pair in MERGES]}
        keys |= {"token_type": [1] * len(tokens)}
        tokenizer = {f"tokenizer.ggml.{name}": value for name, value in keys.items()} | {"tokenizer.chat_template": "a"}
        write_gguf(source, folder / "model.gguf", kind, tokenizer=tokenizer)
        shutil.rmtree(source)

    return Sample(make, lambda folder: load_model(folder / "model.gguf"))


# Coders.


def coder_sample(config: Any, layout: str, dtype: str = "float32") -> Sample:
    def make(folder: Path) -> None:
        save_coder(random_coder(config, dtype), folder, layout, dtype)

    def read(folder: Path) -> Any:
        sites = {"reads": "mlp_normalized", "writes": "mlp_out"} if layout == "gemma-scope" else {}
        return load_coder(folder, check=False, **sites)

    checked = (".npz",) if layout == "gemma-scope" else ()
    return Sample(make, read, checked, lambda coder: [np.asarray(x) for x in jax.tree.leaves(coder)])


SCOPE = replace(PLT, reads="mlp_normalized", bandwidth=1.0, through="all", model="")

# Graphs.


def annotated_graph() -> jclt.Graph:
    return replace(
        hand_graph(),
        provenance={"model": "tiny", "coder": "a coder", "settings": {"max_features": 3}, "version": "0"},
        supernodes={"both": (0, 1)},
        annotations={"metadata": {"title_prefix": "a title"}},
    )


def graph_numbers(graph: jclt.Graph) -> Any:
    arrays = {name: x for name, x in vars(graph).items() if isinstance(x, np.ndarray)}
    return arrays | {"token_texts": list(graph.token_texts), "logit_names": list(graph.logit_names)}


def in_folder(name: str, write: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        write(folder / name)

    return make


def torch_graph(path: Path) -> None:
    """Writes what `circuit_tracer.Graph.to_pt` writes, without torch: stand-ins have its names while it is pickled."""
    storages: list[np.ndarray] = []

    def stand_in(module: str, name: str, value: Any) -> Any:
        value.__module__, value.__qualname__, value.__name__ = module, name, name
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            patch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        modules[module, name] = value
        return value

    class Storage(NamedTuple):
        kind: Any
        key: str
        count: int

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", obj.kind, obj.key, "cpu", obj.count) if isinstance(obj, Storage) else None

        def reducer_override(self, obj: Any) -> Any:
            if not isinstance(obj, np.ndarray):
                return NotImplemented
            kind = kinds[obj.dtype.name]
            storages.append(np.ascontiguousarray(obj))
            strides = tuple(step // obj.itemsize for step in storages[-1].strides)
            storage = Storage(kind, str(len(storages) - 1), obj.size)
            return rebuild, (storage, 0, obj.shape, strides, False, {})

    graph, modules = hand_graph(), {}
    layers, tokens = 1, len(graph.tokens)
    size = len(graph.features) + (layers + 1) * tokens + 1
    adjacency = np.zeros((size, size), np.float32)
    adjacency[0, 4:6], adjacency[-1, :4] = (1, -3), (3, 0, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        rebuild = stand_in("torch._utils", "_rebuild_tensor_v2", lambda *_: None)
        kinds = {
            "float32": stand_in("torch", "FloatStorage", type("FloatStorage", (), {})),
            "int64": stand_in("torch", "LongStorage", type("LongStorage", (), {})),
        }
        config = stand_in("circuit_tracer.utils.tl_nnsight_mapping", "UnifiedConfig", type("UnifiedConfig", (), {}))()
        vars(config).update(n_layers=layers, d_vocab=50, model_name="tiny")
        named = namedtuple("LogitTarget", ["token_str", "vocab_idx"])
        target = stand_in("circuit_tracer.attribution.targets", "LogitTarget", named)
        for (module, name), value in modules.items():
            setattr(sys.modules[module], name, value)
        content = {
            "adjacency_matrix": adjacency,
            "cfg": config,
            "active_features": np.array([[0, 0, 17], [0, 1, 40], [0, 1, 41]]),
            "selected_features": np.array([0, 1]),
            "activation_values": np.array([1.0, 2.0, 3.0], np.float32),
            "input_tokens": graph.tokens,
            "input_string": "South Creek",
            "logit_targets": [target(" Denver", 9)],
            "logit_probabilities": np.array([0.5], np.float32),
            "vocab_size": 50,
            "scan": "a coder",
        }
        with path.open("wb") as file:
            Pickler(file, 2).dump(content)
    pickled = path.read_bytes()
    parts = [store_member(b"graph/data.pkl", pickled), store_member(b"graph/byteorder", b"little")]
    parts += [store_member(f"graph/data/{n}".encode(), x.tobytes()) for n, x in enumerate(storages)]
    path.write_bytes(archive(parts))


# Data and runs.

TEXT = "ab ab a b\nb ab\n\nab ab ab\n" * 3
JSON_LINES = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(("ab", "a b", "b")))


def make_tokens(folder: Path) -> None:
    source = folder.with_name(folder.name + " source")
    random = random_model(GPT2)
    source.mkdir()
    assert random.tokenizer is not None
    random.tokenizer.backend.save(str(source / "tokenizer.json"))
    (source / "text.jsonl").write_text("".join(json.dumps({"text": "ab ab a b " * 4}) + "\n" for _ in range(6)))
    tokenize([str(source / "text.jsonl")], source, str(folder), workers=1, shard_tokens=50, end="5")
    shutil.rmtree(source)


def read_tokens(folder: Path | str) -> Any:
    return load_tokens(folder, 7, GPT2.vocabulary, tiny_tokenizer())


def read_remote_tokens(folder: Path) -> Any:
    """The same folder on a remote file system."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in folder.iterdir():
        if path.is_file():
            memory.pipe_file(f"/tokens/{path.name}", path.read_bytes())
    return read_tokens("memory://tokens")


def all_rows(rows: Any) -> Any:
    return rows.read(np.arange(len(rows)))


def read_documents(folder: Path) -> Any:
    return [piece for source in find_inputs([f"{folder}/*"]) for piece in read_pieces(source)]


def text_of(found: Any) -> Any:
    return [piece.text for piece in found]


def documents_sample(name: str, content: bytes, share: float = 0.5) -> Sample:
    checked = tuple(end for end in (".gz", ".bz2", ".xz") if name.endswith(end))
    make = in_folder(name, lambda path: path.write_bytes(content))
    memory = 6 * BOMB  # a line is read as a whole, and copied on the way
    return Sample(make, read_documents, checked, text_of, share=share, memory=memory)


def parquet_sample() -> Sample:
    def write(path: Path) -> None:
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.table({"text": ["ab", "a b", "b"], "id": [1, 2, 3]}), path)

    return Sample(in_folder("text.parquet", write), read_documents)


RUN = TrainConfig(CLT, steps=20)


def make_run(folder: Path) -> None:
    assert not is_begun(folder, RUN)
    folder.mkdir()
    from jclt.training.run_folder import write_settings

    write_settings(folder, RUN)
    entries = [
        {"step": step, "loss": 1 / step, "nmse": 0.5, "l0": 3.0, "dead": 0.1, "nmse_layers": [0.4, 0.6]}
        for step in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "data.json").write_text(json.dumps({"digest": hashlib.sha256(b"").hexdigest()}))


def make_rows(folder: Path) -> None:
    save_rows(folder, np.arange(24, dtype=np.uint16).reshape(4, 6), np.ones((4, 6), np.float16))


SAMPLES: dict[str, Sample] = {
    "model-gpt2": model_sample(GPT2),
    "model-gpt2-vocabulary": model_sample(GPT2, vocabulary=True),
    "model-llama3-shards": model_sample(LLAMA3, shard_bytes=1000),
    "model-gemma3": model_sample(GEMMA3),
    "model-qwen2": model_sample(QWEN2),
    "model-gguf-llama3": gguf_sample(LLAMA3),
    "model-gguf-quantised": gguf_sample(replace(LLAMA3, width=32, mlp_width=32), "Q4_0"),
    "model-gguf-gemma3": gguf_sample(GEMMA3),
    "coder-jclt-clt": coder_sample(replace(CLT, skip=True), "jclt", "bfloat16"),
    "coder-jclt-transcoder": coder_sample(replace(PLT, **RULES["topk"]), "jclt"),
    "coder-circuit-tracer-clt": coder_sample(replace(CLT, bandwidth=1.0, through="all"), "circuit-tracer"),
    "coder-circuit-tracer-transcoder": coder_sample(replace(PLT, skip=True), "circuit-tracer", "float16"),
    "coder-saelens": coder_sample(SAE, "saelens"),
    "coder-gemma-scope": coder_sample(SCOPE, "gemma-scope"),
    "coder-gemma-scope-2": coder_sample(replace(SCOPE, reads="mlp_in", skip=True), "gemma-scope-2"),
    "coder-gemma-scope-2-clt": coder_sample(replace(CLT, skip=True), "gemma-scope-2"),
    "graph-npz": Sample(
        in_folder("graph.npz", lambda path: annotated_graph().save(path)),
        lambda folder: load_graph(folder / "graph.npz"),
        (".npz",),
        graph_numbers,
        share=2,
    ),
    "graph-json": Sample(
        in_folder("graph.json", lambda path: export_json(annotated_graph(), path)),
        lambda folder: import_json(folder / "graph.json"),
        share=2,
    ),
    "graph-json-gz": Sample(
        in_folder("graph.json.gz", lambda path: export_json(annotated_graph(), path)),
        lambda folder: import_json(folder / "graph.json.gz"),
        (".gz",),
        graph_numbers,
    ),
    "graph-pt": Sample(
        in_folder("graph.pt", torch_graph),
        lambda folder: read_circuit_tracer(folder / "graph.pt"),
        (".pt",),
        graph_numbers,
        share=2,
    ),
    "prompts-txt": Sample(
        in_folder("prompts.txt", lambda path: path.write_text("one prompt\nanother\n")),
        lambda folder: read_prompts(folder / "prompts.txt"),
        share=0.5,
    ),
    "prompts-jsonl": Sample(
        in_folder("prompts.jsonl", lambda path: path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')),
        lambda folder: read_prompts(folder / "prompts.jsonl"),
    ),
    "tokens": Sample(make_tokens, read_tokens, (".npy",), all_rows, share=2),
    "tokens-remote": Sample(make_tokens, read_remote_tokens, (".npy",), all_rows, writes=("cache/jclt/tokens",)),
    "rows": Sample(make_rows, load_rows, numbers=all_rows, share=0.5),
    "run": Sample(make_run, inspect_run, writes=("curves.png",), share=0.25),
    "run-begun": Sample(make_run, lambda folder: is_begun(folder, RUN), share=0.5),
    "documents-txt": documents_sample("text.txt", TEXT.encode()),
    "documents-jsonl": documents_sample("text.jsonl", JSON_LINES.encode()),
    "documents-txt-gz": documents_sample("text.txt.gz", gzip.compress(TEXT.encode()), 0.3),
    "documents-jsonl-gz": documents_sample("text.jsonl.gz", gzip.compress(JSON_LINES.encode()), 0.3),
    "documents-txt-bz2": documents_sample("text.txt.bz2", bz2.compress(TEXT.encode()), 0.2),
    "documents-txt-xz": documents_sample("text.txt.xz", lzma.compress(TEXT.encode()), 0.2),
    **({"documents-parquet": parquet_sample()} if find_spec("pyarrow") else {}),
}
