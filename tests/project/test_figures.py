"""What the figures of the documentation show, against known numbers; what is stored of them is up to date."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import DOCS, ROOT, commands

sys.path.append(str(DOCS))
import figures
from facts import Facts, Flow, tables

from sepconvert.report.text.glossary import STEPS, WORDS


@pytest.fixture(scope="module")
def facts() -> Facts:
    """Return the facts as the code makes them now, timed in fewer rounds."""
    return Facts.gathered(runs=3)


def test_sobel_separates_and_laplace_s_and_trained_kernels_do_not(facts):
    sobel, laplacian, trained = facts.kernels
    assert sobel.error < 1e-7
    scale = sobel.row[0][0]
    np.testing.assert_allclose(np.ravel(sobel.column) * scale, [-1, -2, -1], rtol=1e-5)
    np.testing.assert_allclose(np.ravel(sobel.row) / scale, [1, 0, -1], rtol=1e-5, atol=1e-7)
    values = np.linalg.svd([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[1]
    values /= np.linalg.norm(values)
    np.testing.assert_allclose(laplacian.values, values, atol=1e-5)
    assert laplacian.error == pytest.approx(np.linalg.norm(values[1:]), rel=1e-5)
    assert 0.2 < trained.error < 0.8
    best, kernel = np.array(trained.column) @ trained.row, np.array(trained.kernel)
    assert np.linalg.norm(kernel - best) / np.linalg.norm(kernel) == pytest.approx(trained.error, rel=1e-3)


def test_spectra_of_a_merged_pair_and_of_an_ordinary_layer(facts):
    pair, ordinary = facts.spectra.values()
    assert (pair.holds, pair.rank) == (True, 16)
    assert pair.values[16] < 1e-6 < 1e-3 < pair.values[15]
    assert not ordinary.holds
    assert ordinary.rank == ordinary.full_rank


def test_multiplications_of_the_example(facts):
    assert facts.flow == Flow(8 * 8 * 5 * 5 * 3 * 256, 8 * 8 * (5 * 5 * 3 + 3 * 256))
    assert (facts.flow.dense, facts.flow.separable) == (1_228_800, 53_952)


def test_one_layer_in_two_forms_of_one_cost(facts):
    spatial, depthwise = facts.forms.forms.values()
    for each, other in zip(spatial, depthwise, strict=True):
        assert other.macs <= each.macs < 1.05 * other.macs
        assert 0 < each.output_error < each.weight_error
        assert 0 < other.output_error < other.weight_error
        assert other.output_error < each.output_error
    assert depthwise[0].output_error < 0.1 < 0.3 < spatial[0].output_error
    assert [each.output_error for each in depthwise] == sorted(
        (each.output_error for each in depthwise), reverse=True
    )


def test_plans_are_those_of_the_pages_of_results(facts):
    resnet9, resnet20, resnet8 = facts.curves
    assert [each.network for each in facts.curves] == ["ResNet-9", "ResNet-20", "ResNet-8"]
    assert [len(each.plans) for each in facts.curves] == [6, 6, 6]
    # As a reader of benchmarks/README.md finds them.
    assert resnet9.plans[3].speedup == (4.76, 4.70, 4.81)
    assert resnet9.plans[3].drop == (1.58, 1.07, 2.09)
    assert (resnet20.budget, resnet20.finetuned.drop) == (1.0, (0.34, -0.24, 0.92))
    assert (resnet8.budget, resnet8.delivered, resnet8.finetuned) == (0.3, 2, None)
    for curve in facts.curves:
        assert curve.plans[curve.delivered].drop[0] <= curve.budget


# What is stored -----------------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """Return the keys, the lengths and the types within a value of JSON; whole numbers may be floats."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def test_stored_numbers_have_the_form_of_those_that_would_be_made_now(facts):
    found = json.loads((figures.STORED / figures.NUMBERS).read_text(encoding="utf-8"))
    assert shape(found) == shape(figures.plain(facts))


def test_stored_numbers_that_no_clock_measures_are_those_that_would_be_made_now(facts):
    """Up to rounding, which differs between machines: noise below the tolerance, and the sign of factors."""
    stored = figures.stored()
    assert (stored.flow, stored.curves) == (facts.flow, facts.curves)
    for one, other in zip(stored.kernels, facts.kernels, strict=True):
        np.testing.assert_allclose(one.kernel, other.kernel, rtol=1e-5)
        np.testing.assert_allclose(one.values, other.values, atol=1e-5)
    for name, one in stored.spectra.items():
        np.testing.assert_allclose(one.values, facts.spectra[name].values, rtol=1e-3, atol=1e-7)
    for name, forms in stored.forms.forms.items():
        for one, other in zip(forms, facts.forms.forms[name], strict=True):
            assert one.rank == other.rank
            assert one.output_error == pytest.approx(other.output_error, rel=0.05)


def skeleton(table: str) -> str:
    """Return a table without its numbers, nor the width of what stands for them."""
    return re.sub(r"[ -]+", " ", re.sub(r"\d[\d.]*(e[-+]\d+)?", "#", table))


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """Return the tables as they are printed now."""
    return tables()


def test_stored_tables_have_the_form_of_those_that_would_be_made_now(printed):
    for name, text in printed.items():
        stored = (figures.STORED / f"{name}.txt").read_text(encoding="utf-8")
        assert skeleton(stored) == skeleton(text + "\n")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Return a folder with the figures of the stored numbers."""
    folder = tmp_path_factory.mktemp("figures")
    figures.draw(folder, figures.stored())
    return folder


def texts(figure: Path) -> list[str]:
    """Return what is written in a drawing, which matplotlib notes beside its glyphs."""
    return re.findall(r"<!-- (.*?) -->", figure.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", figures.FIGURES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_stored_figures_show_the_stored_numbers(drawn, name, theme):
    file = f"{name}-{theme}.svg"
    assert len(texts(drawn / file)) > 10
    assert texts(figures.STORED / file) == texts(drawn / file)


def test_everything_that_is_stored_is_made_and_shown(drawn, printed):
    made = {path.name for path in drawn.iterdir()} | {f"{name}.txt" for name in printed}
    assert {path.name for path in figures.STORED.iterdir()} == {*made, figures.NUMBERS}
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    assert {Path(each).name for each in re.findall(r"stored/([\w.-]+)", pages)} == made


def test_the_index_has_a_number_of_the_page_of_results_a_picture_and_two_commands():
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    index = " ".join(page.partition("{toctree}")[0].split())
    results = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in results.splitlines() if line.startswith("| ResNet-9, ")]
    speed, drop = re.findall(r"[\d.]+ \[[\d.]+, [\d.]+\]", row.replace("×", ""))[:2]
    assert f"**{speed} times as fast** and loses {drop} percentage points" in index
    assert "5,000 images" in index
    for condition in ("batch 1, one thread of an AMD EPYC virtual machine", "ONNX Runtime 1.32.0", "AVX2"):
        assert condition in index
        assert condition in " ".join(results.split())
    assert index.index("times as fast") < index.index("stored/curves-light.svg") < index.index("```sh")
    install, demo, own = commands(DOCS / "index.md")
    assert (install[0], demo, own[:2]) == ("pip", ["sepconvert", "demo"], ["sepconvert", "model.pt"])


def test_the_glossary_is_that_of_reports():
    page = figures.GLOSSARY.read_text(encoding="utf-8")
    assert figures.glossary(page) == page
    for entry in (*WORDS, *STEPS):
        assert f"### {entry.word}\n" in page
