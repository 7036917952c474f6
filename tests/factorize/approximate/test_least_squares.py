"""Linear algebra of the fits, against numpy, on regular and on singular matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sepconvert.factorize.approximate.least_squares import (
    affordable_sweeps,
    apply_metric,
    conjugate_gradients,
    eigenvalue_cutoff,
    has_converged,
    kronecker_inverse,
    leading_rows,
    solve_semidefinite,
    symmetric_eigen,
    to_single,
)


def semidefinite(size, rank, seed=0, batch=2):
    """Symmetric positive semidefinite matrices batch × size × size of a rank."""
    half = np.random.default_rng(seed).standard_normal((batch, size, rank))
    return torch.from_numpy(half @ half.transpose(0, 2, 1))


def normal(*shape, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_a_metric_multiplies_the_flattened_patch():
    kernel, metric = normal(2, 3, 4, 5), semidefinite(20, 20)
    expected = np.einsum("gox,gxy->goy", kernel.reshape(2, 3, 20), metric).reshape(2, 3, 4, 5)
    np.testing.assert_allclose(apply_metric(kernel, metric), expected, rtol=1e-12)


@pytest.mark.parametrize("rank", [6, 3, 0], ids=["regular", "singular", "zero"])
def test_semidefinite_systems_are_solved(rank):
    gram = semidefinite(6, rank)
    wanted = normal(2, 6, 4)
    solution = solve_semidefinite(gram, gram @ wanted)
    assert solution.isfinite().all()
    np.testing.assert_allclose(gram @ solution, gram @ wanted, rtol=0, atol=1e-11)
    if rank == 6:
        np.testing.assert_allclose(solution, wanted, rtol=1e-8)


def test_each_system_has_a_ridge_of_its_own_scale():
    gram = torch.stack([1e-20 * semidefinite(4, 4, batch=1)[0], 1e20 * semidefinite(4, 4, batch=1)[0]])
    wanted = normal(2, 4, 1)
    np.testing.assert_allclose(solve_semidefinite(gram, gram @ wanted), wanted, rtol=1e-8)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 6), st.integers(0, 2**20))
def test_leading_rows_span_the_best_approximation_under_the_metric(rows, columns, matrix_rank, seed):
    """By definition: the residual in the metric is that of the truncated SVD of A L."""
    matrices = normal(rows, matrix_rank, seed=seed) @ normal(matrix_rank, columns, seed=seed + 1)
    metric = semidefinite(columns, columns + 2, seed, batch=1)[0]
    for rank in range(1, columns + 1):
        basis = leading_rows(matrices[None], metric[None], rank)[0].numpy()
        np.testing.assert_allclose(basis @ basis.T, np.eye(rank), rtol=0, atol=1e-10)
        factor = np.linalg.cholesky(metric.numpy())
        weighted, directions = matrices.numpy() @ factor, basis @ factor
        fitted = np.linalg.lstsq(directions.T, weighted.T, rcond=None)[0]
        residual = np.linalg.norm(weighted.T - directions.T @ fitted)
        best = np.sqrt((np.linalg.svd(weighted, compute_uv=False)[rank:] ** 2).sum())
        assert residual == pytest.approx(best, rel=1e-6, abs=1e-9 * (1 + np.linalg.norm(weighted)))


@pytest.mark.parametrize("left_rank", [3, 1, 0])
@pytest.mark.parametrize("right_rank", [4, 2])
def test_the_kronecker_inverse_is_numpys_pseudo_inverse(left_rank, right_rank):
    left, right, x = semidefinite(3, left_rank), semidefinite(4, right_rank, seed=5), normal(2, 3, 4)
    found = kronecker_inverse(symmetric_eigen(left), symmetric_eigen(right))(x)
    for part in range(2):
        inverse = np.linalg.pinv(np.kron(left[part], right[part]), rcond=1e-10, hermitian=True)
        expected = (inverse @ x[part].flatten().numpy()).reshape(3, 4)
        np.testing.assert_allclose(found[part], expected, rtol=1e-6, atol=1e-9)


def test_eigenvalues_are_those_of_numpy_and_keep_their_order_in_single_precision():
    matrices = semidefinite(5, 3)
    values, vectors = symmetric_eigen(matrices)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrices), atol=1e-12)
    np.testing.assert_allclose(vectors * values[:, None] @ vectors.mT, matrices, atol=1e-12)
    single = to_single((values, vectors))
    assert {part.dtype for part in single} == {torch.float32}
    np.testing.assert_allclose(single[0], values, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cutoff_lies_between_rounding_and_its_root(dtype):
    eps = torch.finfo(dtype).eps
    assert 10 * eps < eigenvalue_cutoff(torch.ones(1, dtype=dtype)) < eps**0.5


@pytest.mark.parametrize("rank", [6, 3, 0], ids=["regular", "singular", "zero"])
def test_conjugate_gradients_end_after_as_many_steps_as_eigenvalues(rank):
    gram = semidefinite(6, rank, batch=3)
    gram[2] = 0  # one system of nothing beside others
    wanted = gram @ normal(3, 6, 1)
    found = conjugate_gradients(lambda x: gram @ x, lambda x: x, wanted, (1, 2), 12)
    np.testing.assert_allclose(gram @ found, wanted, rtol=0, atol=1e-6)
    assert not found[2].any()


def test_no_step_of_conjugate_gradients_raises_the_objective():
    gram, wanted = semidefinite(8, 8, batch=1), normal(1, 8, 1)

    def objective(steps):
        x = conjugate_gradients(lambda x: gram @ x, lambda x: x, wanted, (1, 2), steps)
        return float((x * (gram @ x)).sum() / 2 - (x * wanted).sum())

    values = [objective(steps) for steps in range(9)]
    assert values[0] == 0
    assert (np.diff(values) < 0).all()


def test_a_perfect_preconditioner_needs_one_step():
    gram, wanted = semidefinite(5, 5), normal(2, 5, 1)
    found = conjugate_gradients(lambda x: gram @ x, lambda x: torch.linalg.solve(gram, x), wanted, (1, 2), 1)
    np.testing.assert_allclose(found, np.linalg.solve(gram, wanted), rtol=1e-8)


@pytest.mark.parametrize(
    ("objective", "converged"),
    [
        ([0.5], False),  # one sweep shows no progress yet
        ([0.5, 0.4], False),
        ([0.5, 0.4999], True),
        ([1e-3, 9.995e-4], True),  # less than a millionth of the power
        ([1e-3, 9.97e-4], False),
        ([1e-16], True),  # a perfect fit
        ([0.5, 0.5], True),
    ],
)
def test_fits_stop_when_a_sweep_gains_little(objective, converged):
    assert has_converged([100 * value for value in objective], 100.0) is converged


@pytest.mark.parametrize(("work", "sweeps"), [(1.0, 60), (1e9, 50), (2e10, 4), (1e15, 4)])
def test_wide_layers_get_fewer_sweeps(work, sweeps):
    assert affordable_sweeps(60, work) == sweeps
    assert affordable_sweeps(2, work) == 2
