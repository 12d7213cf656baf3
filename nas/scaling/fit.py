"""Scaling laws and compute-equivalent gain: how loss falls with compute, family by family, and what that is worth.

    loss(C) = E + A C^-alpha         along the compute-efficient frontier; E, what no model can do without, is shared
    CEG(C)  = C_baseline(L) / C      where L is the candidate's loss after C FLOPs of training

Runs are final losses of whole schedules. Laws are fitted jointly, by the Huber loss of log loss: for each E on a grid
the rest is least squares, solved in closed form and reweighted, for all bootstrap draws at once. A draw resamples the
runs' residuals and chooses its own E. Inside the range where both families were measured a gain is interpolated
between measurements; beyond it, it is what the laws say, and marked as extrapolated.

Losses in the task's own unit, C in FLOPs of training. Sources: 2511.21622 (CEG), 2203.15556 (the surface L(N, D)).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from hypernas.errors import UserError
from hypernas.scaling.shape import MIN_SIZES
from hypernas.yardstick import Law, law_gain

Array = NDArray[np.float64]

MIN_DECADES = 0.75  # of compute: below, E and alpha cannot be told apart at all
LEVEL = 95.0  # per cent, of every interval
ROUNDS = 6  # of reweighting; the seventh changes no digit that is shown
CHUNK = 64  # draws at a time: what they take stays in the cache
HUBER = 1.5  # noise standard deviations
FAR = 1e3  # no two log losses are so far apart: least squares
SURFACE_HUBER = 1e-3  # of log loss, as in 2203.15556
FLATTEST = 1e-3  # alpha of a draw whose losses do not fall
GRID = np.linspace(0.0, 0.98, 25)  # E as a share of the smallest loss
ZOOMS = 4  # grids, each four times finer around the best of the one before
ZOOM = np.linspace(-1.0, 1.0, 9)


# ---- what goes in --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measurement:
    """One training that ended: `flops` of the whole training, `loss` at its end."""

    family: str
    parameters: int
    tokens: int
    flops: float
    loss: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Frontier:
    """The compute-efficient measurements of one family, by rising compute and falling loss.

    `flops`, `losses` (geometric means over seeds) and `seeds` (how many) are (P,).
    """

    flops: Array
    losses: Array
    seeds: Array


def frontier(family: str, runs: Sequence[Measurement]) -> Frontier:
    """A family's runs, seeds averaged, without those that a cheaper one matches.

    Raises UserError for losses that are no numbers above 0, and where too few sizes or too little compute are left.
    """
    own = [run for run in runs if run.family == family]
    wrong = [run for run in own if not (np.isfinite(run.loss) and run.loss > 0 and run.flops > 0)]
    if wrong:
        raise UserError(
            f"{family}: the loss of {wrong[0].parameters:,} parameters is {wrong[0].loss} after {wrong[0].flops:.3g} "
            "FLOPs; wanted numbers above 0: leave that run out, or train it with a lower learning rate"
        )
    groups: dict[tuple[int, int], list[Measurement]] = {}
    for run in own:
        groups.setdefault((run.parameters, run.tokens), []).append(run)
    points = sorted(
        (float(np.mean([r.flops for r in some])), float(np.exp(np.mean([np.log(r.loss) for r in some]))), len(some))
        for some in groups.values()
    )
    kept: list[tuple[float, float, int]] = []
    for point in points:
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    if len(points) < MIN_SIZES:
        raise UserError(
            f"{family}: {len(points)} sizes were trained to the end, a law needs {MIN_SIZES} or more; "
            "give a longer ladder, or see why trials failed"
        )
    if len(kept) < MIN_SIZES:
        raise UserError(
            f"{family}: loss does not fall with compute, only {len(kept)} of {len(points)} sizes are better than every "
            f"cheaper one and a law needs {MIN_SIZES}; look at the learning rates of the others, or add seeds"
        )
    flops, losses, seeds = (np.array(column, dtype=float) for column in zip(*kept, strict=True))
    decades = np.log10(flops[-1] / flops[0])
    if decades < MIN_DECADES:
        raise UserError(
            f"{family}: its sizes span {decades:.2f} decades of compute, a law needs {MIN_DECADES} or more; "
            "put the ends of the ladder further apart"
        )
    return Frontier(flops, losses, seeds)


@dataclass(frozen=True, slots=True)
class Surface:
    """loss(N, D) = irreducible + A N^-a + B D^-b, of N parameters and D tokens (2203.15556, equation 2)."""

    irreducible: float
    A: float
    B: float
    a: float
    b: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> Any:
        N, D = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return self.irreducible + self.A * N**-self.a + self.B * D**-self.b

    def efficient(self) -> Law:
        """The law of C = 6 N D spent as well as can be (2203.15556, equation 4)."""
        a, b = self.a, self.b
        G = (a * self.A / (b * self.B)) ** (1 / (a + b))
        scale = self.A * G**-a * 6 ** (a * b / (a + b)) + self.B * G**b * 6 ** (a * b / (a + b))
        return Law(self.irreducible, scale, a * b / (a + b))


def fit_surface(runs: Sequence[Measurement]) -> Surface:
    """loss(N, D) of one family's runs, by the Huber loss of log loss from many starts.

    Raises UserError where sizes and tokens vary together, so that their effects cannot be told apart.
    """
    N, D, y = (np.log([getattr(run, name) for run in runs]) for name in ("parameters", "tokens", "loss"))
    distinct = len({(run.parameters, run.tokens) for run in runs})
    spread = np.linalg.svd(np.column_stack([N - N.mean(), D - D.mean()]), compute_uv=False) / np.sqrt(max(1, len(runs)))
    if distinct < 6 or spread[1] < 0.1:
        raise UserError(
            f"{runs[0].family}: loss(N, D) needs 6 pairs of size and tokens or more, tokens varied beside size, and "
            f"there are {distinct} pairs that vary by {spread[1]:.2f} (natural log) across their trend; "
            "train each size with several token budgets, as with --tokens-per-parameter 10,20,40"
        )

    def terms(p: Array) -> Array:
        return np.stack([p[0] - p[3] * (N - N.mean()), p[1] - p[4] * (D - D.mean()), np.full_like(y, p[2])])

    def objective(p: Array) -> tuple[float, Array]:
        parts = terms(p)
        fitted = np.logaddexp.reduce(parts)
        r = fitted - y
        share = np.exp(parts - fitted)  # (3, P): how much each term contributes
        pull = np.clip(r, -SURFACE_HUBER, SURFACE_HUBER)
        value = np.where(np.abs(r) <= SURFACE_HUBER, r * r / 2, SURFACE_HUBER * (np.abs(r) - SURFACE_HUBER / 2)).sum()
        sums = share @ pull
        slopes = (-share[0] * (N - N.mean()) @ pull, -share[1] * (D - D.mean()) @ pull)
        return value / SURFACE_HUBER, np.array([*sums, *slopes]) / SURFACE_HUBER

    low = y.min()
    starts = [
        (low + first, low + second, low + third, a, b)
        for first in (-3.0, -1.0)
        for second in (-3.0, -1.0)
        for third in (-2.0, -0.3)
        for a in (0.2, 0.6)
        for b in (0.2, 0.6)
    ]
    bounds = [(None, low + 2)] * 2 + [(low - 12, low), (0.01, 2.0), (0.01, 2.0)]
    found = min((minimize(objective, s, jac=True, bounds=bounds) for s in starts), key=lambda result: result.fun)
    log_A, log_B, log_E, a, b = found.x
    return Surface(float(np.exp(log_E)), float(np.exp(log_A + a * N.mean())), float(np.exp(log_B + b * D.mean())), a, b)


# ---- fitting the laws of all families together ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, slots=True)
class Fit:
    """Laws of several families with one E. Families F, draws S, measurements P of a family.

    `noise` is the standard deviation of one run's log loss. The draws are bootstrap replicates: `irreducible_draws`
    (S,); by family `line_draws` (S, 2), the reducible loss as log A' and alpha where log C is counted from
    `log_center`; `loss_draws` (S, P), the frontier measured once more.
    """

    laws: Mapping[str, Law]
    frontiers: Mapping[str, Frontier]
    noise: float
    log_center: float
    irreducible_draws: Array
    line_draws: Mapping[str, Array]
    loss_draws: Mapping[str, Array]

    def irreducible(self) -> Interval:
        return _interval(next(iter(self.laws.values())).irreducible, self.irreducible_draws)

    def exponent(self, family: str) -> Interval:
        """alpha of a family's law."""
        return _interval(self.laws[family].exponent, self.line_draws[family][:, 1])

    def band(self, family: str, flops: ArrayLike) -> tuple[Array, Array]:
        """The law's interval at each of `flops` (M,): low and high, each (M,)."""
        x = np.log(np.atleast_1d(np.asarray(flops, dtype=float))) - self.log_center
        level, slope = self.line_draws[family].T
        losses = self.irreducible_draws[:, None] + np.exp(level[:, None] - slope[:, None] * x)
        low, high = np.percentile(losses, _ENDS, axis=0)
        return low, high


