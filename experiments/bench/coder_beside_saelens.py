"""Sparse autoencoders of one model trained by jclt and by SAELens: the same tokens, features and active features.

    taskset -c 0 python experiments/bench/coder_beside_saelens.py                  # of the shipped model
    taskset -c 0 python experiments/bench/coder_beside_saelens.py --model FOLDER --data TEXT.jsonl

SAELens 6.54 loads transcoders but trains none, so both train BatchTopK autoencoders of what the MLPs write: jclt one
coder of all layers with its defaults, SAELens one autoencoder of each layer, with its defaults and at higher learning
rates. SAELens gets the activations of jclt's own batches, harvested beforehand; jclt's time includes its harvest and
its compilation. Both are measured by jclt, as saved for use, on text that neither was trained on. Expected: jclt with a
third or half of the steps explains at least as much as the best of SAELens with all, in at most half of the time; with
`--steps 300` not, as there compilation is a third of jclt's time. Times are of the processor. Cost: 6 minutes. Needs
SAELens (`pip install -e '.[peers]'`).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from jclt.coders import CoderConfig, SparseCoder, load_coder
from jclt.evaluation import evaluate_reconstruction
from jclt.mesh import make_mesh
from jclt.models import Model, load_model
from jclt.training.coder.prepare import complete_config, find_run_rows, prepare_data
from jclt.training.coder.train import train_coder
from jclt.training.config import TrainConfig
from jclt.training.run_folder import lock_place

PEER_RATES = (3e-4, 1e-3, 3e-3)
"""SAELens' default learning rate and higher ones."""


class Trained(NamedTuple):
    name: str
    seconds: float  # of the processor
    coder: SparseCoder


class Measured(NamedTuple):
    seconds: float
    explained: float


def train_ours(config: TrainConfig, folder: Path) -> Trained:
    start = time.process_time()
    coder = train_coder(config, folder)
    return Trained(f"jclt, {config.steps} steps", time.process_time() - start, coder)


def harvest_all(config: TrainConfig, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the layers write at the tokens of all batches, [layers, tokens, width]; and rows that are held out."""
    mesh = make_mesh()
    model = load_model(config.model, mesh=mesh)
    config = complete_config(config, model.config, mesh, model.fingerprint)
    with lock_place(folder) as place, jax.set_mesh(mesh):
        data = prepare_data(config, model, find_run_rows(config, model, place))
        batches = [np.asarray(data.harvest(step).writes) for step in range(config.steps)]
    return np.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x in batches], axis=1), data.held_out


def train_peers(config: TrainConfig, activations: np.ndarray, rate: float, folder: Path) -> Trained:
    """SAELens' BatchTopK autoencoders, one a layer, each with its share of the active features."""
    layers, tokens, width = activations.shape
    batch = config.batch * config.length
    assert config.coder.k is not None
    seconds = 0.0
    for layer in range(layers):
        settings = BatchTopKTrainingSAEConfig(
            d_in=width,
            d_sae=config.coder.features,
            k=config.coder.k / layers,
            normalize_activations="expected_average_only_in",
        )
        settings.metadata.hook_name = f"blocks.{layer}.hook_mlp_out"
        settings.metadata.model_name = config.model
        trainer = SAETrainerConfig(tokens, batch, lr=rate, lr_end=rate, n_batches_for_norm_estimate=8)
        torch.manual_seed(config.seed)
        start = time.process_time()
        batches = iterate_batches(torch.tensor(activations[layer]), batch)
        sae: Any = SAETrainer(trainer, BatchTopKTrainingSAE(settings), batches).fit()
        seconds += time.process_time() - start
        sae.save_inference_model(folder / f"layer_{layer}")
    coder = load_coder(folder, keep="device")
    assert isinstance(coder, SparseCoder)
    return Trained(f"SAELens, {tokens // batch} steps, rate {rate:g}", seconds, coder)


def iterate_batches(activations: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    while True:
        yield from activations.split(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="world", help="as of `jclt train`")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--k", type=int, default=40, help="active features a token, over all layers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        coder = CoderConfig("sae", options.features, "batchtopk", options.k, reads="mlp_out", writes="mlp_out")
        config = TrainConfig(
            coder,
            model=options.model,
            data=options.data,
            steps=options.steps,
            batch=16,
            save_every=options.steps,
            evaluate_every=-1,
        )
        activations, rows = harvest_all(config, folder / "harvest")
        print(
            f"{'trained by':32} {'seconds':>8} {'explained':>9} {'L0':>6} {'dead':>6}  explained by layer", flush=True
        )
        ours = [
            measure(model, train_ours(replace(config, steps=steps), folder / f"{steps}"), rows)
            for steps in (options.steps // 3, options.steps // 2)
        ]
        theirs = [
            measure(model, train_peers(config, activations, rate, folder / f"rate-{rate}"), rows) for rate in PEER_RATES
        ]
    best = max(theirs, key=lambda run: run.explained)
    enough = [run for run in ours if run.explained >= best.explained]
    if not enough:
        sys.exit(f"expected jclt to explain at least {best.explained:.1%}, as SAELens does at its best rate")
    share = enough[0].seconds / best.seconds
    print(
        f"jclt explains {enough[0].explained:.1%}, SAELens at its best rate {best.explained:.1%}; "
        f"it takes {share:.2f} of the time"
    )


def measure(model: Model, run: Trained, rows: np.ndarray) -> Measured:
    """Measures a coder on these rows, and prints a line."""
    found = evaluate_reconstruction(model, run.coder, rows)
    explained = float(found.explained_variance.mean())
    by_layer = " ".join(f"{x:.3f}" for x in found.explained_variance)
    print(
        f"{run.name:32} {run.seconds:8.1f} {explained:9.4f} {float(found.l0.sum()):6.1f} "
        f"{float(np.mean(found.density == 0)):6.1%}  {by_layer}",
        flush=True,
    )
    return Measured(run.seconds, explained)


if __name__ == "__main__":
    main()
