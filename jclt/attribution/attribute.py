"""Attribution graphs, of one prompt or of many at once.

Prompts of like length share one compiled program. The device makes the true pass, the arrays of sources and the rows of
edges (`sources.py`, `sweep.py`); the host says which rows and keeps them (`trace.py`, `rows.py`).
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.attribution.local import Through
from jclt.attribution.nodes import widened
from jclt.attribution.options import Conventions, Options, is_gemma_3_it
from jclt.attribution.ranking import PromptRows
from jclt.attribution.schedule import trace_prompts
from jclt.attribution.sizes import BATCH_BYTES, length_bucket, pass_bytes
from jclt.attribution.targets import Target, as_targets, resolved, text_of, unembedding
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.fingerprints import fingerprint
from jclt.graphs.graph import Graph
from jclt.memory import is_out_of_memory
from jclt.models import Model, token_array
from jclt.models.model import Prompt
from jclt.shapes import Array, Int

log = logging.getLogger(__name__)

BATCH = 8
"""Prompts of like length that go through the device at once."""


def attribute(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    *,
    targets: Target | Sequence[Target] | None = None,
    max_features: int = 7500,
    tolerance: float = 0.0,
    conventions: Conventions = "jclt",
) -> Graph:
    """The attribution graph of one prompt, text or token ids `[T]`.

    It explains the likeliest next tokens, or the `targets`: tokens as text or id, pairs of tokens (the first one's
    logit less the second's), or a `Direction`. At most `max_features` features get their incoming edges, the most
    influential first, and no more once what is missing is below `tolerance`; what the others bring is each node's
    `rest`. All is computed in at least float32, whatever the types of model and coder.
    """
    options = Options(as_targets(targets), max_features, tolerance, conventions)
    ((_, graph),) = attribute_each(model, coder, [prompt_tokens(model, prompt, conventions)], options)
    if isinstance(graph, UserError):
        raise graph
    return graph


def attribute_batch(
    model: Model,
    coder: Coder,
    prompts: Sequence[Prompt],
    *,
    targets: Target | Sequence[Target] | None = None,
    max_features: int = 7500,
    tolerance: float = 0.0,
    conventions: Conventions = "jclt",
    batch: int = BATCH,
) -> list[Graph]:
    """The graph of each prompt, as `attribute` gives it: `batch` of like length at once, split over all devices."""
    if isinstance(prompts, str):
        raise UserError("prompts: a text, expected a list of prompts; attribute takes one")
    options = Options(as_targets(targets), max_features, tolerance, conventions)
    tokens = [prompt_tokens(model, prompt, conventions) for prompt in prompts]
    graphs: dict[int, Graph] = {}
    for number, graph in attribute_each(model, coder, tokens, options, batch):
        if isinstance(graph, UserError):
            raise UserError(f"prompt {number}: {str(graph).removeprefix('prompt: ')}")
        graphs[number] = graph
    return [graphs[number] for number in range(len(tokens))]


def attribute_each(
    model: Model,
    coder: Coder,
    prompts: Sequence[np.ndarray],
    options: Options,
    batch: int = BATCH,
    targets: Sequence[Sequence[Target] | None] | None = None,
    done: Collection[int] = (),
) -> Iterator[tuple[int, Graph | UserError]]:
    """Each prompt's number and graph, or what is wrong with it, as they get done: the short ones first, prompts of like
    length together. A batch that fails is tried again one by one.

    `targets` are each prompt's own, in place of those of the options. Prompts that are `done` are not given again; yet
    one is computed if any in its batch is, as the last bits of a graph may depend on what shares its batch.
    """
    through, options = check(model, coder), options.check()
    if options.targets is not None:
        resolved(model, options.targets)
    if batch < 1:
        raise UserError(f"batch={batch}: expected at least 1")
    about, done = provenance(model, coder, options), frozenset(done)
    each = [options.targets if own is None else own for own in targets or [None] * len(prompts)]
    devices = jax.local_devices()[: max(min(batch, len(prompts)), 1)]
    mesh = jax.make_mesh((len(devices),), ("prompts",), axis_types=(AxisType.Auto,), devices=devices)
    params, placed = jax.device_put((dict(model.params), coder), NamedSharding(mesh, P()))
    check_finite(placed)
    params = widened(params)
    unembed = unembedding(model, params)
    waiting = batches(model, coder, [len(prompt) for prompt in prompts], batch, len(devices))
    waiting = [numbers for numbers in waiting if not done.issuperset(numbers)]
    given = (model, through, params, placed)
    while waiting:
        numbers, failure, made = waiting.pop(0), None, list[PromptRows]()
        try:
            own = [prompts[n] for n in numbers], [each[n] for n in numbers]
            made = trace_prompts(*given, *own, unembed, mesh, options)
        except Exception as error:
            failure = user_error_of(error, [len(prompts[n]) for n in numbers])
        for number in numbers if failure is None else ():
            try:
                settings = options._replace(targets=each[number]).summary()
                graph = made.pop(0).graph(token_texts(model, prompts[number]), about | {"settings": settings})
            except Exception as error:
                graph = user_error_of(error, [len(prompts[number])])
            if number not in done:
                yield number, graph
        if failure is not None and len(numbers) > 1:
            waiting = [[number] for number in numbers if number not in done] + waiting
        elif failure is not None and numbers[0] not in done:
            yield numbers[0], failure


def batches(model: Model, coder: Coder, lengths: Sequence[int], batch: int, devices: int) -> list[list[int]]:
    """Which prompts share a batch: up to so many of like length, in their order, fewer where they take much memory. It
    depends on the prompts alone."""
    buckets = np.array([length_bucket(length) for length in lengths])
    found = []
    for length in np.unique(buckets):
        own = np.flatnonzero(buckets == length).tolist()
        room = BATCH_BYTES[jax.default_backend()] // pass_bytes(model.config, coder.config, int(length), 4)
        size = min(batch, max(room, 1) * devices)
        found += [own[start : start + size] for start in range(0, len(own), size)]
    return found


def user_error_of(error: Exception, lengths: Sequence[int]) -> UserError:
    """What is wrong with a prompt, if it is that or memory that an error is about; raises it again if not."""
    if isinstance(error, UserError):
        return error.with_traceback(None)  # whose frames hold on to arrays
    if not is_out_of_memory(error):
        raise error
    return UserError(
        f"prompt: not enough memory for the graph of its {max(lengths)} tokens, expected a shorter prompt or a smaller "
        "max_features"
    )


def check_finite(coder: Coder) -> None:
    encoders, thresholds = all_read_numbers(coder)
    if not encoders:
        raise UserError("coder: its encoders are not finite, expected weights without NaN or infinity")
    if not thresholds:
        raise UserError("coder: its thresholds hold NaN or -infinity, expected numbers")


@jax.jit
def all_read_numbers(coder: Coder) -> tuple[Array, Array]:
    """Whether no encoder holds a NaN or an infinity, and no threshold a NaN, with which a feature would merely seem
    inactive. A threshold of infinity is a feature that is switched off."""
    weights = [x for layer in range(len(coder.config.covered)) for x in coder.reading(layer)]
    named = jax.tree.leaves_with_path(coder)
    thresholds = [x > -jnp.inf for path, x in named if getattr(path[-1], "name", None) == "threshold"]
    return (
        jnp.stack([jnp.isfinite(x).all() for x in weights]).all(),
        jnp.stack([x.all() for x in thresholds]).all() if thresholds else jnp.array(True),
    )


def token_texts(model: Model, tokens: Int[np.ndarray, "T"]) -> tuple[str, ...]:
    return tuple(text_of(model, int(token)) for token in tokens)


def provenance(model: Model, coder: Coder, options: Options) -> dict[str, Any]:
    """How a graph came about. Of several hosts that share a model or coder all must ask."""
    c = coder.config
    k = "" if c.k is None else f" (k={c.k})"
    features = f"{len(c.covered)} layers of {c.features} {c.rule}{k} features"
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "model_dtype": str(model.params["token_embedding"].dtype),
        "coder": f"{c.kind} of {c.model}, {features}, {c.reads} to {c.writes}",
        "coder_fingerprint": fingerprint(coder),
        "coder_dtype": str(coder.rows(0).dtype),
        "settings": options.summary(),
        "version": version("jclt"),
    }


def check(model: Model, coder: Coder) -> Through:
    """Where the coder stands in the model, or one line on why it cannot."""
    c, m = coder.config, model.config
    if c.size != m.width or c.covered[-1] >= m.layers:
        size, expected = (f"layer {c.covered[-1]}, width {c.size}", f"layers 0 to {m.layers - 1} of width {m.width}")
        raise UserError(f"coder: made for {size}, expected those of model {model.name}, {expected}")
    if c.reads not in ("resid_mid", "mlp_normalized", "mlp_in") or c.writes not in ("mlp_out", "mlp_raw_out"):
        raise UserError(
            f"coder: reads {c.reads} and writes {c.writes}, expected one that stands in for MLPs: "
            "resid_mid, mlp_normalized or mlp_in to mlp_out or mlp_raw_out"
        )
    return Through(m, c.reads, c.writes)


def prompt_tokens(model: Model, prompt: Prompt, conventions: Conventions = "jclt") -> Int[np.ndarray, "T"]:
    """The ids of a prompt, text or ids, as these conventions begin it."""
    if isinstance(prompt, str) and not prompt:
        raise UserError("prompt: empty, expected at least one token")
    if isinstance(prompt, str) and (unknown := unknown_words(model, prompt)):
        log.warning("prompt: model %s has no token for %s", model.name, ", ".join(map(repr, unknown)))
    if conventions == "circuit-tracer":
        if isinstance(prompt, str) and model.tokenizer is not None:
            prompt = model.tokenizer.plain(prompt)
        tokens = with_special_token(model, token_array(model, prompt))
    else:
        tokens = token_array(model, prompt)
    if tokens.ndim != 1:
        raise UserError(f"prompt: {len(tokens)} rows of token ids, expected one; attribute_batch takes many prompts")
    return tokens


GEMMA_3_IT = (2, 105, 2364, 107)
"""`<bos><start_of_turn>user` and a line break."""


def with_special_token(model: Model, tokens: np.ndarray) -> np.ndarray:
    """A prompt as circuit-tracer begins it: with the token for the beginning of a text, else the one for padding, else
    the one for the end, unless its first token is special already."""
    if tokens.ndim != 1:
        return tokens
    if is_gemma_3_it(model):
        if tuple(tokens[:4].tolist()) != GEMMA_3_IT:
            raise UserError(
                f"prompt: begins with the tokens {tokens[:4].tolist()}, expected {list(GEMMA_3_IT)}: <bos>, "
                f"<start_of_turn>, user and a line break, as all prompts of model {model.name} do for circuit-tracer"
            )
        return tokens
    added = {} if model.tokenizer is None else model.tokenizer.backend.get_added_tokens_decoder()
    special = {number: token.content for number, token in added.items() if token.special}
    padding = [number for number, name in special.items() if "pad" in name.lower()]
    first = [x for x in (model.config.bos_token, *padding, *model.config.stop_tokens, *special) if x is not None]
    if not first or int(tokens[0]) in {*special, *first}:
        return tokens
    return token_array(model, [first[0], *tokens.tolist()])


def unknown_words(model: Model, text: str) -> list[str]:
    """The words of a text that the model's tokenizer has no token for, each once."""
    if model.tokenizer is None:
        return []
    backend = model.tokenizer.backend
    unknown = getattr(backend.model, "unk_token", None)
    number = None if unknown is None else backend.token_to_id(unknown)
    if number is None:
        return []
    found = backend.encode(text, add_special_tokens=False)
    spans = [span for token, span in zip(found.ids, found.offsets, strict=True) if token == number]
    return list(dict.fromkeys(text[start:stop].strip() for start, stop in spans))
