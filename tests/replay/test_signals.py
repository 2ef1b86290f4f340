"""Signals: checked once, restricted to what may be replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forgetcast import DataError, MismatchError, Signals, make_plan
from forgetcast.completion import Bayesian
from forgetcast.replay.coverage import correlation_loadings
from support.data import make_atlas, make_pool


def test_an_atlas_gives_losses_forecast_and_loadings(tmp_path: Path) -> None:
    """Oracle: the model fitted by hand."""
    atlas = make_atlas(tmp_path / "a.atlas", make_pool())
    signals, model = Signals.from_atlas(atlas), Bayesian().fit(atlas.matrix())
    np.testing.assert_array_equal(signals.losses, atlas.nll_before)
    np.testing.assert_array_equal(signals.forecast, model.predict([], []).mean)
    np.testing.assert_array_equal(signals.loadings, correlation_loadings(model))
    assert signals.names == {"losses", "forecast", "loadings"}
    assert repr(signals) == "Signals(24 examples, forecast, loadings, losses)"
    given = Signals.from_atlas(atlas, needs={"losses"}, truth=np.zeros(24))
    assert given.names == {"losses", "truth"}
    with pytest.raises(DataError, match="the signal 'gradients' is missing; there are losses, truth"):
        _ = given.gradients


def test_restriction_keeps_observed_examples_only() -> None:
    signals = Signals("abcde", losses=[1, np.nan, 3, 4, np.inf], forecast=np.arange(5.0))
    restricted, rows = signals.restrict(np.arange(4), {"losses"})
    assert (list(restricted.ids), rows.tolist()) == (["a", "c", "d"], [0, 2, 3])
    assert restricted.names == {"losses"}
    with pytest.raises(DataError, match="the losses of 'e' is not a finite number"):
        signals.restrict(np.arange(5), {"losses"})
    with pytest.raises(DataError, match="the forecast of 'b' is not a finite number"):
        Signals("ab", forecast=[1, np.nan]).restrict(np.arange(2), {"forecast"})


def test_signals_of_other_examples_are_rejected() -> None:
    pool = make_pool()
    with pytest.raises(MismatchError, match="the losses has shape"):
        Signals(pool.ids, losses=np.ones(23))
    with pytest.raises(MismatchError, match="the loadings has shape"):
        Signals(pool.ids, loadings=np.ones(24))
    with pytest.raises(MismatchError, match="signals are of 24 other examples"):
        make_plan(pool, "loss", Signals(pool.ids[::-1], losses=np.ones(24)), ratio=0.5)