_ENDS = [(100 - LEVEL) / 2, (100 + LEVEL) / 2]


def _interval(value: float, draws: Array) -> Interval:
    low, high = np.percentile(draws, _ENDS)
    return Interval(float(value), float(low), float(high))


def fit_laws(runs: Sequence[Measurement], *, seed: int, draws: int = 1000) -> Fit:
    """The laws of all families among the runs, with bootstrap draws from `seed`.

    Raises UserError, naming the family and what is missing, for what `frontier` refuses.
    """
    families = tuple(dict.fromkeys(run.family for run in runs))
    if not families:
        raise UserError("no run was trained to its end: there is nothing to fit a law to")
    frontiers = {family: frontier(family, runs) for family in families}
    center = float(np.mean(np.concatenate([np.log(f.flops) for f in frontiers.values()])))
    x = [np.log(f.flops) - center for f in frontiers.values()]
    weight = [f.seeds for f in frontiers.values()]
    y = [np.log(f.losses)[None] for f in frontiers.values()]  # (1, P) each

    plain = _fit(x, y, weight, np.full(1, FAR))
    delta = max(1e-6, HUBER * _noise(x, y, weight, plain)[0])
    E, lines = _fit(x, y, weight, np.full(1, delta))
    noise, residuals = _noise(x, y, weight, (E, lines))
    laws = {}
    for family, line in zip(families, lines, strict=True):
        level, slope = line[0]
        if slope <= 0:
            raise UserError(
                f"{family}: loss does not fall with compute; look at the learning rates of the larger sizes"
            )
        laws[family] = Law(float(E[0]), float(np.exp(level + slope * center)), float(slope))

    rng = np.random.default_rng(seed)
    total = sum(map(len, x))
    freedom = total - 2 * len(families) - 1
    # The noise itself is known from few residuals: Student's t, by drawing its scale.
    scale = noise * np.sqrt(freedom / rng.chisquare(freedom, size=(draws, 1)))
    # Recentred and rescaled, as fitting has made the residuals smaller than the noise.
    standard = (residuals - residuals.mean()) / residuals.std() if residuals.std() > 0 else residuals
    errors = [scale * rng.choice(standard, size=(draws, len(xf))) / np.sqrt(w) for xf, w in zip(x, weight, strict=True)]
    fitted = [np.log(E[0] + np.exp(line[0, 0] - line[0, 1] * xf)) for xf, line in zip(x, lines, strict=True)]
    again = [f + e for f, e in zip(fitted, errors, strict=True)]
    E_draws, line_draws = _fit(x, again, weight, np.full(draws, delta))
    return Fit(
        laws=laws,
        frontiers=frontiers,
        noise=noise,
        log_center=center,
        irreducible_draws=E_draws,
        line_draws=dict(zip(families, line_draws, strict=True)),
        loss_draws={f: np.exp(yf + e) for f, yf, e in zip(families, y, errors, strict=True)},
    )


