from cm3leon_jax.decoding.sampling.contrastive import CONTRASTIVE
from cm3leon_jax.decoding.sampling.mixture import MIXTURE
from cm3leon_jax.decoding.sampling.top_p import TOP_P


def test_seeds_choose_the_method():
  chosen = [MIXTURE.choose(seed) for seed in range(10)]
  assert [MIXTURE.members.index(x) for x in chosen] == [0, 1, 1, 1, 0, 1, 0, 0, 1, 0]
  assert MIXTURE.members == (TOP_P, CONTRASTIVE)
