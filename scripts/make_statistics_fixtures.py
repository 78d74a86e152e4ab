"""Makes tests/fixtures/statistics.json: the numbers of src/statistics/ by scipy and scikit-learn.

Made with Python 3.11, numpy 2.4.6, scipy 1.17.1, scikit-learn 1.9.1. To make it again, with those installed:

    python scripts/make_statistics_fixtures.py

Tests and intervals are scipy's, kappa is scikit-learn's, and the two fitted models are minimised by scipy from their
formula as it stands in the documentation, with neither Newton nor gradients of ours. Markdown is counted by the
patterns of Arena-Hard's add_markdown_info.py, with Python's `re`.
"""

import json
import re
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.stats import binomtest, spearmanr
from sklearn.metrics import cohen_kappa_score

rng = np.random.default_rng(7)


def logistic(columns, scores, ridge):
    """Coefficients with the intercept first."""
    x = np.column_stack([np.ones(len(scores)), *columns])

    def loss(b):
        z = x @ b
        return np.sum(np.logaddexp(0, z) - scores * z) + 0.5 * ridge * np.sum(b[1:] ** 2)

    start = np.zeros(x.shape[1])
    for _ in range(5):
        start = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-11, "fatol": 1e-13, "maxiter": 20000}).x
    return minimize(loss, start, method="BFGS", tol=1e-13).x.tolist()


def sign(wins, losses):
    return binomtest(max(wins, losses), wins + losses, 0.5, alternative="two-sided").pvalue if wins + losses else 1.0


SPLITS = [(57, 43), (310, 190), (12, 3), (0, 0), (1, 0), (0, 7), (5, 5), (6, 5), (20, 0), (501, 499), (5300, 4700),
          (500800, 499200), (1002000, 998000), (60, 340), (700, 100)]
SHARES = [(57, 100), (310, 500), (0, 20), (20, 20), (1, 1), (7, 10), (99998, 100000)]


def wilson(k, n):
    ci = binomtest(k, n).proportion_ci(0.95, method="wilson")
    return [ci.low, ci.high]


def control_case(n, ridge):
    against = rng.integers(40, 900, n)
    policy = (against * rng.uniform(0.6, 1.9, n)).astype(int)
    delta = policy - against
    z = 0.3 + 1.1 * np.tanh(delta / delta.std(ddof=1))
    scores = rng.choice([0, 0.25, 0.5, 0.75, 1], n) * 0.4 + 0.6 * (rng.uniform(size=n) < 1 / (1 + np.exp(-z)))
    theta, phi = logistic([np.tanh(delta / delta.std(ddof=1))], scores, ridge)
    return dict(scores=scores.tolist(), policy=policy.tolist(), against=against.tolist(), ridge=ridge, theta=theta, phi=phi)


TEXTS = [
    "",
    "Plain words, no markup at all.",
    "# Title\n\nSome *emphasis* and **bold** words.\n\n1. one\n2. two\n  - nested\n* star\n+ plus\n",
    "## Two\n### Three\n#Not a heading\n\n__also bold__ and __not\nbold__ ** spaced ** **a*b**\n",
    "Code hides:\n```python\n# comment\n- no item\n**no bold**\n```\n# Shown\n\n\n- item after blank lines\n",
    "1.no space\n10. ten\n   3. three\n```unclosed\n# counted\n",
    "- \n-\tTab\n####### seven\n###### six\n-- no\n1) paren\n",
]


def markup(text):
    text = re.sub(re.compile("```([^`]*)```"), "", text)
    count = lambda pattern: len(re.findall(pattern, text, re.MULTILINE))
    return dict(
        headers=sum(count("^#{%d}\\s" % n) for n in range(1, 7)),
        lists=count(r"^\s*\d+\.\s") + count(r"^\s*[-*+]\s"),
        bold=count(r"\*\*[^*\n]+\*\*") + count(r"__[^_\n]+__"),
    )


def style_case(n, ridge):
    """Rows of [tokens, headers, lists, bold] for both sides."""
    side = lambda: np.column_stack([rng.integers(20, 600, n), rng.integers(0, 6, n), rng.integers(0, 12, n), rng.integers(0, 9, n)])
    policy, against = side(), side()
    density = lambda rows, k: rows[:, k] / (rows[:, 0] + 1)
    columns = [(policy[:, 0] - against[:, 0]) / (policy[:, 0] + against[:, 0])]
    for k in (1, 2, 3):
        p, a = density(policy, k), density(against, k)
        columns.append((p - a) / (p + a + 1))
    columns = [column / column.std(ddof=1) for column in columns]
    scores = (rng.uniform(size=n) < 1 / (1 + np.exp(-(0.2 + 0.8 * columns[0] + 0.4 * columns[2])))) * 1.0
    scores[::7] = 0.5
    theta, *phi = logistic(columns, scores, ridge)
    return dict(scores=scores.tolist(), policy=policy.tolist(), against=against.tolist(), ridge=ridge, theta=theta, phi=phi)


def judges_case(n):
    one = rng.choice([0, 0.25, 0.5, 0.75, 1], n)
    other = np.where(rng.uniform(size=n) < 0.6, one, rng.choice([0, 0.25, 0.5, 0.75, 1], n))
    outcome = lambda scores: np.sign(scores - 0.5).astype(int)
    decisive = (outcome(one) != 0) & (outcome(other) != 0)
    return dict(
        one=one.tolist(),
        other=other.tolist(),
        agreement=float(np.mean(outcome(one) == outcome(other))),
        agreement_without_ties=float(np.mean(outcome(one)[decisive] == outcome(other)[decisive])),
        kappa=float(cohen_kappa_score(outcome(one), outcome(other))),
        spearman=float(spearmanr(one, other).statistic),
    )


def ranking_case(systems):
    wins = rng.uniform(1, 30, (systems, systems))
    np.fill_diagonal(wins, 0)

    def loss(rest):
        beta = np.concatenate([[0], rest])
        return np.sum(wins * np.logaddexp(0, -(beta[:, None] - beta[None, :])))

    start = np.zeros(systems - 1)
    for _ in range(3):
        start = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-11, "fatol": 1e-13, "maxiter": 20000}).x
    return dict(wins=wins.tolist(), beta=[0, *minimize(loss, start, method="BFGS", tol=1e-13).x.tolist()])


fixture = dict(
    about="By scipy and scikit-learn, see scripts/make_statistics_fixtures.py.",
    sign=[[wins, losses, sign(wins, losses)] for wins, losses in SPLITS],
    wilson=[[k, n, *wilson(k, n)] for k, n in SHARES],
    length=[control_case(60, 0.0), control_case(60, 0.01), control_case(40, 1.0)],
    style=[style_case(80, 0.01), style_case(60, 1.0)],
    markup=[dict(text=text, **markup(text)) for text in TEXTS],
    judges=[judges_case(50), judges_case(120)],
    ranking=[ranking_case(4)],
)
path = Path(__file__).parent.parent / "tests" / "fixtures" / "statistics.json"
lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fixture.items())
path.write_text("{" + lines + "}\n")
