"""One step of training a cross-layer transcoder, harvest and optimizer included, beside the same step in PyTorch.

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000
    python experiments/bench/train_step.py
    python experiments/bench/train_step.py --growth    # also other sizes

At 12 layers x 768, 4,096 features a layer and 2,048 tokens, float32 on 2 CPU cores, expected are at least 75% of the
measured matmul rate, counting the dense operations of the coder, B d F L (3 L + 7), and of the harvest; a harvest that
costs at most 15% on top of the coder's step; and at least 1.3 times the tokens a second of PyTorch, where torch and
transformers are installed. The variable lets glibc take large pages and keep what it has: without it a step that works
on 10 GB gives them back and asks for them again each time, and spends a tenth of its time on that. On an accelerator
the step is in bfloat16. Cost: 3 minutes and 12 GB, 2 more minutes with --growth.
"""

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from forward import GPT2
from jax.sharding import Mesh
from machine import Case, best, matmul_rate, parser, report

from jclt.coders import CoderConfig
from jclt.mesh import make_mesh
from jclt.models import ModelConfig, declare
from jclt.training.coder.batches import harvest_batch
from jclt.training.coder.prepare import init_state
from jclt.training.coder.speed import count_coder_operations, count_forward_operations
from jclt.training.coder.step import train_step
from jclt.training.config import TrainConfig

ROWS, LENGTH, FEATURES = 16, 128, 4096


def make_config(model: ModelConfig, features: int = FEATURES, rows: int = ROWS) -> TrainConfig:
    compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    coder = CoderConfig(features=features, reads="mlp_in", writes="mlp_out").fit_to_model(model, "random")
    return TrainConfig(coder, model="random", batch=rows, length=LENGTH, compute=compute)


def time_step(
    config: TrainConfig,
    model: ModelConfig,
    mesh: Mesh,
    repeats: int,
    harvests: bool = True,
    capacity: float | None = None,
) -> float:
    """The fastest of some steps on one batch, of tokens or of activations harvested before."""
    dtype = jnp.dtype(config.compute)
    params = {name: weight.init(jax.random.key(0), dtype) for name, weight in declare(model).items()}
    tokens = jax.random.randint(jax.random.key(1), (config.batch, config.length), 0, model.vocabulary, jnp.int32)
    with jax.set_mesh(mesh):
        activations = jax.jit(partial(harvest_batch, config, model))(params, tokens)
        state = init_state(config, mesh, lambda _: activations)
        batch: Any = tokens if harvests else jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), activations)
        del activations

        def step() -> Any:
            nonlocal state
            state, _, values = train_step(config, model, False, state, None, params, batch, capacity)
            assert not values.get("overflow", 0.0)
            return state.step, values

        return best(step, repeats)


