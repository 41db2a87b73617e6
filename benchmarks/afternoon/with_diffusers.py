"""The same afternoon's work with diffusers as a library: python with_diffusers.py DATA OUT STEPS LR."""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from scipy.linalg import sqrtm
from torchvision.utils import save_image

data, out, steps, lr = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
torch.manual_seed(0)
classes = sorted(folder.name for folder in data.iterdir())
files = [(path, i) for i, name in enumerate(classes) for path in sorted((data / name).glob('*.png'))]
images = torch.stack([torch.from_numpy(np.array(Image.open(path).convert('L'))) for path, _ in files])
images, labels = images[:, None].float() / 127.5 - 1, torch.tensor([label for _, label in files])

network = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8, num_class_embeds=10,
    block_out_channels=(32, 64), down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
    up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
)  # fmt: skip
optimizer, average = torch.optim.AdamW(network.parameters(), lr), EMAModel(network.parameters(), decay=0.98)
for _ in range(steps):
    index, noise, t = torch.randint(len(images), (128,)), torch.randn(128, 1, 8, 8), torch.rand(128)
    w = t[:, None, None, None]
    xt = (1 - w) * images[index] + w * noise
    error = (network(xt, 1000 * t, labels[index]).sample - (noise - images[index])).square().mean((1, 2, 3))
    weight = 1 / (1 + ((1 - t) / t).square())
    optimizer.zero_grad()
    (weight * error).mean().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    average.step(network.parameters())

average.copy_to(network.parameters())
network.eval()
scheduler = FlowMatchEulerDiscreteScheduler()
scheduler.set_timesteps(20)
x, label = torch.randn(500, 1, 8, 8), torch.arange(500) % 10
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(500), label).sample, t, x).prev_sample
out.mkdir(parents=True, exist_ok=True)
save_image((x[:20].clamp(-1, 1) + 1) / 2, out / 'samples.png', nrow=10)
a, b = x.clamp(-1, 1).flatten(1).double().numpy(), images.flatten(1).double().numpy()
root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
frechet = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
print(f'frechet {frechet:.3f}')
