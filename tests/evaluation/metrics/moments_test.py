import tracemalloc

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import linalg, stats

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics.moments import Moments, feature_rows, frechet_distance
from tests.messages import refused

# (rows, width, rank) of features: full rank, in a subspace, fewer rows than dimensions.
KINDS = [(400, 24, 24), (400, 24, 7), (15, 48, 48)]


def moments_of(rows, batch_size=64):
  moments = Moments(np.shape(rows)[1])
  for start in range(0, len(rows), batch_size):
    moments.add(rows[start : start + batch_size])
  return moments


def two_sets(rng, n=400, width=24, rank=24):
  """Samples two sets with different means and covariances in one subspace of `rank` dimensions."""
  basis = rng.normal(size=(rank, width)) / np.sqrt(width)
  first = rng.normal(size=(n, rank))
  second = rng.normal(size=(n + 3, rank)) * np.linspace(0.5, 2, rank) + 0.3
  return first @ basis, second @ basis


def distance_of(first, second):
  return frechet_distance(moments_of(first), moments_of(second))


def distance_without_covariances(first, second):
  """Computes the distance from the rows: tr (C1 C2)^(1/2) sums the singular values of X Y^T."""
  means = first.mean(0), second.mean(0)
  x, y = ((rows - m) / np.sqrt(len(rows) - 1) for rows, m in zip((first, second), means))
  cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
  return ((means[0] - means[1]) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross


def mean_and_covariance(rows):
  return rows.mean(0), np.cov(rows, rowvar=False)


def test_moments_are_those_of_the_docstring():
  moments = Moments(2)
  moments.add([[0, 0], [2, 0]])
  moments.add([[1, 3]])
  assert moments.count == 3
  assert moments.mean.tolist() == [1, 1]
  assert moments.covariance().tolist() == [[1, 0], [0, 3]]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_batches_of_any_sizes_give_the_moments_of_numpy(sizes, seed):
  rng = np.random.default_rng(seed)
  rows = rng.normal(10_000.0, 1.0, (sum(sizes) + 2, 3)).astype(np.float32)
  moments = Moments(3)
  for batch in np.split(rows, np.cumsum(sizes)):
    moments.add(batch)
  exact = rows.astype(np.float64)
  assert moments.count == len(rows)
  np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=0, atol=1e-10)
  np.testing.assert_allclose(
    moments.covariance(), np.cov(exact, rowvar=False), rtol=1e-10, atol=1e-10
  )


def test_the_difference_of_raw_moments_would_not_be_exact():
  rows = np.random.default_rng(0).normal(10_000.0, 1.0, (300, 3))
  naive = (rows.T @ rows - len(rows) * np.outer(rows.mean(0), rows.mean(0))) / (len(rows) - 1)
  exact = np.cov(rows, rowvar=False)
  assert np.abs(naive - exact).max() > 1e-9
  assert np.abs(moments_of(rows, 7).covariance() - exact).max() < 1e-11


def test_merged_parts_are_the_whole():
  rows = np.random.default_rng(0).normal(3.0, 1.0, (100, 5))
  merged = moments_of(rows[:1])
  for part in (rows[:0], rows[70:], rows[1:70]):
    merged.merge(moments_of(part))
  whole = moments_of(rows)
  assert merged.count == 100
  np.testing.assert_allclose(merged.mean, whole.mean, atol=1e-13)
  np.testing.assert_allclose(merged.covariance(), whole.covariance(), atol=1e-13)


def test_counts_repeat_rows():
  rows, counts = np.random.default_rng(0).normal(3.0, 1.0, (6, 2)), [2, 0, 1, 3, 0, 1]
  counted = Moments(2)
  counted.add(rows, counts)
  repeated = moments_of(np.repeat(rows, counts, axis=0))
  assert counted.count == repeated.count == 7
  np.testing.assert_allclose(counted.mean, repeated.mean, atol=1e-13)
  np.testing.assert_allclose(counted.covariance(), repeated.covariance(), atol=1e-13)


def test_loaded_moments_continue_as_if_never_saved(tmp_path):
  rows = np.random.default_rng(0).normal(3.0, 1.0, (100, 5)).astype(np.float32)
  moments = moments_of(rows[:60], 20)
  moments.save(tmp_path / "moments.npz")
  assert [path.name for path in tmp_path.iterdir()] == ["moments.npz"]
  loaded = Moments.load(tmp_path / "moments.npz")
  for one in (loaded, moments):
    one.add(rows[60:])
  assert loaded.count == moments.count == 100
  assert np.array_equal(loaded.mean, moments.mean)
  assert np.array_equal(loaded.scatter, moments.scatter)


