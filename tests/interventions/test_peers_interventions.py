"""Interventions agree with circuit-tracer's on random models: logits, activations, pre-activations and generated text.

What each call of circuit-tracer is called here is in `SETTINGS`. The two differ by design, where the tests do not go:

- Position 0: circuit-tracer takes its activations as 0, so that a value there is added to what the model has (a test).
- An edited feature: circuit-tracer returns what the encoder computes, here it is what the feature was set to.
- Two values of one feature at one place: in circuit-tracer the later one counts, here they are refused.
- Features outside the constrained layers: circuit-tracer writes what they write into these, here they are refused.
- With constrained layers circuit-tracer freezes attention in all cases, and norms only where they are all layers.
- Generation: in circuit-tracer only a slice without an end acts on new tokens, and on all of them, wherever it begins.
  Here a position is a position. Constrained layers do not exist in generation here.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from golden_cases import FOLDER
from random_coders import random_coder

import jclt
from jclt.coders import CoderConfig

torch = pytest.importorskip("torch", reason="needs circuit-tracer")
peer_models = pytest.importorskip("circuit_tracer_models", reason="needs circuit-tracer")
golden = pytest.importorskip("golden.make_golden", reason="needs torch and transformers")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SEED = 8
TEXT = "word4 word95 word17 word50 word33"
CASES = {
    "gpt2": ("gpt2", "clt", {}),
    "llama": ("llama2", "transcoder", {}),
    "llama skip": ("llama2", "skip", {}),
    "gemma2": ("gemma2", "clt", {"attention_bias": False}),
}
"""A family, a kind of coder, and changes of the family's configuration."""
CODERS = {
    "clt": CoderConfig("clt", 16),
    "transcoder": CoderConfig("transcoder", 16),
    "skip": CoderConfig("transcoder", 16, skip=True),
}
SETTINGS = {
    "all layers": ({"constrained_layers": range(3)}, {"layers": range(3)}),
    "first layers": ({"constrained_layers": range(2)}, {"layers": range(2), "norms": "free"}),
    "last layers": ({"constrained_layers": range(1, 3)}, {"layers": range(1, 3), "norms": "free"}),
    "frozen attention": ({"freeze_attention": True}, {"reference": "current", "norms": "free"}),
    "free": ({"freeze_attention": False}, {"reference": "current", "attention": "free", "norms": "free"}),
}
"""The arguments of `feature_intervention`, and ours."""


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A model with its coder here and in circuit-tracer, and a prompt."""
    name, kind, changes = CASES[request.param]
    folder = tmp_path_factory.mktemp("case")
    config = golden.cases()[name]
    source = golden.random_model(type(config).from_dict({**config.to_dict(), **changes}), SEED)
    source.save_pretrained(folder / "model")
    model = jclt.load_model(folder / "model")
    coder = random_coder(CODERS[kind].fit_to_model(model.config, "random"))
    jclt.save_coder(coder, folder / "coder", "circuit-tracer")
    peer = peer_models.make_replacement_model(source, folder / "coder", FOLDER / "llama3")
    tokens = peer.to_tokens(TEXT)[0].numpy()
    assert len(tokens) == 6
    return SimpleNamespace(model=model, coder=coder, peer=peer, tokens=tokens)


def choose_edits(case, layers) -> list[tuple[int, int | slice, int, float]]:
    """Layer, position, feature and value of several edits: an active feature is removed, a weak one enlarged, an
    inactive one switched on at all later positions, and one is set to a negative value."""
    _, active = case.peer.get_activations(torch.tensor(case.tokens))
    active = active.numpy()
    first, last = layers[0], layers[-1]
    at = {layer: np.argsort(active[layer, 2]) for layer in (first, last)}
    assert active[first, 2, at[first][-2]] > 0 == active[first, 2, at[first][0]]
    return [
        (first, 2, int(at[first][-1]), 0.0),
        (first, 2, int(at[first][-2]), 5.0),
        (first, slice(3, None), int(at[first][0]), 2.5),
        (last, 2, int(at[last][-1]), -1.5),
        (last, 4, int(at[last][0]), 3.0),
    ]


def to_ours(edits) -> list:
    return [jclt.Set(value, layer=layer, position=at, feature=feature) for layer, at, feature, value in edits]


def assert_close(got, want):
    """Within 1e-5 of the largest number."""
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=1e-5 * max(np.abs(want).max(), 1))


@pytest.mark.parametrize("setting", SETTINGS)
def test_interventions_are_circuit_tracers(case, setting):
    theirs, ours = SETTINGS[setting]
    edits = choose_edits(case, theirs.get("constrained_layers", range(3)))
    result = jclt.intervene(case.model, case.coder, case.tokens, to_ours(edits), predict=False, **ours)
    tokens, f = torch.tensor(case.tokens), result.features
    cells = (f.layer, f.position, f.feature)
    compared = (f.position > 0) & ~f.edited  # at position 0 theirs are 0
    assert f.edited.sum() == 4 + len(case.tokens) - 3

    plain, before = case.peer.get_activations(tokens)
    assert_close(result.original_logits, plain[0])
    assert_close(f.before[f.position > 0], before[cells][f.position > 0])
    logits, after = case.peer.feature_intervention(tokens, edits, **theirs)
    assert_close(result.logits, logits[0])
    assert_close(f.after[compared], after[cells][compared])
    assert np.count_nonzero(after.numpy()[:, 1:]) <= np.count_nonzero(f.after)  # none is missing here
    logits, linear = case.peer.feature_intervention(tokens, edits, apply_activation_function=False, **theirs)
    assert_close(result.logits, logits[0])
    assert_close(f.preactivation_after[f.position > 0], linear[cells][f.position > 0])

    assert np.abs(result.logits - result.original_logits).max() > 0.1
    assert np.abs(f.after - f.before)[compared].max() > 0.1


@pytest.mark.parametrize("setting", ["all layers", "free"])
def test_at_position_0_circuit_tracer_adds_the_value(case, setting):
    theirs, ours = SETTINGS[setting]
    f = jclt.intervene(case.model, case.coder, case.tokens, [], predict=False, **ours).features
    active = np.flatnonzero((f.layer == 0) & (f.position == 0) & (f.before > 0.1))
    feature = int(f.feature[active[0]])
    edit = jclt.Add(2.5, layer=0, position=0, feature=feature)
    result = jclt.intervene(case.model, case.coder, case.tokens, edit, predict=False, **ours)
    logits, _ = case.peer.feature_intervention(torch.tensor(case.tokens), [(0, 0, feature, 2.5)], **theirs)
    assert_close(result.logits, logits[0])


@pytest.mark.parametrize("attention", ["frozen", "free"])
def test_generation_is_circuit_tracers(case, attention):
    """Greedy, with edits of the prompt alone and of new tokens too. Both freeze the prompt's patterns alone."""
    edits = choose_edits(case, range(3))
    options = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    tokens, want, _ = case.peer.feature_intervention_generate(
        TEXT, edits, freeze_attention=attention == "frozen", max_new_tokens=6, **options
    )
    steered = jclt.steer(
        case.model, case.coder, case.tokens, to_ours(edits), 6, attention=attention, stop_tokens=(), norms="free"
    )
    assert_close(steered.logits, want)
    np.testing.assert_array_equal(steered.tokens, tokens[0])
    assert (steered.tokens != steered.original_tokens).any()
