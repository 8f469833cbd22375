"""Answers to the requests of Neuronpedia's graph server, with its names of fields: a graph of a prompt, the likeliest
next tokens, and text that the model writes while features are changed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jclt.attribution import attribute
from jclt.attribution.targets import LOGIT_MASS, MOST_LOGITS, choose_likeliest, decode_token, softmax
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.graphs import export_json, label_nodes
from jclt.graphs.names import LabelTexts
from jclt.graphs.viewer_json import Json
from jclt.interventions import steer
from jclt.models import Model, Set, run
from jclt.models.chat import is_chat
from jclt.models.model import token_row
from jclt.shapes import Float, Int

Request = Mapping[str, Any]

MOST_FEATURES, NODE_THRESHOLD, EDGE_THRESHOLD = 10_000, 0.8, 0.98
NEW_TOKENS, TOP_TOKENS = 10, 5
"""What their server takes where a request says nothing."""


class Steering(NamedTuple):
    """A checked request to change one feature."""

    layer: int
    feature: int
    active_at: int  # the position of the activation that `delta` is added to
    position: int | None  # where it is changed; None: at all new tokens
    delta: float | None  # None: the feature is set to 0


def check_graph_request(request: Request) -> None:
    check_prompt(request)
    slug = request.get("slug_identifier", "")
    if not isinstance(slug, str):
        raise UserError("slug_identifier: expected a text")
    if request.get("signed_url"):
        raise UserError("signed_url: nothing is sent elsewhere from here, expected none; the graph is in the answer")
    if request.get("enable_qk_tracing"):
        raise UserError("enable_qk_tracing: attention patterns are not traced, expected false")
    read_likeliest(request)
    read_integer(request, "max_feature_nodes", MOST_FEATURES)
    read_pruning(request)


def generate_graph(model: Model, coder: Coder, labels: LabelTexts, request: Request) -> Json:
    """The pruned graph as published viewers read it."""
    check_model(model, request)
    tokens, (most, mass) = find_tokens(model, request), read_likeliest(request)
    targets = None
    if (most, mass) != (MOST_LOGITS, LOGIT_MASS):
        targets = choose_likeliest(np.asarray(run(model, tokens)[0][-1]), most, mass)
    graph = attribute(
        model, coder, tokens, targets=targets, max_features=read_integer(request, "max_feature_nodes", MOST_FEATURES)
    )
    pruned = label_nodes(graph, labels).prune(*read_pruning(request))
    return export_json(pruned, slug=request.get("slug_identifier") or None)


def check_forward_request(request: Request) -> None:
    check_prompt(request)
    read_likeliest(request)


def find_likeliest(model: Model, request: Request) -> Json:
    """The smallest set of next tokens with the desired probability together."""
    tokens = find_tokens(model, request)
    logits = np.asarray(run(model, tokens)[0][-1])
    chosen, probabilities = choose_likeliest(logits, *read_likeliest(request)), softmax(logits)
    texts = [decode_token(model, token) for token in tokens.tolist()]
    return {
        "prompt": request["prompt"] if request.get("prompt") else "".join(texts),
        "input_tokens": texts,
        "salient_logits": [
            {"token": decode_token(model, token), "token_id": token, "probability": float(probabilities[token])}
            for token in chosen
        ],
        "total_salient_tokens": len(chosen),
        "cumulative_probability": float(probabilities[chosen].sum()),
    }


def check_steering_request(request: Request) -> None:
    check_prompt(request)
    read_steering(request)
    read_integer(request, "n_tokens", NEW_TOKENS)
    read_integer(request, "top_k", TOP_TOKENS)
    if request.get("seed") is not None:
        read_integer(request, "seed", 0, least=0)
    temperature = read_number(request, "temperature", 0.0, 0.0, math.inf)
    if temperature > 0 and read_number(request, "freq_penalty", 0.0, -math.inf, math.inf) > 0:
        raise UserError("freq_penalty: not available with a temperature above 0, expected 0")


def steer_prompt(model: Model, coder: Coder, request: Request) -> Json:
    """What the model writes without and with the changes, and the likeliest tokens after each token from the prompt's
    last one on."""
    check_model(model, request)
    tokens, new = find_tokens(model, request), read_integer(request, "n_tokens", NEW_TOKENS)
    steered = steer(
        model,
        coder,
        tokens,
        make_edits(model, coder, tokens, read_steering(request)),
        new + 1,  # the last one only for the likeliest tokens in its place
        attention="frozen" if request.get("freeze_attention") else "free",
        temperature=read_number(request, "temperature", 0.0, 0.0, math.inf),
        seed=request.get("seed") or 0,
    )
    most, length = read_integer(request, "top_k", TOP_TOKENS), len(tokens)
    ids, original = (cut_at_stop(model, row[:-1], length) for row in (steered.tokens, steered.original_tokens))
    logits = np.asarray(run(model, original)[0])[length - 1 :]
    return {
        "DEFAULT_GENERATION": "".join(decode_token(model, token) for token in original.tolist()),
        "STEERED_GENERATION": "".join(decode_token(model, token) for token in ids.tolist()),
        "DEFAULT_LOGITS_BY_TOKEN": list_by_token(model, original, logits, most),
        "STEERED_LOGITS_BY_TOKEN": list_by_token(model, ids, steered.logits[: len(ids) - length + 1], most),
    }


def make_edits(model: Model, coder: Coder, tokens: Int[np.ndarray, "T"], steering: Sequence[Steering]) -> list[Set]:
    """Sets each feature to its activation on the prompt plus `delta`, or to 0."""
    config = coder.config
    for one in steering:
        if one.layer not in config.covered or not one.feature < config.features:
            raise UserError(
                f"features: layer {one.layer}, index {one.feature}, expected a layer of "
                f"{', '.join(map(str, config.covered))} and an index below {config.features}"
            )
        if not max(one.active_at, one.position or 0) < len(tokens):
            raise UserError(f"features: a position beyond the prompt's {len(tokens)} tokens")
    _, seen = run(model, tokens, capture=(config.reads,))
    edits = []
    for one in steering:
        value = 0.0
        if one.delta is not None:
            encoder, read = coder.load_encoder(config.covered.index(one.layer)), seen[config.reads][one.layer]
            value = float(encoder.encode(0, read[one.active_at][None])[0, one.feature]) + one.delta
        position = slice(len(tokens), None) if one.position is None else one.position
        edits.append(Set(value, layer=one.layer, position=position, feature=one.feature))
    return edits


def list_by_token(
    model: Model, tokens: Int[np.ndarray, "N"], logits: Float[np.ndarray, "n V"], most: int
) -> list[Json]:
    """Each token with the likeliest tokens after it; none before the prompt's last token."""
    before: list[list[Json]] = [[] for _ in range(len(tokens) - len(logits))]
    after = []
    for row in logits:
        probabilities = softmax(row)
        likeliest = np.argsort(-probabilities, kind="stable")[:most].tolist()
        after.append([{"token": decode_token(model, t), "prob": float(probabilities[t])} for t in likeliest])
    return [
        {"token": decode_token(model, token), "top_logits": tops}
        for token, tops in zip(tokens.tolist(), before + after, strict=True)
    ]


