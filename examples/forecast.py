"""Ensemble forecasts: from the present state, a point mass, to the law of the next one (Chen et al. 2024).

    xt = (1 - t)^2 x0 + t x1 + S t w,    w ~ N(0, (1 - t) I);    x1 is the present state, x0 the next one
The network learns b = E[x1 - 2 (1 - t) x0 + S w | xt, x1], which contains n = E[w | xt, x1] / (1 - t). So the noise g
can be chosen after training: for every g, this SDE leads from x1 at t = 1 to the law of x0 given x1 at t = 0.
    n = (2 (xt - t x1) / (1 - t) + b - x1) / (S (1 + t)),    dx = b dt + (g^2 - S^2 t^2) / (2 S t) n dt + g dw
For `foellmer`, errors of b change paths least (in KL); `learned` needs no n; `ode` moves a point to a point. `adams` is
the plain flow. `exact`: exact law (data_loading/ring.py); `real`: draws from it. sh run.sh examples/forecast.py
"""

import dataclasses
from functools import partial

import torch

from config import choose, only
from data_loading import ring
from data_utils import DATASETS, DataSpec
from evaluation.scores import crps, energy_spectrum, spread_skill
from scripts.compare import side_by_side
from solvers import SOLVERS
from trainer import ExampleDiffusionTrainer, SampleInputs

DATASETS['ring'], S, LEADS = DataSpec(ring.load_ring, (1, ring.POINTS), scale='float'), 0.5, 4  # S: scale of the noise
NOISES = {'foellmer': lambda t: S**2 * t * (2 + t), 'learned': lambda t: (S * t) ** 2, 'ode': lambda t: 0.0}  # g^2
SOLVERS |= dict.fromkeys(NOISES, SOLVERS['euler'])  # to choose one later: evaluate.py --solver ode


class FromNoise(ExampleDiffusionTrainer):
    independent = False  # samples start from held-out states, in turn

    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        return dataclasses.replace(prepared, x1=torch.randn_like(prepared.x0), cond={'now': prepared.x1})

    def step_from(self, now, model_fn, solver):
        return super().draw(model_fn, SampleInputs(torch.randn_like(now), cond={'now': now}), solver)

    def draw(self, model_fn, inputs, solver):
        x = inputs.cond['now']
        return torch.cat([x := self.step_from(x, model_fn, solver) for _ in range(LEADS)], 1)  # (n, LEADS, points)

    def show(self, name, x, inputs):
        super().show(name, x, dataclasses.replace(inputs, given=[inputs.cond['now']]))

    def samplers(self):
        only(self.config, process_name='rf', model_type='velocity', target_type='velocity', loss_weight='none')
        return {s: partial(self.draw, solver=s) for s in (NOISES if isinstance(self, Forecast) else ['adams'])}

    def sample_metrics(self, x, inputs):
        found, n, seeded = {}, self.test_loader.size, torch.Generator().manual_seed(0)
        now, x = inputs.cond['now'][:n].cpu(), x[: len(x) // n * n].cpu().unflatten(0, (-1, 1, n))  # (M, 1, n, ...)
        for lead in (1, LEADS):
            members, truth = x[..., lead - 1, None, :], torch.stack([ring.draw(now, lead, seeded) for _ in range(200)])
            energy = [energy_spectrum(each.flatten(0, -3)).mean(0) for each in (members, truth[: len(members)])]
            off, real = (torch.stack(energy) / ring.spectrum(now, lead).mean(0) - 1).square().mean(1).sqrt()
            found[lead] = dict(crps=crps(members, truth).mean(), exact_crps=ring.noise_std(lead) / torch.pi**0.5)
            found[lead] |= dict(spread_skill=spread_skill(members, truth), spectrum_error=off, real_spectrum_error=real)
        return {f'{name}_{lead}': float(value) for lead in found for name, value in found[lead].items()}


class Forecast(FromNoise):
    def loss_fn(self, batch, model_fn):
        t, x1, w = batch.t[:, None, None], batch.cond['now'], (1 - batch.t[:, None, None]).sqrt() * batch.x1
        xt = (1 - t) ** 2 * batch.x0 + t * x1 + S * t * w
        return (model_fn(xt, batch.t, now=x1) - (x1 - 2 * (1 - t) * batch.x0 + S * w)).square().mean((1, 2))

    def step_from(self, x1, model_fn, solver):
        x, steps = x1, self.config.sample_nfe or self.config.num_sample_steps
        for t in torch.linspace(1, 1 / steps, steps).tolist():
            b, g2 = model_fn(x, x.new_full((len(x),), t), now=x1), choose('solver', solver, NOISES)(t)
            n = (2 * (x - t * x1) / max(1 - t, 1e-9) + b - x1) / (S * (1 + t))
            x = x - (b + (g2 / (S * t) - S * t) / 2 * n) / steps + (g2 / steps) ** 0.5 * torch.randn_like(x)
        return x


if __name__ == '__main__':
    own = {FromNoise: dict(solver='adams'), Forecast: dict(solver='learned')}
    runs = {cls.__name__: dict(trainer_class=cls, dataset='ring', **more) for cls, more in own.items()}
    side_by_side(runs, ('final/*/[cs]*', 'final/adams/[er]*'), '--preset toy2d --num_sample_steps 100')
