"""The README and the pages in packages: each example runs and gives what its check says, each command parses, each link
leads to a file, and the transcripts are what the command prints."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from transcripts import check_transcript, find_transcript

import jclt
from jclt.cli.main import build_parser, main
from jclt.training.config import check_ranges

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for place in (".", "jclt", "tests", "experiments", "tpu_configs")
    for path in sorted((ROOT / place).glob("*.md" if place == "." else "**/*.md"))
}
MOST_LINES = 130


def list_blocks(page: str, language: str) -> list[str]:
    """The blocks between fences of one language; '' for those that name none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


EXAMPLES = {(page, number): block for page in PAGES for number, block in enumerate(list_blocks(page, "python"))}
COMMANDS = [
    (page, line)
    for page in PAGES
    for block in list_blocks(page, "")
    for line in block.splitlines()
    if re.match(r"(pip install .* && |\$ )?jclt ", line)
]

Names = dict[str, Any]


@pytest.fixture
def as_a_user(tmp_path, monkeypatch):
    """An empty working folder, and JAX with the settings and the one device that most users have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def check_road(names: Names) -> None:
    assert names["graph"].logit_names == (" Denver",)
    assert jclt.import_json("denver.json").logit_names == (" Denver",)
    assert f"{names['drop']:.1f} of {names['graph'].values[-1]:.1f}" in EXAMPLES["README.md", 0]
    assert names["drop"] > 1 and f"the least: {abs(names['control']):.1f}" in EXAMPLES["README.md", 0]


def check_models(names: Names) -> None:
    assert names["text"] == "calc: 36+59=95"
    assert set(names["seen"]) == {"mlp_in", "pattern"}
    want, _ = jclt.run(names["model"], "calc: 36+23=")
    np.testing.assert_allclose(names["swapped"], want, atol=1e-5)
    for changed in ("headless", "doubled", "silent"):
        assert float(abs(names[changed] - names["logits"]).max()) > 0.1
    again, _ = jclt.run(jclt.load_model("copy"), "calc: 36+59=")
    np.testing.assert_allclose(again, names["logits"], atol=1e-5)
    assert names["sharded"].mesh.size == jax.device_count()


def check_edits(names: Names) -> None:
    want, _ = jclt.run(names["model"], names["other"])
    np.testing.assert_allclose(names["patched"][-1], want[-1], atol=1e-5)
    np.testing.assert_array_equal(names["patched"][:-1], names["clean"][:-1])
    np.testing.assert_allclose(names["frozen"], names["patched"], atol=1e-5)
    np.testing.assert_array_equal(names["blind"][:-1], names["clean"][:-1])
    assert float(abs(names["blind"][-1] - names["clean"][-1]).max()) > 1e-3


def check_interventions(names: Names) -> None:
    result, divergences = names["result"], names["divergences"]
    assert result.features.edited.sum() == 1 and divergences[2] < 1e-6 < divergences[0]
    measured, predicted = (getattr(result.outputs, name)[0] for name in ("after", "predicted"))
    assert abs(measured - predicted) < 0.1 * abs(measured - result.outputs.before[0])
    assert len(names["each"].features) == len(names["graph"].features)
    assert names["text"] and isinstance(names["text"], str)


def check_coders(names: Names) -> None:
    tokens, config = len(names["logits"]), names["coder"].config
    assert names["features"].shape == (tokens, config.features)
    assert 0 < np.count_nonzero(names["features"]) < names["features"].size / 10
    assert names["error"].shape == (4,) and names["error"].mean() < 0.15  # its text is unlike what it was trained on
    assert names["replaced"][-1].argmax() == names["logits"][-1].argmax()
    for got, want in zip(jax.tree.leaves(names["same"]), jax.tree.leaves(names["coder"]), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(names["neuron_values"], names["seen"]["mlp_neurons"][1], atol=1e-5)


def check_attribution(names: Names) -> None:
    graph, part = names["graph"], names["part"]
    assert graph.logit_names == ("95", "95 - 94") and len(names["graphs"]) == 2
    assert np.abs(graph.residual).max() < 1e-4 * np.abs(graph.values).max()
    assert len(part.features) == 50 and 0 < part.missing < 1 and graph.missing < 1e-6
    low, high = part.scores.replacement_interval
    assert low < high and low - 1e-6 <= names["graphs"][0].scores.replacement <= high + 1e-6
    np.testing.assert_array_equal(jclt.load_graph("sum.npz").adjacency, graph.adjacency)


def check_graphs(names: Names) -> None:
    graph, small = names["graph"], names["small"]
    assert 0 < len(small.features) < len(graph.features)
    assert 0 < small.scores.replacement < graph.scores.replacement < 1
    assert np.count_nonzero(names["again"].adjacency) == np.count_nonzero(small.adjacency)
    assert len(names["paths"]) == 3 and all('-> "95"' in path for path in names["paths"])
    assert names["lengths"][0] == 0 and names["lengths"].sum() == pytest.approx(1)
    assert [point.nodes for point in names["points"]] == sorted(point.nodes for point in names["points"])
    assert names["names"] == ["the first two", "the third"] and names["edges"].shape == (2, 2)
    assert "the second number" in names["labelled"].labels and len(names["suggested"]) > 1


def check_evaluation(names: Names) -> None:
    verdict = names["verdict"]
    assert verdict.accepted and verdict.followed[0, "concepts"].value == pytest.approx(1, abs=1e-4)


def check_patching(names: Names) -> None:
    values = names["patched"].values
    assert values.shape == (3, 4, 2) and Path("patching.png").stat().st_size > 1000
    assert values[0, 3, 1] > 0.9 and abs(values[0, 0, 1]) < 0.1  # the answer is at the end of the last layers alone
    assert names["traced"].total_effect > 0.3 and names["lost"].effects.min() < -0.05
    assert len(names["paths"].values) == 20 and np.abs(names["paths"].effects).max() > 0.01


def check_edges(names: Names) -> None:
    circuit, scores = names["circuit"], names["scores"]
    assert 0 < circuit.kept.sum() < 96 and "->logits" in circuit.names[-1] and "->" in scores.summarize()
    faithful, at_random = (x.faithfulness[1].value for x in (names["grades"], names["random"]))
    assert faithful > 0.5 > at_random and jclt.load_graph("circuit.npz").counts["head"] == 16
    assert (names["kept"] == circuit.kept).all() and (names["again"].values == scores.values).all()


def check_circuits(names: Names) -> None:
    assert names["scores"].per_pair.shape == (24, 4, 7, 512)
    few, many = (figure.value for figure in names["grades"].faithfulness)
    assert 0.6 < few < many < 1.2 and names["random"].faithfulness[1].value < 0.1


def check_labels(names: Names) -> None:
    assert names["label"].text == "ones = 4" and names["label"].source == "concepts"
    assert jclt.features.load_labels("labels.json")[3, 295].source == "yours"


def check_features(names: Names) -> None:
    record, again = names["record"], names["again"]
    assert "[ capital]" in names["best"] and names["tokens"][" capital"] > 10 and " Denver" in names["raised"]
    assert names["densities"][149] == record.density and again[0, 149].top == record.top
    assert len(list(Path("for_a_viewer").iterdir())) == 2


def check_world(names: Names) -> None:
    example, pair = names["example"], names["pair"]
    assert example.answers and {"city", "state", "answer"} <= {c.name for c in example.concepts}
    assert pair.clean.answers != pair.corrupted.answers and pair.clean.prompt != pair.corrupted.prompt


def check_coder_settings(names: Names) -> None:
    check_ranges(names["config"])
    assert names["config"].sparsity_term == "none" and names["config"].coder.rule == "jumprelu"


def check_model_settings(names: Names) -> None:
    check_ranges(names["config"])
    assert names["config"].model == names["model"] and names["config"].steps == 20_000


def check_notebook(names: Names) -> None:
    view, saved = names["view"], jclt.load_graph("sum.npz")
    assert saved.supernodes == {"two features": (3, 5)} and view.pinned == [3, 5] and len(names["edits"]) > 0
    assert saved.prune(*view.thresholds).nodes.kind.shape < saved.nodes.kind.shape


CHECKS: dict[tuple[str, int], Callable[[Names], None]] = {
    ("README.md", 0): check_road,
    ("jclt/models/README.md", 0): check_models,
    ("jclt/models/README.md", 1): check_edits,
    ("jclt/coders/README.md", 0): check_coders,
    ("jclt/evaluation/README.md", 0): check_evaluation,
    ("jclt/interventions/README.md", 0): check_interventions,
    ("jclt/attribution/README.md", 0): check_attribution,
    ("jclt/circuits/README.md", 0): check_circuits,
    ("jclt/circuits/README.md", 1): check_edges,
    ("jclt/features/README.md", 0): check_features,
    ("jclt/features/README.md", 1): check_labels,
    ("jclt/graphs/README.md", 0): check_graphs,
    ("jclt/interventions/README.md", 1): check_patching,
    ("jclt/viewer/README.md", 0): check_notebook,
    ("jclt/world/README.md", 0): check_world,
    ("jclt/training/README.md", 0): check_coder_settings,
    ("jclt/training/README.md", 1): check_model_settings,
}
"""What each Python block of each page must have computed: its names, after it has run in a folder of its own."""


def test_every_example_has_a_check():
    assert set(EXAMPLES) == set(CHECKS)


@pytest.mark.parametrize(("page", "number"), EXAMPLES)
def test_an_example_runs_and_gives_what_its_check_says(page, number, as_a_user):
    names: Names = {}
    exec(EXAMPLES[page, number], names)
    CHECKS[page, number](names)


def test_a_transcript_is_what_the_command_prints(as_a_user, capsys):
    """That of `jclt demo` is compared in tests/cli, where the command runs."""
    command = ["attribute", "calc: 21+54="]
    main(command)
    shown = find_transcript(PAGES["jclt/attribution/README.md"], command)
    assert len(shown) == 1
    check_transcript(shown, capsys.readouterr().out)


@pytest.mark.exhaustive  # slow; the example of the same page makes the same pass
def test_the_transcript_of_features_is_what_the_command_prints(as_a_user, capsys):
    command = ["features", "demo", "--rows", "256", "--show", "0/149"]
    assert main(command) == 0
    shown = find_transcript(PAGES["jclt/features/README.md"], command)
    printed = capsys.readouterr().out
    check_transcript(shown, printed)
    assert len(shown) == 2 and "layer 0 feature 149: fires at" in printed
    assert main([*command[:4], "--out", "features", "--viewer", "bundle"]) == 0  # nothing is done again
    assert Path("bundle/index.json.gz").exists()
    assert main([*command[:4], "--show", "4/0"]) == 2
    assert "expected a layer of 0, 1, 2, 3" in capsys.readouterr().err


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_line_parses(page, line):
    words = shlex.split(line, comments=True)
    assert build_parser().parse_args(words[words.index("jclt") + 1 :]).function


def test_the_readme_is_short_and_names_the_commands_that_ci_runs():
    assert README.count("\n") <= MOST_LINES
    assert {"pip install . && jclt demo", "pip install -e '.[test]' && pytest -n 2"} <= set(README.splitlines())
    assert len(COMMANDS) > 15  # commands are found at all


def list_links(page: str) -> list[tuple[Path, str]]:
    """The files that a page links to, and the heading in each; without addresses."""
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if "://" not in link]
    return [((ROOT / page).parent / path if path else ROOT / page, heading) for path, _, heading in links]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for path, heading in list_links(page):
        assert path.exists(), f"{page}: {path}"
        headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^a-z0-9 -]", "", text.lower()).replace(" ", "-") for text in headings]
        assert not heading or heading in slugs, f"{page}: {heading}"


def test_pages_and_the_readme_link_to_each_other():
    pages = {page for page in PAGES if page.startswith("jclt/") or page.count("/") == 1}
    linked = {path.resolve() for path, _ in list_links("README.md")}
    for page in pages:
        assert (ROOT / page).resolve() in linked, page
        assert (ROOT / "README.md").resolve() in {path.resolve() for path, _ in list_links(page)}, page