def cut_at_stop(model: Model, tokens: Int[np.ndarray, "N"], length: int) -> Int[np.ndarray, "_"]:
    """The tokens up to the first new one that ends a text."""
    stops = np.flatnonzero(np.isin(tokens[length:], model.config.stop_tokens))
    return tokens[: length + stops[0]] if len(stops) else tokens


def check_prompt(request: Request) -> None:
    messages, prompt = request.get("messages"), request.get("prompt")
    if messages is not None and not is_chat(messages):
        raise UserError("messages: expected a list of objects with role and content")
    if not messages and not (isinstance(prompt, str) and prompt):
        raise UserError("prompt: empty, expected a text, or messages")


def find_tokens(model: Model, request: Request) -> Int[np.ndarray, "T"]:
    """The prompt's tokens. A text may begin with the special tokens that the tokenizer adds, as a graph's does."""
    if request.get("messages"):
        return token_row(model, request["messages"])
    added = "".join(decode_token(model, token) for token in model.encode(""))
    return token_row(model, request["prompt"].removeprefix(added))


def check_model(model: Model, request: Request) -> None:
    """Raises an error if the request names another model. Folders before the name do not count."""
    asked = request.get("model_id")
    if not isinstance(asked, str) or asked.rpartition("/")[2] != model.name.rpartition("/")[2]:
        raise UserError(f"model_id {asked!r}: not here, expected '{model.name}'")


def read_steering(request: Request) -> list[Steering]:
    features = request.get("features")
    if not isinstance(features, list) or not features or not all(isinstance(one, dict) for one in features):
        raise UserError("features: expected a list of at least one object")
    return [read_one_steering(one) for one in features]


def read_one_steering(one: Request) -> Steering:
    ablate, at_new = one.get("ablate", False), one.get("steer_generated_tokens", False)
    if not isinstance(ablate, bool) or not isinstance(at_new, bool):
        raise UserError("features: ablate and steer_generated_tokens, expected true or false")
    if ablate == (one.get("delta") is not None):
        raise UserError("features: expected either ablate or a delta")
    if at_new == (one.get("steer_position") is not None):
        raise UserError("features: expected either steer_generated_tokens or a steer_position")
    return Steering(
        layer=read_integer(one, "layer", None, least=0),
        feature=read_integer(one, "index", None, least=0),
        active_at=read_integer(one, "token_active_position", None, least=0),
        position=None if at_new else read_integer(one, "steer_position", None, least=0),
        delta=None if ablate else read_number(one, "delta", None, -math.inf, math.inf),
    )


def read_likeliest(request: Request) -> tuple[int, float]:
    """How many next tokens at most, and with what probability together."""
    most = read_integer(request, "max_n_logits", MOST_LOGITS)
    return most, read_number(request, "desired_logit_prob", LOGIT_MASS, 0.0, 1.0)


def read_pruning(request: Request) -> tuple[float, float]:
    node_threshold = read_number(request, "node_threshold", NODE_THRESHOLD, 0.0, 1.0)
    return node_threshold, read_number(request, "edge_threshold", EDGE_THRESHOLD, 0.0, 1.0)


def read_integer(request: Request, name: str, default: int | None, least: int = 1) -> int:
    value = request.get(name, default)
    if type(value) is not int or not least <= value < 1 << 31:
        raise UserError(f"{name}: expected an integer of at least {least}")
    return value


def read_number(request: Request, name: str, default: float | None, low: float, high: float) -> float:
    value = request.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        bounds = f" from {low:g} to {high:g}" if math.isfinite(high) else ""
        raise UserError(f"{name}: expected a number{bounds}")
    return float(value)
