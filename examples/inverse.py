"""Guide an unconditional model by a measurement while it samples (Song et al. 2023, PiGDM; Rozet et al. 2024, MMPS).

The data are points of eight Gaussians. We measure the first coordinate, y = x_1 + noise, and draw points that agree
with y, which the network does not know. With g = d x0_1 / d xt and r = sigma^2 / alpha, its prediction x0 becomes

    x0 + r g (y - x0_1) / (noise^2 + V)

V is the variance of x_1 given xt. `pigdm` uses the variance for a Gaussian as wide as the data; `mmps` uses r g_1, the
exact one (Rozet et al. 2024). `none` ignores y. All take 100 SDE steps, each with one evaluation and one gradient.
`wasserstein` is the distance from the exact posterior, a mixture of Gaussians; `real_wasserstein` is for other draws.

    sh run.sh examples/inverse.py                         one run, three samplers
"""

from functools import partial

import torch

from evaluation.distances import DRAWS, floor, wasserstein
from prediction import Prediction
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer

Y, NOISE = 0.6, 0.1  # right of the two Gaussians at 0.495, left of the one at 0.7


def posterior(n, seed):
    """n points (n, 2) of the eight Gaussians, given that the measurement of the first coordinate is Y."""
    draw = torch.Generator().manual_seed(seed)
    angle = torch.arange(8) * torch.pi / 4
    means, var = 0.7 * torch.stack([angle.cos(), angle.sin()], 1), 0.05**2
    weights = (-((Y - means[:, 0]) ** 2) / (2 * (var + NOISE**2))).softmax(0)
    x = means[weights.multinomial(n, replacement=True, generator=draw)]
    gain = var / (var + NOISE**2)
    x[:, 0] += gain * (Y - x[:, 0])
    return x + torch.tensor([var * (1 - gain), var]).sqrt() * torch.randn(n, 2, generator=draw)


VARIANCES = {  # sampler -> variance of x_1 given xt: f(coefs, sigma^2 / alpha, g_1), each (B,)
    'pigdm': lambda c, r, g: (c.sigma * c.sigma_data * c.c_in) ** 2,
    'mmps': lambda c, r, g: r * g.clamp(min=0),
}


class Inverse(ExampleDiffusionTrainer):
    def guided(self, model_fn, inputs, method):
        def moved_fn(xt, t, label=None):
            coefs = self.process(t)
            with torch.enable_grad():
                xt = xt.detach().requires_grad_()
                x0 = self.model_convert_fn(model_fn(xt, t, label), t, xt, coefs).x0
                g = torch.autograd.grad(x0[:, 0].sum(), xt)[0]
            r = coefs.sigma**2 / coefs.alpha
            gain = r * (Y - x0.detach()[:, 0]) / (NOISE**2 + VARIANCES[method](coefs, r, g[:, 0]))
            moved = Prediction(xt.detach(), coefs, x0=x0.detach() + gain[:, None] * g)
            return getattr(moved, self.config.model_type)

        return self.draw(moved_fn, inputs, 'sde_dpmpp_2m', nfe=100)

    def samplers(self):
        none = partial(self.draw, solver='sde_dpmpp_2m', nfe=100)
        return {'none': none} | {method: partial(self.guided, method=method) for method in VARIANCES}

    def sample_metrics(self, x, inputs):
        exact = posterior(len(x), seed=1)
        real = [wasserstein(posterior(len(x), seed), exact) for seed in range(2, DRAWS + 2)]
        return {'wasserstein': wasserstein(x.cpu(), exact)} | floor('wasserstein', real)


if __name__ == '__main__':
    run = dict(trainer_class=Inverse, dataset='eight_gaussians')
    side_by_side({'unconditional': run}, default_flags='--preset toy2d --label_dropout 1')
