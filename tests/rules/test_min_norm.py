"""The min-norm point: its optimality conditions, an independent oracle, and hard inputs."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from mmpareto_optim import min_norm_weights

finite = st.floats(-10, 10, allow_subnormal=False).map(lambda x: round(x, 3))


def gradients(least: int, most: int) -> st.SearchStrategy[np.ndarray]:
    """Rows of small dimension: more of them than dimensions makes rank-deficient matrices."""
    shapes = st.tuples(st.integers(least, most), st.integers(1, 6))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=finite))


def brute_force(gram: np.ndarray) -> float:
    """Squared min-norm by trying every face of the simplex."""
    best = np.inf
    for size in range(1, len(gram) + 1):
        for face in map(list, combinations(range(len(gram)), size)):
            block = gram[np.ix_(face, face)]
            ones = np.ones((size, 1))
            bordered = np.block([[block, ones], [ones.T, np.zeros((1, 1))]])
            right = np.append(np.zeros(size), 1)
            weights = np.linalg.lstsq(bordered, right, rcond=None)[0][:size]
            if (weights >= -1e-12).all() and abs(weights.sum() - 1) < 1e-9:
                weights = np.clip(weights, 0, None)
                weights /= weights.sum()
                best = min(best, float(weights @ block @ weights))
    return best


def assert_optimal(gram: Tensor, alpha: Tensor) -> None:
    """On the simplex, and p . g_i >= ||p||^2 for every i, to the rounding of the numbers."""
    assert (alpha >= 0).all()
    torch.testing.assert_close(alpha.sum(-1), torch.ones_like(alpha.sum(-1)))
    along = (gram @ alpha.unsqueeze(-1)).squeeze(-1)
    square = (alpha * along).sum(-1, keepdim=True)
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    reach = (alpha * lengths).sum(-1, keepdim=True) * lengths
    rounding = 100 * gram.shape[-1] * torch.finfo(gram.dtype).eps
    assert (along - square >= -rounding * reach).all()


@given(gradients(2, 5))
def test_no_face_of_the_simplex_does_better(rows: np.ndarray) -> None:
    gram = torch.tensor(rows @ rows.T)
    alpha = min_norm_weights(gram)
    assert_optimal(gram, alpha)
    square = float(alpha @ gram @ alpha)
    largest = float(gram.diagonal().max())
    assert square == pytest.approx(brute_force(gram.numpy()), abs=1e-12 * (1 + largest))


@given(st.integers(2, 50), st.integers(1, 60), st.integers(0, 2**31))
def test_many_objectives_of_any_rank(objectives: int, dimension: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(objectives, dimension, generator=generator, dtype=torch.float64)
    gram = rows @ rows.T
    assert_optimal(gram, min_norm_weights(gram))


@given(st.integers(2, 6), st.integers(0, 2**31))
def test_batches_equal_single_matrices(objectives: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 5, objectives, 4, generator=generator, dtype=torch.float64)
    grams = rows @ rows.mT
    together = min_norm_weights(grams)
    assert together.shape == (2, 5, objectives)
    for index in np.ndindex(2, 5):
        torch.testing.assert_close(together[index], min_norm_weights(grams[index]))


@given(gradients(2, 5), st.randoms())
def test_permuting_objectives_permutes_the_point(rows: np.ndarray, random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    straight, permuted = torch.tensor(rows), torch.tensor(rows[order])
    point = min_norm_weights(straight @ straight.T) @ straight
    other = min_norm_weights(permuted @ permuted.T) @ permuted
    torch.testing.assert_close(point, other, atol=1e-6, rtol=1e-6)


def test_closed_form_of_two() -> None:
    # (g_m, g_u) = ((1, 0), (-1, 2)): the foot of the perpendicular from the origin.
    gram = torch.tensor([[1.0, -1.0], [-1.0, 5.0]])
    torch.testing.assert_close(min_norm_weights(gram), torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize(
    ("gram", "alpha"),
    [
        ([[4.0, 4.0], [4.0, 4.0]], [0.5, 0.5]),
        ([[1.0, -3.0], [-3.0, 9.0]], [0.75, 0.25]),
        ([[0.0, 0.0], [0.0, 2.0]], [1.0, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.5, 0.5]),
        ([[1.0, 5.0], [5.0, 25.0]], [1.0, 0.0]),
        ([[3.0]], [1.0]),
        ([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 2.0]], [0.0, 1.0, 0.0]),
    ],
    ids=["equal", "opposite", "one zero", "all zero", "parallel", "single", "zero among three"],
)
def test_degenerate_gradients(gram: list[list[float]], alpha: list[float]) -> None:
    torch.testing.assert_close(min_norm_weights(torch.tensor(gram)), torch.tensor(alpha))


@pytest.mark.parametrize("objectives", [2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_of_any_ratio(objectives: int, dtype: torch.dtype) -> None:
    """Orthogonal gradients: weights inverse to the squared lengths, however different."""
    lengths = torch.logspace(-15, 15, objectives, dtype=torch.float64)
    gram = torch.diag(lengths**2).to(dtype)
    expected = (1 / lengths**2) / (1 / lengths**2).sum()
    torch.testing.assert_close(min_norm_weights(gram), expected.to(dtype))


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_propagates(objectives: int, bad: float) -> None:
    gram = torch.eye(objectives)
    gram[0, 0] = bad
    batch = torch.stack([gram, torch.eye(objectives)])
    weights = min_norm_weights(batch)
    assert weights[0].isnan().all()
    torch.testing.assert_close(weights[1], torch.full((objectives,), 1 / objectives))


def test_takes_no_part_in_differentiation() -> None:
    gram = torch.eye(3, requires_grad=True)
    assert not min_norm_weights(gram).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_gram_matrix_is_kept(dtype: torch.dtype) -> None:
    weights = min_norm_weights(torch.eye(4, dtype=dtype))
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, torch.full((4,), 0.25, dtype=dtype))


@pytest.mark.parametrize("objectives", [2, 3, 7])
def test_never_reads_a_value_back_to_the_host(objectives: int) -> None:
    """Meta tensors have no values: whoever reads one, raises."""
    gram = torch.empty(4, objectives, objectives, device="meta")
    assert min_norm_weights(gram).shape == (4, objectives)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0)])
def test_matrices_that_are_not_square_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(\.\.\., m, m\)"):
        min_norm_weights(torch.zeros(shape))


@pytest.mark.parametrize("gram", [torch.eye(2).long(), torch.eye(2, dtype=torch.cfloat), [[1.0]]])
def test_what_is_not_a_real_tensor_is_refused(gram: object) -> None:
    with pytest.raises(TypeError, match="real floating-point tensor"):
        min_norm_weights(gram)  # type: ignore[arg-type]