def time_torch(config: TrainConfig, model: ModelConfig, repeats: int) -> float | None:
    """The same step written straightforwardly in PyTorch: float32, autograd, Adam, activations taken by hooks."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))
    torch.manual_seed(0)
    layers, width, features, c = model.layers, model.width, config.coder.features, config
    language = transformers.GPT2Model(transformers.GPT2Config(attn_implementation="eager", use_cache=False)).eval()
    ids = torch.randint(0, model.vocabulary, (config.batch, config.length))
    reads, writes = {}, {}

    def keep(layer: int, _: Any, inputs: Any, output: Any) -> None:
        reads[layer], writes[layer] = inputs[0], output

    for layer, block in enumerate(language.h):
        block.mlp.register_forward_hook(partial(keep, layer))

    class JumpReLU(torch.autograd.Function):
        @staticmethod
        def forward(context, h, threshold):
            context.save_for_backward(h, threshold)
            return h * (h > threshold)

        @staticmethod
        def backward(context, gradient):
            h, threshold = context.saved_tensors
            jump = gradient * threshold * ((h - threshold).abs() < 0.5)
            return gradient * (h > threshold) + jump, -jump.sum(0)

    def create_parameter(*shape: int, bound: float) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

    encoders = [create_parameter(features, width, bound=features**-0.5) for _ in range(layers)]
    biases = [torch.nn.Parameter(torch.zeros(features)) for _ in range(layers)]
    thresholds = [torch.nn.Parameter(torch.full((features,), -3.5)) for _ in range(layers)]
    decoders = [create_parameter(features, layers - l, width, bound=(layers * width) ** -0.5) for l in range(layers)]  # noqa: E741
    offsets = torch.nn.Parameter(torch.zeros(layers, width))
    everything = [*encoders, *biases, *thresholds, *decoders, offsets]
    optimizer = torch.optim.Adam(everything, lr=1e-4, betas=(c.beta1, c.beta2))

    def step() -> float:
        with torch.no_grad():
            language(ids)
        x = [reads[layer].reshape(-1, width) / reads[layer].square().mean().sqrt() for layer in range(layers)]
        y = [writes[layer].reshape(-1, width) / writes[layer].square().mean().sqrt() for layer in range(layers)]
        reconstruction = offsets.expand(x[0].shape[0], layers, width)
        penalty = torch.zeros(())
        for layer in range(layers):
            h = x[layer] @ encoders[layer].T + biases[layer]
            threshold = thresholds[layer].exp()
            a = JumpReLU.apply(h, threshold)
            norms = decoders[layer].square().sum((1, 2)).sqrt()
            penalty = penalty + torch.tanh(c.tanh_scale * norms * a).sum()
            penalty = penalty + c.preactivation_weight * (torch.relu(threshold - h) * norms).sum()
            from_layer = (a @ decoders[layer].flatten(1)).unflatten(1, (layers - layer, width))
            reconstruction = torch.cat([reconstruction[:, :layer], reconstruction[:, layer:] + from_layer], dim=1)
        loss = ((reconstruction - torch.stack(y, dim=1)).square().sum() + penalty) / x[0].shape[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything, c.clip)
        optimizer.step()
        return loss.item()

    return best(step, repeats)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--growth", action="store_true", help="also time other numbers of features and tokens")
    arguments: argparse.Namespace = options.parse_args()
    mesh, repeats = make_mesh(1, 1), min(arguments.repeats, 4)
    config = make_config(GPT2)
    tokens = ROWS * LENGTH
    dense, harvested = count_coder_operations(config.coder, tokens), count_forward_operations(GPT2, ROWS, LENGTH)
    rate = matmul_rate(arguments.repeats, config.compute)
    coder_seconds = time_step(config, GPT2, mesh, repeats, harvests=False)
    step_seconds = time_step(config, GPT2, mesh, repeats)
    peer = time_torch(config, GPT2, max(1, repeats // 2)) if config.compute == "float32" else None
    rate = max(rate, matmul_rate(arguments.repeats, config.compute))
    name = f"12 x 768, {FEATURES} features, {tokens} tokens"
    beside = {} if peer is None else {"against": "PyTorch", "ratio": peer / step_seconds}
    cases = [
        Case(f"coder alone: {name}", dense, coder_seconds, dense / coder_seconds / rate),
        Case(
            f"whole step: {name}", dense + harvested, step_seconds, (dense + harvested) / step_seconds / rate, **beside
        ),
    ]
    if arguments.growth:
        small = replace(GPT2, layers=4)
        sizes = [(f, ROWS) for f in (1024, 4096, 16384)] + [(FEATURES, rows) for rows in (4, 64)]
        for features, rows in sizes:
            variant = make_config(small, features, rows)
            work = count_coder_operations(variant.coder, rows * LENGTH) + count_forward_operations(small, rows, LENGTH)
            seconds = time_step(variant, small, mesh, repeats)
            cases.append(
                Case(f"4 layers, {features} features, {rows * LENGTH} tokens", work, seconds, work / seconds / rate)
            )
    report(cases, rate, arguments.json)
    print(f"the harvest adds {step_seconds / coder_seconds - 1:.0%} to the coder's step")
    print(f"{tokens / step_seconds:.0f} tokens a second")


if __name__ == "__main__":
    main()