Lines = list[Array]  # by family (S, 2): log A' and alpha


def _noise(x: list[Array], y: list[Array], weight: list[Array], fit: tuple[Array, Lines]) -> tuple[float, Array]:
    """The standard deviation of one run's log loss, and every measurement's residual in its unit (all P,)."""
    E, lines = fit
    residuals = np.concatenate(
        [
            np.sqrt(w) * (yf[0] - np.log(E[0] + np.exp(line[0, 0] - line[0, 1] * xf)))
            for xf, yf, w, line in zip(x, y, weight, lines, strict=True)
        ]
    )
    freedom = len(residuals) - 2 * len(x) - 1
    return float(np.sqrt((residuals**2).sum() / freedom)), residuals


def _fit(x: list[Array], y: list[Array], weight: list[Array], delta: Array) -> tuple[Array, Lines]:
    """E (S,) and every family's line (S, 2), for log losses y (S, P) of each family."""
    E, lines = [], []
    for start in range(0, len(delta), CHUNK):
        part = slice(start, start + CHUNK)
        e, some = _fit_chunk(x, [yf[part] for yf in y], weight, delta[part])
        E.append(e)
        lines.append(some)
    return np.concatenate(E), [np.concatenate(some) for some in zip(*lines, strict=True)]


def _fit_chunk(x: list[Array], y: list[Array], weight: list[Array], delta: Array) -> tuple[Array, Lines]:
    smallest = np.exp(np.min([yf.min(axis=1) for yf in y], axis=0))[:, None]  # (S, 1)
    share, width = np.broadcast_to(GRID, (len(smallest), len(GRID))), GRID[1]
    for _ in range(ZOOMS):
        solved = [_lines(smallest * share, xf, yf, w, delta) for xf, yf, w in zip(x, y, weight, strict=True)]
        best = np.argmin(sum(misfit for _, misfit in solved), axis=1)
        rows = np.arange(len(best))
        chosen = share[rows, best][:, None]
        lines = [line[rows, best] for line, _ in solved]
        width, share = width / 4, np.clip(chosen + width * ZOOM, 0.0, GRID[-1])
    return (smallest * chosen)[:, 0], lines


