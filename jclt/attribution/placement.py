"""Puts the weights of model and coder where graphs are computed: the setup that all prompts share."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.attribution.calls import Setup
from jclt.attribution.local import LocalModel, Weights
from jclt.attribution.options import Options
from jclt.attribution.sweep.folding import fold_weights
from jclt.attribution.targets import make_unembedding
from jclt.attribution.true_pass import stack_biases, stack_skips, widen_outside_layers
from jclt.coders import Coder, SparseCoder, StreamedCoder
from jclt.errors import UserError
from jclt.kept import keep_result
from jclt.mesh import make_sharding, mesh_of, use_mesh
from jclt.models import Model
from jclt.shapes import Array


def place_on_devices(model: Model, coder: Coder, local: LocalModel, options: Options, prompts: int) -> Setup:
    """Copies the model to as many devices as there are prompts in a batch; but one that is split over a mesh stays
    split over it. The coder stays where it is."""
    mesh = model.mesh if model.mesh is not None and model.mesh.size > 1 else make_prompts_mesh(prompts)
    is_split = mesh is model.mesh
    on_all, layers = NamedSharding(mesh, P()), model.config.layers
    if not is_split:
        params = jax.device_put(dict(model.params), on_all)
        if not isinstance(coder, StreamedCoder | SparseCoder):
            coder = jax.device_put(coder, mesh.devices[0])  # a part of the model, which may be split in other ways
    else:  # vectors are small, and each device has all of them
        small = [name for name in model.params if name.endswith(("_gain", "_bias"))]
        params = dict(model.params) | {name: jax.device_put(model.params[name], on_all) for name in small}
    check_finite(coder)
    params = widen_outside_layers(model.config, params)
    with use_mesh(mesh_of(coder.decoder_bias(0))):
        skips, biases = stack_skips(coder, layers), stack_biases(coder, layers)
    if skips is not None:
        by_output = make_sharding(mesh, skips.shape, (None, "stored", None)) if is_split else on_all
        skips = jax.device_put(skips, by_output)
    weights = Weights(params, skips)
    return Setup(
        model=model,
        local=local,
        weights=weights,
        folded=fold_weights(local, weights),
        biases=jax.device_put(biases, on_all),
        coder=coder,
        unembedding=make_unembedding(model, params),
        mesh=mesh,
        options=options,
    )


def make_prompts_mesh(prompts: int) -> Mesh:
    """As many devices as there are prompts in a batch."""
    devices = jax.local_devices()[: max(prompts, 1)]
    return jax.make_mesh((len(devices),), ("prompts",), axis_types=(AxisType.Auto,), devices=devices)


@keep_result
def check_finite(coder: Coder) -> None:
    """Checks encoders and thresholds, one layer at a time, once for each coder. Those of a streamed coder are checked
    as they are read for its fingerprint."""
    if isinstance(coder, StreamedCoder):
        return
    checks = [check_encoder(coder.load_encoder(layer)) for layer in range(len(coder.config.covered))]
    encoders, thresholds = (all(map(bool, of_layers)) for of_layers in zip(*checks, strict=True))
    if not encoders:
        raise UserError("coder: its encoders are not finite, expected weights without NaN or infinity")
    if not thresholds:
        raise UserError("coder: its thresholds hold NaN or -infinity, expected numbers")


@jax.jit
def check_encoder(encoder: Coder) -> tuple[Array, Array]:
    """Whether one layer's encoder is finite, and whether no threshold is NaN or -infinity. A feature with a threshold
    of NaN would only seem inactive; one with a threshold of infinity is switched off."""
    rows, biases = encoder.encoder(0)
    leaves = jax.tree.leaves_with_path(encoder)
    thresholds = [(x > -jnp.inf).all() for path, x in leaves if getattr(path[-1], "name", None) == "threshold"]
    return jnp.isfinite(rows).all() & jnp.isfinite(biases).all(), jnp.stack([jnp.array(True), *thresholds]).all()
