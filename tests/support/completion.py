"""Oracle of `Bayesian`'s posterior: all N x N covariances written out."""

from __future__ import annotations

import numpy as np
from scipy import stats

from forgetcast.completion import Bayesian
from forgetcast.completion.gaussian import BANDWIDTHS, OUT_OF_FAMILY, SCALE_DEGREES


def dense_mixture(
    model: Bayesian, at: np.ndarray, row: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Weights, means (N,) and covariances (N, N) of all components given a row (N,) at the probes (k,).

    A mixture of multivariate Student's t by SciPy's density: a component for each class of out-of-family tasks, and one
    for each task of the atlas and bandwidth.
    """
    means, covariances, densities = [], [], []
    mixture = model.state_.mixture
    assert mixture is not None
    explained = model.loadings_**2 @ mixture.family
    nowhere = np.zeros((1, len(model.prior_)))
    classes = [(model.prior_, nowhere, own, same) for own, same in OUT_OF_FAMILY]
    classes += [(width**2 * mixture.around, mixture.centres, 0.0, 0.0) for width in BANDWIDTHS]
    for log_weight, (prior, centres, own, same) in zip(mixture.log_weights, classes, strict=True):
        noise = model.noise_ + own * explained + same * explained.mean()
        joint = (model.loadings_ * prior) @ model.loadings_.T + np.diag(noise)
        seen = joint[np.ix_(at, at)]
        gain = joint[:, at] @ np.linalg.inv(seen)
        within = []
        for centre in centres:
            expected = model.mean_ + model.loadings_ @ centre
            apart = row[at] - expected[at]
            scale = (SCALE_DEGREES + apart @ np.linalg.solve(seen, apart)) / (SCALE_DEGREES + len(at))
            means.append(expected + gain @ apart)
            covariances.append((joint - gain @ joint[at]) * scale)
            within.append(stats.multivariate_t(shape=seen, df=SCALE_DEGREES).pdf(apart))
        # The power is of the class's likelihood; among its centres, the likelihood counts as it is.
        of_class = np.exp(log_weight) * np.mean(within) ** mixture.power
        densities.extend(of_class * np.array(within) / np.sum(within))
    return np.array(densities) / np.sum(densities), means, covariances