def _lines(E: Array, x: Array, y: Array, weight: Array, delta: Array) -> tuple[Array, Array]:
    """The best line u = level - slope x for y = log(E + exp(u)), for every draw S and every E of G: E (S, G), x (P,),
    y (S, P). Lines (S, G, 2) and misfits (S, G).

    Gauss-Newton on log loss: with s = du-share of the loss, the linearised target u + (y - f) / s has weight s^2.
    """
    E, target, delta = E[..., None], y[:, None], delta[:, None, None]
    u = np.log(np.maximum(np.exp(target) - E, 1e-3 * np.exp(target)))
    for _ in range(ROUNDS):
        reducible = np.exp(u)
        loss = E + reducible
        r = target - np.log(loss)
        s = reducible / loss
        w = weight * np.minimum(1.0, delta / np.maximum(np.abs(r), 1e-12)) * s * s
        z = u + np.clip(r / s, -1.0, 1.0)
        total = w.sum(-1, keepdims=True)
        middle_x, middle_z = ((w * v).sum(-1, keepdims=True) / total for v in (x, z))
        away = x - middle_x
        slope = -(w * away * z).sum(-1, keepdims=True) / (w * away * away).sum(-1, keepdims=True)
        level = middle_z + slope * middle_x
        u = level - slope * x
    r = np.abs(target - np.log(E + np.exp(u)))
    misfit = (weight * np.where(r <= delta, r * r / 2, delta * (r - delta / 2))).sum(-1)
    return np.concatenate([level, slope], axis=-1), misfit


# ---- compute-equivalent gain ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gain:
    """CEG where the candidate has trained for `flops`, with its interval; `measured` or extrapolated by the laws."""

    flops: float
    loss: float
    gain: Interval
    measured: bool


def measured_range(fit: Fit, candidate: str, baseline: str) -> tuple[float, float]:
    """Between which FLOPs of the candidate both families were measured at its loss.

    Raises UserError for an unknown family, and where the two have no loss in common.
    """
    for family in (candidate, baseline):
        if family not in fit.laws:
            raise UserError(f"no runs of {family!r}; there are runs of {', '.join(fit.laws)}")
    own, other = fit.frontiers[candidate], fit.frontiers[baseline]
    high, low = min(own.losses[0], other.losses[0]), max(own.losses[-1], other.losses[-1])
    if high < low:
        better, worse = (candidate, baseline) if own.losses[0] < other.losses[-1] else (baseline, candidate)
        best, worst = fit.frontiers[better], fit.frontiers[worse]
        raise UserError(
            f"the losses of {candidate} and {baseline} never meet: {better} starts at {best.losses[0]:.4f} "
            f"({best.flops[0]:.3g} FLOPs) and {worse} ends at {worst.losses[-1]:.4f} ({worst.flops[-1]:.3g} FLOPs); "
            f"train smaller sizes of {better} or larger ones of {worse}"
        )
    start, end = np.exp(_crossing(np.log(own.flops), np.log(own.losses), np.log([high, low])))
    return float(start), float(end)


def gains(fit: Fit, candidate: str, baseline: str, flops: Sequence[float]) -> list[Gain]:
    """CEG of one family against another at each of `flops`. Raises UserError as `measured_range` does."""
    low, high = measured_range(fit, candidate, baseline)
    values, draws = _log_gains(fit, candidate, baseline, flops)
    return [
        Gain(
            flops=float(C),
            loss=float(fit.laws[candidate].loss(C)),
            gain=_exp_interval(value, column),
            measured=_inside(C, low, high),
        )
        for C, value, column in zip(flops, values, draws.T, strict=True)
    ]


