"""Labels in a file that grows, by rules, weights and an endpoint; labels by weights in float64; the command."""

from functools import partial

import numpy as np
import pytest
from features_of_random_coders import FEATURES, draw_rows, make_coder, make_model
from stub_endpoint import connect, serve

from jclt.cli.main import main
from jclt.coders import read_fingerprint
from jclt.features import label as labelling
from jclt.features.label import label_features, summarize_labels
from jclt.features.labels import Label, load_labels, save_labels
from jclt.features.rule_labels import measure_random_directions
from jclt.features.weight_labels import find_raised_tokens, label_by_weights, read_embeddings

PLACES = [(layer, feature) for layer in range(3) for feature in range(0, FEATURES, 8)]


@pytest.fixture(scope="module")
def traced():
    model = make_model()
    return model, make_coder(model)


def test_what_is_read_and_raised_equals_float64(traced):
    model, coder = traced
    x = np.asarray(model.params["token_embedding"], np.float64)
    x = x - x.mean(1, keepdims=True)
    x /= np.sqrt((x * x).mean(1, keepdims=True) + model.config.norm_epsilon)
    gain, bias = (np.asarray(model.params[f"mlp_norm_{name}"][1], np.float64) for name in ("gain", "bias"))
    want = np.asarray(coder.encoder(1)[0], np.float64)[[0, 5]] @ (x * gain + bias).T
    want -= want.mean(1, keepdims=True)
    np.testing.assert_allclose(read_embeddings(model, coder, 1, [0, 5]), want, atol=1e-4)
    raised = find_raised_tokens(model, coder, [(1, 5)])[1, 5]
    written = np.asarray(coder.decoder_rows(1), np.float64)[5].sum(0)
    gain = np.asarray(model.params["final_norm_gain"], np.float64)
    effects = (written - written.mean()) * gain @ np.asarray(model.params["unembedding"], np.float64).T
    effects -= effects.mean()
    assert [int(token) for token, _ in raised] == np.argsort(-effects)[: len(raised)].tolist()
    for (layer, feature), label in label_by_weights(model, coder, PLACES).items():
        verb, _, named = label.text.partition(" ")
        assert verb in ("say", "reads") and 1 <= len(named.split(", ")) <= 3, (layer, feature)


def find_numbers(prompt: str) -> str:
    """A judgement of as many pieces as the prompt has."""
    return str([n % 2 for n, line in enumerate(x for x in prompt.splitlines() if x[:1].isdigit())])


def test_labels_are_kept_and_the_rest_is_found(traced, tmp_path, monkeypatch):
    model, coder = traced
    monkeypatch.setattr(labelling, "LABELLED_AT_ONCE", 5)
    monkeypatch.setattr(labelling, "RANDOM_SHARE", 0.1)
    monkeypatch.setattr(labelling, "measure_random_directions", partial(measure_random_directions, count=4))
    out, mine = tmp_path / "labels.json", {(0, 8): Label("mine", "yours")}
    save_labels(out, mine, read_fingerprint(coder))
    run = label_features(model, coder, draw_rows(), out=out, places=PLACES, share=0.1)
    assert load_labels(out).keys() == run.labels.keys() and run.labels[0, 8] == mine[0, 8]
    assert set(run.labels) | set(run.failed) == set(PLACES)
    scored = [label for label in run.labels.values() if label.scores]
    assert scored and all({"detection", "fuzzing", "simulation", "random"} <= set(x.scores) for x in scored)
    assert "labels by rules: mean detection" in summarize_labels(run)
    again = label_features(model, coder, draw_rows(), out=out, places=list(run.labels))
    assert load_labels(out) == again.labels
    with serve(lambda prompt: "[1]" if "described so" in prompt else "**frequent** tokens") as server:
        asked = label_features(
            model, coder, draw_rows(), out=out, places=PLACES[:4], share=0.1, endpoint=connect(server)
        )
        count = len(server.asked)
        label_features(
            model, coder, draw_rows(), out=out, places=PLACES[:4], share=0.1, endpoint=connect(server), judge=False
        )
        assert len(server.asked) == count  # nothing is asked twice
        server.answer = find_numbers
        again = partial(label_features, model, coder, draw_rows(), out=out, places=PLACES[:4], share=0.1)
        again(endpoint=connect(server))  # what was not judged is
        assert all("described so" in x["messages"][0]["content"] for x in server.asked[count:])
        judged = {x for x, label in load_labels(out).items() if label.source == "endpoint" and label.scores}
        count = len(server.asked)
        again(endpoint=connect(server))
        assert judged and len(server.asked) == count
    named = {place: label.text for place, label in load_labels(out).items() if label.source == "endpoint"}
    assert named and set(named.values()) == {"frequent tokens"} and (0, 8) not in named
    assert set(named) <= set(PLACES[:4]) and judged <= set(named)
    assert "is missing" in summarize_labels(asked)


def test_the_command_says_what_is_wrong(capsys, tmp_path):
    assert main(["label", "demo", "--endpoint", "http://localhost:1"]) == 2
    assert "--endpoint and --explainer: expected both" in capsys.readouterr().err
    assert main(["label", "demo", "--endpoint", "nowhere", "--explainer", "x"]) == 2
    assert "endpoint 'nowhere': expected an address" in capsys.readouterr().err
