"""Complete a new task's row from ten probes: planted low-rank forgetting of 40 tasks and 500 examples."""

import numpy as np

import forgetcast

rng = np.random.default_rng(0)
atlas = rng.gamma(2.0, 0.3, (40, 2)) @ rng.gamma(2.0, 0.3, (2, 500)) + rng.normal(0, 0.05, (40, 500))
known, new = forgetcast.ForgettingMatrix(atlas[:-1]), atlas[-1]

model = forgetcast.completion.Bayesian().fit(known)
probes = forgetcast.probes.choose(model, k=10)
forecast = model.predict(probes, observed=new[probes])
lower, upper = forecast.interval(0.9)

others = np.setdiff1d(np.arange(500), probes)
print(forgetcast.evaluation.accuracy(forecast, new, others))
