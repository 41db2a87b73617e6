"""The same afternoon's work with denoising-diffusion-pytorch, whose trainer has no classes and whose FID needs weights
from the internet: python with_lucidrains.py DATA OUT STEPS LR."""

import sys
from pathlib import Path

import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from PIL import Image
from scipy.linalg import sqrtm


class Mine(GaussianDiffusion):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        self.loss_weight.copy_(1 / (1 + snr))


if __name__ == '__main__':
    data, out, steps, lr = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    torch.manual_seed(0)
    network = Unet(24, dim_mults=(1, 2), channels=1)
    diffusion = Mine(network, image_size=8, sampling_timesteps=20)
    trainer = Trainer(
        diffusion, data, train_batch_size=128, train_lr=lr, train_num_steps=steps, save_and_sample_every=steps // 2,
        results_folder=str(out), augment_horizontal_flip=False, convert_image_to='L', calculate_fid=False,
        ema_decay=0.98, ema_update_every=1,
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        x = 2 * trainer.ema.ema_model.sample(batch_size=500) - 1
    images = [np.array(Image.open(path).convert('L')) for path in Path(data).glob('**/*.png')]
    a, b = x.flatten(1).double().numpy(), np.stack(images).reshape(len(images), -1) / 127.5 - 1
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    frechet = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    print(f'frechet {frechet:.3f}')
