"""`jclt verify` on the handmade model: it accepts the model's own neurons, and rejects the coder that writes the answer
from the first layer, which reconstructs without error."""

import json

import numpy as np
import pytest
from handmade_coders import VARIANTS, faithful_coder, unfaithful_coder
from more_cases import mark_others

import jclt
from jclt.cli.main import main
from jclt.errors import UserError
from jclt.evaluation import evaluate_reconstruction
from jclt.evaluation.perturbations import compare_writes, draw_like, prepare_prompt, push_prompt, push_with_writes
from jclt.evaluation.verdict import find_pairs, tabulate_verdicts, verify
from jclt.interventions import make_pairs
from jclt.world.handmade import ANSWERS, PROMPTS, STATE_OF_CITY, build_two_hop

PAIRS = [
    {"clean": PROMPTS[a], "corrupted": PROMPTS[b], "answer": ANSWERS[a], "wrong_answer": ANSWERS[b]}
    for a, b in zip(range(12), np.roll(range(12), 1).tolist(), strict=True)
    if STATE_OF_CITY[a] != STATE_OF_CITY[b]
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The handmade model, its two coders and its pairs, as files."""
    monkeypatch.chdir(tmp_path)
    model = build_two_hop(norms="layer")
    jclt.save_model(model, "model")
    jclt.save_coder(faithful_coder(model), "faithful")
    jclt.save_coder(unfaithful_coder(model), "unfaithful")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return tmp_path


def test_the_command_accepts_the_models_neurons_and_rejects_the_unfaithful_coder(folder, capsys):
    rest = ["--model", "model", "--prompts", "pairs.jsonl", "--count", "6", "--no-check"]
    for coder, status, followed in (("neurons", 0, 1.0), ("unfaithful", 1, 0.0)):
        assert main(["verify", coder, *rest, "--json", "verdict.json"]) == status
        words, figures = capsys.readouterr().out, json.loads((folder / "verdict.json").read_text())
        assert ("accepted:" in words, "rejected: after layer 0" in words) == (status == 0, status == 1)
        assert figures["accepted"] == (status == 0) and figures["failed"] == [0] * status
        hop = {"neurons": 0.0, "unfaithful": 1.0}[coder]
        assert figures["one_hop"]["0 concepts"]["value"] == pytest.approx(hop, abs=1e-4)
        assert figures["hopped"] == [0] * status and (
            "in one hop: earlier features have written 100%" in words
        ) == bool(hop)
        found, answers = figures["followed"]["0 concepts"], figures["answers"]["0 concepts"]
        assert found["value"] == pytest.approx(followed, abs=1e-4) and found.get("control", 0) < 0.5
        assert answers["value"] == followed and answers["control"] == 0
    # The reason why reconstruction does not reject it: it makes no error, with one active feature in place of two.
    last = np.tile([False, False, True], (12, 1))
    for name, l0 in (("faithful", 2), ("unfaithful", 1)):
        model = jclt.load_model("model")
        figures = evaluate_reconstruction(model, jclt.load_coder(name), np.asarray(PROMPTS), mask=last).summary()
        assert figures["nmse"] < 1e-9 and figures["l0"] == pytest.approx(l0)


@pytest.mark.parametrize("name", mark_others(VARIANTS, []))
def test_every_variant_gets_its_verdict(name):
    model = build_two_hop(**VARIANTS[name])
    pairs = make_pairs(model, [tuple(row.values()) for row in PAIRS])
    good, bad = verify(model, faithful_coder(model), pairs), verify(model, unfaithful_coder(model), pairs)
    assert good.accepted and not bad.accepted
    assert good.followed[0, "concepts"].value > 0.999 and bad.followed[0, "concepts"].value < 0.001
    assert abs(good.one_hop[0, "concepts"].value) < 1e-4 and bad.one_hop[0, "concepts"].value > 0.999
    lines = [line.split() for line in tabulate_verdicts({"good": good, "bad": bad}).splitlines()]
    assert [line[1] for line in lines[1:]] == ["good", "bad"]
    assert float(lines[1][-1]) == pytest.approx(0, abs=0.002) == float(lines[2][-1])


@pytest.mark.exhaustive  # of a coder with errors; the command above tests the passes on a model whose answer is known
@pytest.mark.parametrize("local", [False, True])
def test_the_passes_are_those_of_interventions(local):
    """Of a push at one position, in a coder that makes errors."""
    from traced_graphs import make_case

    case = make_case("gpt2", "clt", "float32")
    prepared = prepare_prompt(*case)
    values = np.zeros((1, len(prepared.tokens), case.model.config.width), np.float32)
    values[0, 2] = draw_like(np.ones_like(values[:, 2:3]), np.random.default_rng(0))[0, 0]
    edit = jclt.Add(values[0, 2], site="resid_post", layer=0, position=2)
    found = push_prompt(prepared, np.zeros(1, np.int32), values, local=local)
    want, _ = jclt.run(case.model, case.tokens, edit=edit)
    np.testing.assert_allclose(found.true.logits[0], want[-1] - want[-1].mean(), atol=1e-4)
    treatment = "frozen" if local else "free"
    for logits, setting in ((found.replaced.logits, {}), (found.fixed.logits, {"layers": (0, 2)})):
        options = {"attention": treatment, "norms": treatment, "predict": False, **setting}
        want = jclt.intervene(*case, edit, **options).logits[-1]
        np.testing.assert_allclose(logits[0], want - want.mean(), atol=1e-4)


@pytest.mark.exhaustive  # of a coder with errors; the command above has one whose features write two layers
def test_with_all_that_earlier_features_and_errors_write_in_the_other_prompt_the_pass_is_that_prompts():
    from traced_graphs import make_case

    model, coder, tokens = make_case("gpt2", "clt", "float32")
    prepared, other = (prepare_prompt(model, coder, ids) for ids in (tokens, np.roll(tokens, 2)))
    layers = np.arange(model.config.layers - 1)
    values = (other.streams.layers - prepared.streams.layers)[layers, 0]
    values[:, prepared.length :] = 0
    later = np.arange(model.config.layers)[:, None] > layers  # of each push
    errors = np.where(later[:, :, None, None], other.original.errors - prepared.original.errors, 0)
    errors[:, :, prepared.length :] = 0
    writes = np.swapaxes(compare_writes(prepared, other)[layers], 0, 1)
    found = push_with_writes(prepared, layers, values, writes + errors)
    np.testing.assert_allclose(found.logits, np.tile(other.streams.logits, (len(layers), 1)), atol=1e-4)
    without = push_with_writes(prepared, layers, values, errors + 0 * writes)
    assert np.abs(without.logits - other.streams.logits).max(axis=1).min() > 1e-2  # earlier features write something


def test_what_cannot_be_verified_is_named():
    model = build_two_hop()
    with pytest.raises(UserError, match="^pairs: none has a corrupted prompt"):
        verify(model, faithful_coder(model), make_pairs(model, [(PROMPTS[0], None, ANSWERS[0])]))
    with pytest.raises(UserError, match="has no tokenizer, expected a file of pairs"):
        find_pairs(model, "world", 3)
