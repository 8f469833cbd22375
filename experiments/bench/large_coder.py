"""Graphs with a coder whose weights stay on disk, in circuit-tracer's layout and bfloat16, written by this file.

    python experiments/bench/large_coder.py                      # Gemma-2-2B's shape
    python experiments/bench/large_coder.py --case gpt2          # GPT-2's size, beside circuit-tracer where installed

`gemma-2-2b`: 26 layers x 2304 with random weights in bfloat16, a cross-layer transcoder of 16,384 features a layer (28
GB), 20 tokens, 5,000 active features, of which the best 2,000 are traced. Expected is a peak below 16 GB, with model,
programs and the pages of files that are in memory.

`gpt2`: 12 layers x 768, a cross-layer transcoder of 32,768 features a layer (4.5 GB), 16 tokens, all 3,600 active
features traced under circuit-tracer's conventions. Expected is a whole call at least 10 times faster than
circuit-tracer 0.5.0 with its lazy loading, on the same files, and no more memory.

Every coder has encoders of its own for each layer. Decoders repeat one block of random rows, so that they are quickly
written; they are read like any others. Each program runs in a process of its own, of which the peak is printed.
Operations are counted as in `attribution.py`. Cost: 8 minutes and 28 GB of disk, or 6 minutes and 5 GB.
"""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from attribution import count_operations
from machine import Case, forget_peak, matmul_rate, measure_peak, parser, report, run_alone
from random_gpt2 import make_peer_model, random_model, time_call

import jclt
from jclt.array_files import write_tensors
from jclt.coders import read_fingerprint
from jclt.memory import measure_used_memory
from jclt.models import Model, declare
from jclt.models.formats.known_shapes import known_config

BLOCK = 256
"""Random decoder rows, which are repeated."""


class Size(NamedTuple):
    """A model, a coder of it, and a prompt."""

    make_model: Callable[[], Model]
    features: int  # of a layer
    active: int  # about so many features on the whole prompt
    length: int
    max_features: int
    conventions: Literal["jclt", "circuit-tracer"]
    runs: int  # after the first one

    def draw_tokens(self, model: Model) -> np.ndarray:
        tokens = np.random.default_rng(0).integers(3, model.config.vocabulary, self.length)
        tokens[0] = 0  # circuit-tracer puts this one first where it is missing
        return tokens


def random_gemma() -> Model:
    config = known_config("google/gemma-2-2b")
    weights, key = enumerate(declare(config).items()), jax.random.key(0)
    make = jax.jit(lambda key, weight: weight.init(key, jnp.bfloat16), static_argnums=1)
    # One after the other: beside each its numbers in float32 take twice as much.
    made = {name: make(jax.random.fold_in(key, i), w).block_until_ready() for i, (name, w) in weights}
    return Model(config, made, None, "random")


SIZES = {
    "gemma-2-2b": Size(random_gemma, 16384, 5000, 20, 2000, "jclt", 0),
    "gpt2": Size(lambda: random_model(512), 32768, 12 * 15 * 20, 16, 7500, "circuit-tracer", 2),
}


def write_coder(case: str, folder: Path) -> int:
    """Writes a JumpReLU coder whose thresholds make about `active` features active; returns its bytes."""
    size = SIZES[case]
    model = size.make_model()
    (layers, width), tokens = (model.config.layers, model.config.width), size.draw_tokens(model)
    reads = np.asarray(jclt.run(model, tokens, capture=("resid_mid",))[1]["resid_mid"], np.float32)
    del model
    random = np.random.default_rng(1)
    block = 0.05 / (layers * width) ** 0.5 * random.standard_normal((BLOCK, layers, width), np.float32)
    silent = 1 if size.conventions == "circuit-tracer" else 0
    share = size.active / (layers * (size.length - silent) * size.features)
    sites = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    (folder / "config.yaml").write_text("model_kind: cross_layer_transcoder\n" + sites)
    for layer in range(layers):
        encoder = width**-0.5 * random.standard_normal((size.features, width), np.float32)
        encoder = encoder.astype(jnp.bfloat16)
        level = np.quantile(reads[layer][silent:] @ encoder.astype(np.float32).T, 1 - share)
        weights = {
            "W_enc": encoder,
            "b_enc": np.zeros(size.features, jnp.bfloat16),
            "threshold": np.full(size.features, level).astype(jnp.bfloat16),
            "b_dec": np.zeros(width, jnp.bfloat16),
        }
        write_tensors(folder / f"W_enc_{layer}.safetensors", {f"{name}_{layer}": x for name, x in weights.items()})
        rows = np.ascontiguousarray(block[:, layer:].astype(jnp.bfloat16))
        write_repeated(folder / f"W_dec_{layer}.safetensors", f"W_dec_{layer}", rows, size.features // BLOCK)
    return sum(path.stat().st_size for path in folder.iterdir())


def write_repeated(path: Path, name: str, block: np.ndarray, count: int) -> None:
    """One tensor of safetensors: a block in bfloat16, repeated."""
    shape = [count * len(block), *block.shape[1:]]
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, count * block.nbytes]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(count):
            file.write(block.tobytes())


