"""The examples in the README run, and print what it shows."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jclt
from jclt.cli.main import main

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def as_a_user(tmp_path, monkeypatch):
    """An empty working folder, and JAX with the settings that users have."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_the_api_in_ten_lines(as_a_user):
    names: dict = {}
    exec(BLOCKS[0], names)
    assert names["text"] == "calc: 36+59=95"
    assert set(names["seen"]) == {"mlp_in", "pattern"}
    want, _ = jclt.run(names["model"], "calc: 36+23=")
    np.testing.assert_allclose(names["swapped"], want, atol=1e-5)
    for changed in ("headless", "silent"):
        assert float(abs(names[changed] - names["logits"]).max()) > 0.1
    again, _ = jclt.run(jclt.load_model("copy"), "calc: 36+59=")
    np.testing.assert_allclose(again, names["logits"], atol=1e-5)


def test_the_other_examples(as_a_user):
    world, training = {}, {}
    exec(BLOCKS[1], world)
    assert world["example"].answers and {"city", "state", "answer"} <= {c.name for c in world["example"].concepts}
    exec(BLOCKS[2], training)
    graphs: dict = {}
    exec(BLOCKS[4], graphs)
    assert graphs["graph"].logit_names == ("95", "95 - 94") and len(graphs["graphs"]) == 2
    assert training["config"].model == training["model"] and training["config"].steps == 20_000


def test_the_transcript_is_what_the_command_prints(as_a_user, capsys):
    main(["demo"])
    printed = capsys.readouterr().out.strip().split("\n\n")
    shown = README.split("$ jclt demo\n")[1].split("```")[0].strip().split("\n\n")
    without_digits = lambda text: re.sub(r"\d\.\d+", "p", text)  # noqa: E731
    assert {without_digits(block) for block in shown} <= {without_digits(block) for block in [*printed, "..."]}
    assert len(shown) == 4