def test_a_file_without_moments_is_refused(tmp_path):
  with refused(UserError):
    Moments.load(tmp_path / "absent.npz")
  np.savez(tmp_path / "other.npz", mean=np.zeros(3))
  (tmp_path / "half.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:40])
  (tmp_path / "text.npz").write_text("no archive")
  with (tmp_path / "array.npz").open("wb") as file:
    np.save(file, np.zeros(3))
  (tmp_path / "empty.npz").write_text("")
  for name in ("other", "half", "text", "array", "empty"):
    with refused(UserError):
      Moments.load(tmp_path / f"{name}.npz")


def test_thirty_thousand_rows_are_streamed_without_being_held():
  width, rng = 64, np.random.default_rng(0)
  tracemalloc.start()
  moments = Moments(width)
  for _ in range(60):
    moments.add(rng.standard_normal((500, width), np.float32))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert moments.count == 30_000
  assert peak < 0.25 * 30_000 * width * 4  # A quarter of the float32 rows.


@pytest.mark.parametrize(
  "rows", [[1.0, 2.0], [[1.0, 2.0], [1.0, np.nan]], [[np.inf, 2.0]], [[1.0, 2.0, 3.0]]]
)
def test_rows_that_are_no_features_are_refused(rows):
  with refused(UserError):
    Moments(2).add(rows)


def test_features_keep_their_dtype():
  assert feature_rows(np.zeros((2, 3), np.float32)).dtype == np.float32


@pytest.mark.parametrize("n", [0, 1])
def test_two_rows_are_the_fewest(n):
  few, enough = moments_of(np.ones((n, 2))), moments_of(np.ones((2, 2)))
  with refused(UserError):
    frechet_distance(enough, few)
  assert frechet_distance(enough, enough) == 0.0


def test_features_of_two_widths_are_not_compared():
  with refused(UserError):
    frechet_distance(moments_of(np.ones((4, 2))), moments_of(np.ones((4, 3))))
  with refused(UserError):
    Moments(2).merge(Moments(3))


def test_the_distance_is_that_of_the_docstring():
  first, second = Moments(1), Moments(1)
  first.count, first.scatter = 5, np.array([[4.0]])
  second.count, second.mean, second.scatter = 9, np.array([1.0]), np.array([[32.0]])
  assert frechet_distance(first, second) == pytest.approx(2.0, abs=1e-15)


def test_variances_of_separate_numbers_add_squared_differences_of_deviations():
  first = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0]]) * np.sqrt(1.5)
  second = np.array([[3.0, 0, 0], [-3, 0, 0], [0, 0, 1], [0, 0, -1]]) * np.sqrt(1.5)
  # The standard deviations are 1, 2, 0 and 3, 0, 1.
  assert distance_of(first, second) == pytest.approx(4 + 4 + 1, abs=1e-12)


@pytest.mark.parametrize(("n", "width", "rank"), KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_properties_of_the_distance(n, width, rank, seed):
  rng = np.random.default_rng(seed)
  first, second = two_sets(rng, n, width, rank)
  distance = distance_of(first, second)
  assert distance > 0.1
  assert distance_of(second, first) == pytest.approx(distance, rel=1e-11)
  turn = stats.ortho_group.rvs(width, random_state=rng)
  assert distance_of(first @ turn + 5.0, second @ turn + 5.0) == pytest.approx(distance, rel=1e-10)
  assert distance_of(3 * first, 3 * second) == pytest.approx(9 * distance, rel=1e-11)
  dead = np.zeros((1, 5))
  assert distance_of(
    np.hstack([first, dead.repeat(len(first), 0)]), np.hstack([second, dead.repeat(len(second), 0)])
  ) == pytest.approx(distance, rel=1e-11)
  assert 0 <= distance_of(first, first[::-1]) < 1e-12
  shift = rng.normal(size=width)
  assert distance_of(first, first + shift) == pytest.approx(shift @ shift, rel=1e-11)


@pytest.mark.parametrize(("n", "width", "rank"), KINDS)
def test_the_distance_is_that_of_the_rows_themselves(n, width, rank):
  first, second = two_sets(np.random.default_rng(0), n, width, rank)
  expected = distance_without_covariances(first, second)
  assert distance_of(first, second) == pytest.approx(expected, rel=1e-11)
  assert distance_of(first, second) != pytest.approx(
    distance_without_covariances(first, 1.0001 * second), rel=1e-6
  )


def scipy_distance(first, second):
  (m1, c1), (m2, c2) = mean_and_covariance(first), mean_and_covariance(second)
  return ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)


def pytorch_fid_distance(first, second):
  module = pytest.importorskip("pytorch_fid.fid_score")
  (m1, c1), (m2, c2) = mean_and_covariance(first), mean_and_covariance(second)
  return module.calculate_frechet_distance(m1, c1, m2, c2)


def torch_fidelity_distance(first, second):
  module = pytest.importorskip("torch_fidelity.metric_fid")
  torch = pytest.importorskip("torch")
  found = [module.fid_features_to_statistics(torch.tensor(rows)) for rows in (first, second)]
  return module.fid_statistics_to_metric(*found, False)["frechet_inception_distance"]


# The square root of a singular matrix is exact only to half of the digits. A test above compares
# our distance with the rows.
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")  # pytorch-fid's call.
@pytest.mark.parametrize(("kind", "tolerance"), list(zip(KINDS, [1e-12, 1e-6, 1e-6])))
@pytest.mark.parametrize("oracle", [scipy_distance, pytorch_fid_distance, torch_fidelity_distance])
def test_other_implementations_agree(oracle, kind, tolerance):
  first, second = two_sets(np.random.default_rng(1), *kind)
  expected = oracle(first, second)
  assert distance_of(first, second) == pytest.approx(expected, rel=tolerance)
  assert distance_of(first, 1.0001 * second) != pytest.approx(expected, rel=tolerance)
