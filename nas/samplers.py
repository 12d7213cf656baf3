"""Samplers by name, all of them Optuna's. One is made for every proposal, from (study seed, proposal number)."""

from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler


def make_sampler(name: str, seed: int, population: int) -> BaseSampler:
    """`population` is the generation size of the evolutionary samplers. Raises KeyError for an unknown name."""
    return {
        "nsgaii": lambda: NSGAIISampler(population_size=population, seed=seed),
        "nsgaiii": lambda: NSGAIIISampler(population_size=population, seed=seed),
        "tpe": lambda: TPESampler(multivariate=True, constant_liar=True, seed=seed),
        "random": lambda: RandomSampler(seed=seed),
        "qmc": lambda: QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False),
    }[name]()


def population_size(trials: int) -> int:
    """Small enough that a short search evolves too, and that a long one does not sort thousands for each proposal."""
    return min(100, max(8, trials // 4))
