"""Simulate the error rates of the tables' tests.

``python scripts/docs/error_rates.py`` prints the two tables of docs/statistics.md: power and false alarms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from camex_ft.results.statistics import DRAWS, EXACT, bootstrap_p, holm, multisets

ROWS = 7  # compared with the baseline, as in a table of eight protocols
SEEDS = (3, 4, 5, 7, 10)
EFFECTS = (0.5, 1.0, 1.5, 2.0, 3.0)
LEVEL = 0.05
NOISE: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "heavy tails (t, 3 degrees)": lambda generator, shape: generator.standard_t(3, size=shape),
    "skewed (exponential)": lambda generator, shape: generator.exponential(size=shape),
    "steps (multiples of half an sd)": lambda generator, shape: (
        np.round(2 * generator.normal(size=shape)) / 2
    ),
}


def differences(
    n: int, *, rows: int, trials: int, effect: float = 0.0, noise: str = "normal", seed: int = 0
) -> np.ndarray:
    """Return differences from a baseline that the rows of a trial share; [trials, rows, n].

    Effects of a seed on all rows cancel. `effect` is in standard deviations of the differences of normal noise.
    """
    drawn = NOISE[noise](np.random.default_rng(seed), (trials, rows + 1, n))
    return drawn[:, 1:] - drawn[:, :1] + effect * np.sqrt(2)


def t_test(values: np.ndarray) -> np.ndarray:
    """Return p of the paired t-tests over the last axis; 1 where the differences have no spread."""
    flat = np.ptp(values, axis=-1) <= 1e-9
    safe = np.where(flat[..., None], np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2, values)
    return np.where(flat, 1.0, stats.ttest_1samp(safe, 0.0, axis=-1).pvalue)


def bootstrap_test(values: np.ndarray) -> np.ndarray:
    """Return p of the studentised bootstrap; values are [sets, n] and not all the same, as in `bootstrap_p`."""
    n = values.shape[1]
    if n <= EXACT:
        return bootstrap_p(values, *multisets(n))
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    parts = np.array_split(values, max(1, len(values) // 100))
    hits = np.concatenate([bootstrap_p(part, counts, np.ones(DRAWS)) for part in parts])
    return (1 + hits) / (1 + DRAWS)


def false_alarms(n: int, *, trials: int, rows: int = ROWS, noise: str = "normal", seed: int = 0) -> float:
    """Return the rate of tables without a true difference in which at least one row is called different.

    A table's decision is that of `tables.make_table`: paired t-test, Holm over the rows.
    """
    p = t_test(differences(n, rows=rows, trials=trials, noise=noise, seed=seed))
    return float(np.mean([any(value is not None and value < LEVEL for value in holm(table)) for table in p]))


def detected(n: int, *, effect: float, trials: int, seed: int = 0) -> float:
    """Return the rate at which the paired t-test finds a true difference in a single comparison."""
    return float(np.mean(t_test(differences(n, rows=1, trials=trials, effect=effect, seed=seed)) < LEVEL))


def bootstrap_alarms(n: int, *, trials: int, noise: str = "normal", seed: int = 0) -> float:
    """Return the rate at which the bootstrap has p below the level in a single comparison without a difference."""
    values = differences(n, rows=1, trials=trials, noise=noise, seed=seed)[:, 0]
    values = values[np.ptp(values, axis=1) > 1e-9]
    return float((bootstrap_test(values) < LEVEL).sum() / trials)


def power(effect: float, n: int, *, level: float = 0.05) -> float:
    """Return the power of the two-sided paired t-test.

    t is noncentral with effect sqrt(n), so t^2 is noncentral F with its square, which SciPy computes more reliably.

    Args:
        effect: true mean difference in standard deviations of the differences.
        n: pairs, at least 2.
        level: of the test.
    """
    if effect == 0:  # where SciPy's noncentral F is negative
        return level
    critical = stats.t.isf(level / 2, n - 1)
    return float(stats.ncf.sf(critical**2, 1, n - 1, effect**2 * n))


def power_table() -> str:
    """Return the power of the paired t-test for numbers of seeds and effects, alone and at the first step of Holm."""
    head = [
        "seeds",
        *(f"{effect:g} sd" for effect in EFFECTS),
        *(f"{e:g} sd, Holm over {ROWS}" for e in (2.0, 3.0)),
    ]
    lines = [head, ["---:"] * len(head)]
    for n in SEEDS:
        alone = [f"{power(effect, n, level=LEVEL):.0%}" for effect in EFFECTS]
        corrected = [f"{power(effect, n, level=LEVEL / ROWS):.0%}" for effect in (2.0, 3.0)]
        lines.append([str(n), *alone, *corrected])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def alarm_table(trials: int = 10_000) -> str:
    """Return the rates of false alarms, simulated: of tables (t-test and Holm) and of single bootstrap tests."""
    head = ["noise", *(f"table, {n} seeds" for n in SEEDS), *(f"bootstrap, {n}" for n in SEEDS)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for noise in NOISE:
        tables = [f"{false_alarms(n, trials=trials, noise=noise):.1%}" for n in SEEDS]
        few = {n: trials if n <= EXACT else trials // 5 for n in SEEDS}
        singles = [f"{bootstrap_alarms(n, trials=few[n], noise=noise):.1%}" for n in SEEDS]
        lines.append([noise, *tables, *singles])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(power_table())
    print(alarm_table())
