"""What the figures of the documentation show, against numbers that are known without them."""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[2] / "docs"))
import figures


@pytest.fixture(scope="module")
def facts():
    return {name: look_up() for name, (look_up, _) in figures.FIGURES.items()}


def test_sobel_separates_and_laplace_s_and_trained_kernels_do_not(facts):
    sobel, laplacian, trained = facts["kernels"]
    assert sobel.error < 1e-7
    scale = float(sobel.row[0, 0])
    np.testing.assert_allclose(sobel.column.flatten() * scale, [-1, -2, -1], rtol=1e-6)
    np.testing.assert_allclose(sobel.row.flatten() / scale, [1, 0, -1], rtol=1e-6, atol=1e-7)
    values = np.linalg.svd([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[1]
    values /= np.linalg.norm(values)
    np.testing.assert_allclose(laplacian.values, values, atol=1e-6)
    assert laplacian.error == pytest.approx(np.linalg.norm(values[1:]), rel=1e-5)
    assert 0.2 < trained.error < 0.8
    best = trained.column.double().numpy() @ trained.row.double().numpy()
    kernel = trained.kernel.double().numpy()
    assert np.linalg.norm(kernel - best) / np.linalg.norm(kernel) == pytest.approx(trained.error, rel=1e-3)


def test_spectra_of_a_merged_pair_and_of_an_ordinary_layer(facts):
    pair, ordinary = facts["spectra"].values()
    assert (pair.holds, pair.rank) == (True, 16)
    assert pair.spectrum[16] < 1e-6 < 1e-3 < pair.spectrum[15]
    assert not ordinary.holds
    assert ordinary.rank == ordinary.full_rank


def test_multiplications_of_the_example(facts):
    assert facts["flow"] == figures.Flow(8 * 8 * 5 * 5 * 3 * 256, 8 * 8 * (5 * 5 * 3 + 3 * 256))
    assert (facts["flow"].dense, facts["flow"].separable) == (1_228_800, 53_952)


def test_one_layer_in_two_forms_of_one_cost(facts):
    spatial, depthwise = facts["forms"].values()
    for each, other in zip(spatial, depthwise, strict=True):
        assert other.macs <= each.macs < 1.05 * other.macs
        assert 0 < each.output_error < each.weight_error
        assert 0 < other.output_error < other.weight_error
        assert other.output_error < each.output_error
    assert depthwise[0].output_error < 0.1 < 0.3 < spatial[0].output_error
    assert [each.output_error for each in depthwise] == sorted(
        (each.output_error for each in depthwise), reverse=True
    )


@pytest.mark.parametrize("name", figures.FIGURES)
@pytest.mark.parametrize("theme", figures.THEMES)
def test_figures_are_drawn(facts, name, theme, tmp_path):
    with mpl.rc_context(figures._style(figures.THEMES[theme])):
        figure = Figure(layout="constrained")
        figures.FIGURES[name][1](figure, facts[name], figures.THEMES[theme])
        figure.savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 5_000
