"""Latent diffusion: pictures are encoded as small tensors and cached; samples are decoded (Rombach et al. 2022).

`encode` and `decode` may be any two functions; here they are an autoencoder, trained on the spot. `stored` encodes all
pictures once, into a file, and scales each channel to mean 0 and standard deviation 0.5. To the trainer they are
floats, and the experiment adds only `decode`. Both runs are judged in pixels.       sh run.sh examples/latent.py
"""

from pathlib import Path

import torch
from torch.nn import Buffer, Conv2d, ConvTranspose2d, ModuleDict, Sequential, SiLU

import utils
from data_utils import DATASETS, DataSpec
from evaluation.detectors import support_vectors
from evaluation.distances import compare
from runtime.files import atomic_write
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


def pictures(config):  # training and held-out part: x (N, 1, H, W) in [0, 1], labels (N,)
    return [(x / 255, labels) for x, labels in DATASETS['fashion_mnist'].load(config)[:2]]


def autoencoder(k=4, width=64):  # (N, 1, H, W) <-> (N, k, H / k, W / k)
    down = Conv2d(1, width, k, k), SiLU(), Conv2d(width, width, 3, padding=1), SiLU(), Conv2d(width, k, 1)
    up = Conv2d(k, width, 3, padding=1), SiLU(), ConvTranspose2d(width, width, k, k), SiLU()
    net = ModuleDict(dict(encode=Sequential(*down), decode=Sequential(*up, Conv2d(width, 1, 3, padding=1))))
    net.mean, net.std = Buffer(torch.ones(1, k, 1, 1)), Buffer(torch.ones(1, k, 1, 1))  # per latent channel
    return net


def stored(config):
    file = Path(config.data_dir, f'latents_of_fashion_mnist_seed_{config.seed}.pt')  # computed once
    if not file.exists():
        utils.seed_everything(config.seed, 'autoencoder')
        parts, net = pictures(config), autoencoder()
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
        for _ in range(1000):
            x = parts[0][0][torch.randint(len(parts[0][0]), (64,))]
            optimizer.zero_grad()
            (net['decode'](net['encode'](x)) - x).square().mean().backward()
            optimizer.step()
        z = [torch.cat([net['encode'](some).detach() for some in x.split(500)]) for x, _ in parts]
        net.mean, net.std = (f(z[0], dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        parts = [((x - net.mean) / (2 * net.std), labels) for x, (_, labels) in zip(z, parts, strict=True)]
        with atomic_write(file) as temporary:
            torch.save(dict(parts=parts, net=net.state_dict()), temporary)
    return torch.load(file)


DATASETS['latents'] = DataSpec(lambda config: tuple(stored(config)['parts']), num_classes=10, scale='float')


class Pixels(ExampleDiffusionTrainer):
    def sample_metrics(self, x, inputs):
        (train, labels), (held_out, _) = pictures(self.config)
        agreement = (support_vectors(train[:5000], labels[:5000])(x) == inputs.label).float().mean()
        distances = compare(*(2 * y.flatten(1).cpu() - 1 for y in (x, train[:10_000], held_out[:1000])), most=5000)
        return {'label_agreement': float(agreement), **distances}


class Latents(Pixels):
    def setup_networks(self):
        self.modules['autoencoder'] = net = autoencoder().to(self.device).requires_grad_(False)
        net.load_state_dict(stored(self.config)['net'])
        super().setup_networks()

    def decode(self, x0):
        net = self.modules['autoencoder']
        return net['decode'](2 * net.std * x0 + net.mean).clamp(0, 1)


if __name__ == '__main__':
    side_by_side(
        {'pixels': dict(trainer_class=Pixels), 'latents': dict(trainer_class=Latents, dataset='latents')},
        numbers=('final/adams/*', 'train/images_per_second'),
        default_flags='--preset fashion_mnist --num_training_steps 400',
    )
