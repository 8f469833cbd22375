"""Attribution graphs, of one prompt or of many at once.

The algorithm, for a batch of prompts of similar length. Each step has the name of its log lines (level debug), and the
device programs are in a `jax.named_scope` of their own, given in brackets.

1. True pass (`true_pass`). Run the model on the prompts. Keep the attention patterns and norm denominators, which make
   the local replacement model linear when they are frozen, and what the coder reads.
   `true_pass.py`; `local.py` is the linear model.
2. Gather sources (`encode_layer`, `gather_sources`, `fold_nodes`). Encode layer by layer and list the active features;
   gather what each of them reads and writes. The errors are what the MLPs write beyond features, biases and skips. Fold
   norms into patterns and nodes (into weights once, before the first batch).
   `scores.py`, `active.py`; `sweep/bases.py`, `sweep/tiles.py`, `sweep/folding.py`
3. Trace embeddings and outputs (`trace_embeddings`, `trace_targets`). Compute the edges from embeddings and biases into
   all targets, by carrying the embeddings up through the linear model; and the edges into the outputs, by carrying
   their gradients down. `embeddings.py`, `sweep/edges.py`
   Where it saves operations, what low layers write is carried up to a middle layer first (`push_sources`), and
   gradients go down to that layer only. `sweep/cuts.py`, `sweep/columns.py`
4. Rank and trace features (`trace_targets`), in rounds. Rank the untraced features by their influence on the outputs,
   and compute the edges into the most influential ones. Stop after `max_features` features, or when no influence can
   change by more than `tolerance`.
   `ranking.py` ranks, `calls.py` and `sweep/blocks.py` arrange the computation, `sweep/edges.py` computes.
5. Assemble the graph. Nodes are the traced features, all errors and embeddings, and the outputs; what untraced features
   add to a node is its `rest`. `ranking.py`
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from jclt.attribution.calls import Setup
from jclt.attribution.local import LocalModel
from jclt.attribution.options import Conventions, Nodes, Options, check_vectors
from jclt.attribution.placement import place_on_devices
from jclt.attribution.prompts import encode_prompt
from jclt.attribution.ranking import PromptRows
from jclt.attribution.schedule import trace_prompts
from jclt.attribution.sizes import (
    BATCH_BYTES,
    PROMPTS_AT_ONCE,
    estimate_prompt_bytes,
    round_up_length,
)
from jclt.attribution.targets import Target, decode_token, parse_targets, resolve_targets
from jclt.coders import Coder, read_fingerprint
from jclt.errors import UserError
from jclt.graphs.graph import Graph
from jclt.memory import is_out_of_memory
from jclt.models import Model
from jclt.models.chat import is_chat
from jclt.models.model import Prompt
from jclt.numerics import Precision
from jclt.shapes import Int

log = logging.getLogger(__name__)

BATCH = 8
"""Prompts of similar length that are traced together."""


def attribute(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    *,
    targets: Target | Sequence[Target] | None = None,
    max_features: int = 7500,
    tolerance: float = 0.0,
    conventions: Conventions = "jclt",
    nodes: Nodes | None = None,
    precision: Precision = "float32",
    heads: int | bool | None = None,
    cuts: Sequence[int] = (),
) -> Graph:
    """The attribution graph of one prompt: text, a chat as a list of messages, or token ids `[T]`.

    It explains the likeliest next tokens, or the `targets`: tokens as text or id, pairs of tokens (the first one's
    logit minus the second's), or a `Direction`. At most `max_features` features get their incoming edges, the most
    influential first, and no more once every influence is known to within `tolerance`. What the others add to a node is
    its `rest`.

    `nodes` says how many of the active features are nodes, those with the highest scores (`scores.py`): a number, or as
    a float up to 1.0 their share of all scores. What the others write counts as error. By default all are, but 2,000 of
    a model's neurons.

    `heads` makes attention heads nodes, too: so many with the values of highest size at single positions, or with True
    up to 2,000. `cuts` are layers at whose input the residual stream is a node at each position.

    Everything is computed in at least float32, whatever the types of model and coder; but the products that edges are
    summed up from can have a narrower `precision`, such as bfloat16_3x. What edges then miss of the nodes' values is
    the graph's `conservation_error`.
    """
    options = Options(parse_targets(targets), max_features, tolerance, conventions, nodes, precision, heads, cuts)
    ((_, graph),) = attribute_each(model, coder, [encode_prompt(model, prompt, conventions)], options)
    if isinstance(graph, UserError):
        raise graph
    return mark_chat(graph, prompt)


def attribute_batch(
    model: Model,
    coder: Coder,
    prompts: Sequence[Prompt],
    *,
    targets: Target | Sequence[Target] | None = None,
    max_features: int = 7500,
    tolerance: float = 0.0,
    conventions: Conventions = "jclt",
    nodes: Nodes | None = None,
    precision: Precision = "float32",
    heads: int | bool | None = None,
    cuts: Sequence[int] = (),
    batch: int = BATCH,
) -> list[Graph]:
    """The graph of each prompt, as `attribute` gives it. `batch` prompts of similar length are traced together, split
    over all devices; but the devices that a model is split over (`load_model(..., mesh=mesh)`) have all of them."""
    if isinstance(prompts, str):
        raise UserError("prompts: a text, expected a list of prompts; attribute takes one")
    if is_chat(prompts):
        raise UserError("prompts: one chat, expected a list of prompts; attribute takes one")
    options = Options(parse_targets(targets), max_features, tolerance, conventions, nodes, precision, heads, cuts)
    tokens = [encode_prompt(model, prompt, conventions) for prompt in prompts]
    graphs: dict[int, Graph] = {}
    for number, graph in attribute_each(model, coder, tokens, options, batch):
        if isinstance(graph, UserError):
            raise UserError(f"prompt {number}: {str(graph).removeprefix('prompt: ')}")
        graphs[number] = mark_chat(graph, prompts[number])
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
    """Each prompt's number and its graph, or its error, as soon as they are there: prompts of similar length together,
    short ones first. After a batch has failed, its prompts are tried one by one.

    `targets` are one entry for each prompt, used in place of those in the options. Prompts that are `done` are not
    returned again. But one is still computed if another prompt of its batch is, since the last bits of a graph may
    depend on the other prompts in the batch.
    """
    local, options = check_coder(model, coder), options.check()
    local = local._replace(precision=options.precision)
    if options.targets is not None:
        resolve_targets(model, options.targets)
    if batch < 1:
        raise UserError(f"batch={batch}: expected at least 1")
    check_vectors(model, options)
    about, done = describe_provenance(model, coder, options), frozenset(done)
    by_prompt = [options.targets if wanted is None else wanted for wanted in targets or [None] * len(prompts)]
    setup = place_on_devices(model, coder, local, options, min(batch, len(prompts)))
    waiting = split_batches(setup, [len(prompt) for prompt in prompts], batch)
    waiting = [numbers for numbers in waiting if not done.issuperset(numbers)]
    while waiting:
        numbers, failure, traced = waiting.pop(0), None, list[PromptRows]()
        try:
            traced = trace_prompts(setup, [prompts[n] for n in numbers], [by_prompt[n] for n in numbers])
        except Exception as error:
            failure = make_user_error(error, [len(prompts[n]) for n in numbers])
        for number in numbers if failure is None else ():
            try:
                settings = options._replace(targets=by_prompt[number]).summary()
                log.debug("5 assemble the graph of prompt %d", number)
                begins_with_bos = int(prompts[number][0]) == model.config.bos_token
                prompt_about = {"begins_with_bos": begins_with_bos, "chat_template": False}
                provenance = about | {"settings": settings} | prompt_about
                graph = traced.pop(0).build_graph(decode_tokens(model, prompts[number]), provenance)
                graph.provenance["conservation_error"] = graph.conservation_error
            except Exception as error:
                graph = make_user_error(error, [len(prompts[number])])
            if number not in done:
                yield number, graph
        if failure is not None and len(numbers) > 1:
            waiting = [[number] for number in numbers if number not in done] + waiting
        elif failure is not None and numbers[0] not in done:
            yield numbers[0], failure


def split_batches(setup: Setup, lengths: Sequence[int], batch: int) -> list[list[int]]:
    """The numbers of the prompts that are traced together: at most `batch` of similar length, in their order, and fewer
    where they take much memory, or more at once gain nothing. It depends neither on free memory nor on what is done."""
    sizes, devices, backend = (setup.model.config, setup.coder.config), setup.shards, jax.default_backend()
    padded_lengths = np.array([round_up_length(length) for length in lengths])
    batches = []
    for length in np.unique(padded_lengths):
        numbers = np.flatnonzero(padded_lengths == length).tolist()
        prompt_bytes = estimate_prompt_bytes(*sizes, setup.options, devices, int(length), 4)
        on_device = min(PROMPTS_AT_ONCE[backend], max(BATCH_BYTES[backend] // prompt_bytes, 1))
        size = min(batch, on_device * devices)
        batches += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return batches


def make_user_error(error: Exception, lengths: Sequence[int]) -> UserError:
    """The error for a user where a prompt or the memory is its cause; any other error is raised again."""
    if isinstance(error, UserError):
        return error.with_traceback(None)  # a traceback's frames would keep arrays alive
    if not is_out_of_memory(error):
        raise error
    return UserError(
        f"prompt: not enough memory for the graph of its {max(lengths)} tokens, expected a shorter prompt or a smaller "
        "max_features"
    )


def mark_chat(graph: Graph, prompt: Prompt) -> Graph:
    """The graph, whose provenance says so if the model's chat template wrote the prompt."""
    return replace(graph, provenance=graph.provenance | {"chat_template": True}) if is_chat(prompt) else graph


def decode_tokens(model: Model, tokens: Int[np.ndarray, "T"]) -> tuple[str, ...]:
    return tuple(decode_token(model, int(token)) for token in tokens)


def describe_provenance(model: Model, coder: Coder, options: Options) -> dict[str, Any]:
    """What made a graph. Where several hosts share a model or coder, all of them must call this."""
    c = coder.config
    k = "" if c.k is None else f" (k={c.k})"
    features = f"{len(c.covered)} layers of {c.features}{'' if c.dense else f' {c.rule}{k} features'}"
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "model_dtype": str(model.params["token_embedding"].dtype),
        "coder": f"{c.kind} of {c.model}, {features}, {c.reads} to {c.writes}",
        "coder_fingerprint": read_fingerprint(coder),
        "coder_dtype": str(coder.take_decoder_rows(0, np.zeros(1, int)).dtype),
        "settings": options.summary(),
        "version": version("jclt"),
    }


def check_coder(model: Model, coder: Coder) -> LocalModel:
    """The local replacement model of this model and coder; an error of one line if they do not fit together."""
    c, m = coder.config, model.config
    if model.mesh is not None and model.mesh.is_multi_process:
        raise UserError(f"model {model.name}: split over devices of several hosts, expected those of one for graphs")
    if c.size != m.width or c.covered[-1] >= m.layers:
        size, expected = (f"layer {c.covered[-1]}, width {c.size}", f"layers 0 to {m.layers - 1} of width {m.width}")
        raise UserError(f"coder: made for {size}, expected those of model {model.name}, {expected}")
    if c.reads not in ("resid_mid", "mlp_normalized", "mlp_in") or c.writes not in ("mlp_out", "mlp_raw_out"):
        raise UserError(
            f"coder: reads {c.reads} and writes {c.writes}, expected one that stands in for MLPs: "
            "resid_mid, mlp_normalized or mlp_in to mlp_out or mlp_raw_out"
        )
    return LocalModel(model=m, reads=c.reads, writes=c.writes)
