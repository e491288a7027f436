"""Linear bandits on their own: against closed forms, and their regret on made-up problems."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import Ridge

from promptfed.strategies.bandit import DuelBandit, LinearBandit
from promptfed.types import FloatArray


def test_by_hand() -> None:
    """One feature, ridge 1: two pulls with mean reward 3 at x = 2 give A = 1 + 2 * 4 = 9 and theta = 2 * 3 * 2 / 9."""
    bandit = LinearBandit(1, ridge=1.0)

    bandit.observe(np.array([2.0]), 3.0, n=2)

    assert bandit.gram[0, 0] == 9.0
    assert bandit.theta[0] == pytest.approx(12 / 9)
    assert bandit.width(np.array([[3.0]]))[0] == pytest.approx(3 / 3)


def test_it_is_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x, n = rng.normal(size=(30, 4)), rng.integers(1, 5, size=30).astype(float)
    r = x @ [1.0, -2.0, 0.5, 0.0] + rng.normal(size=30)
    bandit = LinearBandit(4, ridge=2.0)

    for row in zip(x, r, n, strict=True):
        bandit.observe(*row)

    oracle = Ridge(alpha=2.0, fit_intercept=False).fit(x, r, sample_weight=n)
    np.testing.assert_allclose(bandit.theta, oracle.coef_, rtol=1e-8)
    a = 2.0 * np.eye(4) + (x.T * n) @ x
    np.testing.assert_allclose(bandit.width(x) ** 2, np.diag(x @ np.linalg.inv(a) @ x.T), rtol=1e-8)


def test_what_is_pending_narrows_the_width_and_moves_no_mean() -> None:
    bandit = LinearBandit(2, ridge=1.0)
    bandit.observe(np.array([1.0, 0.0]), 1.0)
    before = bandit.theta

    bandit.expect(np.array([0.0, 1.0]), n=3)

    np.testing.assert_array_equal(bandit.theta, before)
    np.testing.assert_allclose(bandit.width(np.eye(2)), np.sqrt([1 / 2, 1 / 4]))


def played(seed: int, n_rounds: int, n_together: int, exploration: float | None) -> FloatArray:
    """Regret of each pull by LinUCB, ``n_together`` at a time before any is answered; uniform play without
    ``exploration``. Forty arms in five dimensions, noise 0.5."""
    rng = np.random.default_rng(seed)
    arms, truth = rng.normal(size=(40, 5)), rng.normal(size=5)
    value, regrets = arms @ truth, list[float]()
    seen = LinearBandit(5, ridge=1.0)
    for _ in range(n_rounds):
        dealt = LinearBandit(5, ridge=0.0)
        dealt.gram += seen.gram
        chosen = list[int]()
        for _ in range(n_together):
            if exploration is None:
                arm = int(rng.integers(len(arms)))
            else:
                arm = int((arms @ seen.theta + exploration * 0.5 * dealt.width(arms)).argmax())
            dealt.expect(arms[arm])
            chosen.append(arm)
        for arm in chosen:
            seen.observe(arms[arm], float(value[arm] + 0.5 * rng.normal()))
        regrets += [float(value.max() - value[arm]) for arm in chosen]
    return np.array(regrets)


@pytest.mark.parametrize("n_together", [1, 5])
def test_regret_is_sublinear_and_far_below_that_of_uniform_play(n_together: int) -> None:
    n_rounds, seeds = 800 // n_together, range(8)

    bandit = np.mean([played(s, n_rounds, n_together, exploration=3.0) for s in seeds], axis=0).cumsum()
    uniform = np.mean([played(s, n_rounds, n_together, exploration=None) for s in seeds], axis=0).cumsum()

    assert bandit[-1] < 0.1 * uniform[-1]
    # The second half costs less than half of the first; with linear regret it would cost as much.
    assert bandit[-1] - bandit[399] < 0.5 * bandit[399]


def test_duels_are_penalised_logistic_regression() -> None:
    rng = np.random.default_rng(1)
    x, won, n = rng.normal(size=(25, 3)), rng.choice([0.0, 0.5, 1.0], size=25), rng.integers(1, 4, size=25) * 1.0
    bandit = DuelBandit(3, ridge=2.0)

    for row in zip(x, won, n, strict=True):
        bandit.observe(*row)

    def loss(theta: FloatArray) -> float:
        p = expit(x @ theta)
        return float(-(n * (won * np.log(p) + (1 - won) * np.log(1 - p))).sum() + 2.0 / 4 / 2 * (theta**2).sum())

    np.testing.assert_allclose(bandit.theta, minimize(loss, np.zeros(3), tol=1e-10).x, atol=1e-4)
    np.testing.assert_allclose(bandit.gram, 2.0 * np.eye(3) + (x.T * n) @ x)


def test_no_duel_yet_is_no_preference() -> None:
    assert DuelBandit(3, ridge=1.0).theta.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_duels_find_the_condorcet_winner(seed: int) -> None:
    """Twenty arms; the one that beats every other more often than not is the one of the greatest utility."""
    rng = np.random.default_rng(seed)
    arms, truth = rng.normal(size=(20, 4)), 2.0 * rng.normal(size=4)
    value = arms @ truth
    bandit = DuelBandit(4, ridge=1.0)

    for _ in range(500):
        first = int((arms @ bandit.theta).argmax())
        difference = arms - arms[first]
        upper = difference @ bandit.theta + 6.0 * bandit.width(difference)  # three standard deviations
        upper[first] = -np.inf
        second = int(upper.argmax())
        won = float(rng.random() < expit(value[first] - value[second]))
        bandit.observe(arms[first] - arms[second], won)

    # Its rivals may be as good as it is, but for a little.
    winner = int((arms @ bandit.theta).argmax())
    assert expit(value.max() - value[winner]) < 0.56