def trace(case: str, folder: Path) -> Case:
    size = SIZES[case]
    model = size.make_model()
    tokens, settings = size.draw_tokens(model), {"max_features": size.max_features, "conventions": size.conventions}
    coder = jclt.load_coder(folder, keep="disk")
    forget_peak()
    before = (measure_used_memory() or 0) / 1e9
    reading, _ = time_call(lambda: read_fingerprint(coder))
    first, graph = time_call(lambda: jclt.attribute(model, coder, tokens, **settings))
    runs = [time_call(lambda: jclt.attribute(model, coder, tokens, **settings))[0] for _ in range(size.runs)]
    seconds, peak, work = min(runs, default=first), measure_peak(), count_operations(graph, model.config)
    counts = f"{len(graph.features)} features traced, {graph.missing:.2f} missing"
    error = np.abs(graph.residual).max() / np.abs(graph.values).max()
    print(f"{case}: {counts}, edges + bias + rest = value to {error:.0e} of the largest value")
    print(f"reading all weights once, for the fingerprint, {reading:.1f} s; first call after it {first:.1f} s")
    print(f"peak {peak:.2f} GB, {peak - before:.2f} GB above the model's {before:.2f} GB", flush=True)
    name = f"{case}, {size.length} tokens, {len(graph.features)} features"
    return Case(name, work, seconds, work / seconds / matmul_rate(5), peak_gb=peak)


def trace_with_peer(case: str, folder: Path) -> tuple[float, float] | None:
    """circuit-tracer on the same model, files and prompt: seconds of the faster of two calls, and the peak in GB."""
    size = SIZES[case]
    model = size.make_model()
    tokens, peer = size.draw_tokens(model), make_peer_model(model)
    if peer is None:
        return None
    import torch
    from circuit_tracer import attribute
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

    del model  # JAX itself stays in memory, as in `trace`
    forget_peak()
    lazy: dict[str, Any] = {"lazy_encoder": True, "lazy_decoder": True, "dtype": torch.float32}
    peer._configure_replacement_model(load_clt(str(folder), device=torch.device("cpu"), **lazy))
    ids = torch.tensor(tokens)
    return min(time_call(lambda: attribute(ids, peer, batch_size=128))[0] for _ in range(2)), measure_peak()


def time_case(case: str, folder: Path) -> list[Case]:
    if not (folder / "config.yaml").exists():
        seconds, count = time_call(lambda: run_alone(write_coder, case, folder))
        print(f"coder of {count / 1e9:.1f} GB written in {seconds:.0f} s", flush=True)
    ours = run_alone(trace, case, folder)
    peer = run_alone(trace_with_peer, case, folder) if case == "gpt2" else None
    if peer is None:
        return [ours]
    seconds, peak = peer
    beside = ours._replace(against="circuit-tracer", ratio=seconds / ours.seconds)
    return [beside, Case("the same with circuit-tracer", ours.operations, seconds, peak_gb=peak)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--case", choices=SIZES, default="gemma-2-2b")
    options.add_argument("--folder", type=Path, help="keep the coder here, or use the one that is here already")
    arguments = options.parse_args()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        cases = time_case(arguments.case, arguments.folder)
    else:
        with TemporaryDirectory() as folder:
            cases = time_case(arguments.case, Path(folder))
    report(cases, matmul_rate(5), arguments.json)


if __name__ == "__main__":
    main()