def growth(fit: Fit, candidate: str, baseline: str) -> Interval:
    """The exponent of CEG(C) ~ C^g by the two laws: alpha of the candidate over that of the baseline, less 1.

    Above 0 the gain grows with compute; where the interval holds 0 the runs do not tell.
    """
    draws = fit.line_draws[candidate][:, 1] / np.maximum(fit.line_draws[baseline][:, 1], FLATTEST) - 1
    return _interval(fit.laws[candidate].exponent / fit.laws[baseline].exponent - 1, draws)


@dataclass(frozen=True, slots=True)
class Interaction:
    """Components one at a time and all together, each against the baseline, where each has trained for `flops`.

    `product` is what the single gains would come to if none minded the others; `joint` over it is the `interaction`:
    above 1 the components help each other, below 1 they do the same work.
    """

    flops: float
    single: Mapping[str, Interval]
    product: Interval
    joint: Interval
    interaction: Interval
    measured: bool


def interaction(fit: Fit, baseline: str, components: Sequence[str], together: str, flops: float) -> Interaction:
    """Raises UserError as `measured_range` does."""
    families = (*components, together)
    ranges = [measured_range(fit, family, baseline) for family in families]
    found = {family: _log_gains(fit, family, baseline, [flops]) for family in families}
    values = {family: (value[0], draws[:, 0]) for family, (value, draws) in found.items()}
    product = sum(values[c][0] for c in components), np.sum([values[c][1] for c in components], axis=0)
    joint = values[together]
    return Interaction(
        flops=flops,
        single={c: _exp_interval(*values[c]) for c in components},
        product=_exp_interval(*product),
        joint=_exp_interval(*joint),
        interaction=_exp_interval(joint[0] - product[0], joint[1] - product[1]),
        measured=all(_inside(flops, low, high) for low, high in ranges),
    )


def _exp_interval(value: float, draws: Array) -> Interval:
    inner = _interval(value, draws)
    return Interval(*(float(np.exp(min(v, 700.0))) for v in (inner.value, inner.low, inner.high)))


def _inside(flops: float, low: float, high: float) -> bool:
    return bool(low * (1 - 1e-9) <= flops <= high * (1 + 1e-9))


def _log_gains(fit: Fit, candidate: str, baseline: str, flops: Sequence[float]) -> tuple[Array, Array]:
    """log CEG at each of M flops (M,), and its draws (S, M): interpolated where measured, the laws' elsewhere."""
    low, high = measured_range(fit, candidate, baseline)
    C = np.asarray(flops, dtype=float)
    log_C = np.log(C)
    with np.errstate(divide="ignore"):
        values = np.log(law_gain(fit.laws[candidate], fit.laws[baseline], C))
    level, slope = fit.line_draws[candidate].T[..., None]
    base_level, base_slope = fit.line_draws[baseline].T[..., None]
    reducible = level - slope * (log_C - fit.log_center)
    draws = (base_level - reducible) / np.maximum(base_slope, FLATTEST) + fit.log_center - log_C
    inside = np.array([_inside(c, low, high) for c in C])
    if inside.any():
        own, other = fit.frontiers[candidate], fit.frontiers[baseline]

        def interpolated(own_losses: Array, other_losses: Array) -> Array:
            loss = _along(np.log(own.flops), np.log(own_losses), log_C[inside])
            return _crossing(np.log(other.flops), np.log(other_losses), loss) - log_C[inside]

        values[inside] = interpolated(own.losses, other.losses)
        pairs = zip(fit.loss_draws[candidate], fit.loss_draws[baseline], strict=True)
        draws[:, inside] = [interpolated(*pair) for pair in pairs]
    return values, draws


def _along(x: Array, y: Array, at: Array) -> Array:
    """y at `at`, on straight lines between the points (x, y); the first and the last line go on."""
    i = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    return y[i] + (at - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i])


def _crossing(x: Array, y: Array, at: ArrayLike) -> Array:
    """x where the frontier of the points falls to `at`: points that a cheaper one matches are passed over."""
    best = np.minimum.accumulate(y)
    keep = np.append(True, y[1:] < best[:-1])
    x, y = x[keep], y[keep]
    if len(x) < 2:  # a draw so noisy that nothing beats the smallest size
        return np.full(np.shape(at), x[0])
    return _along(-y, x, -np.asarray(at, dtype=float))
