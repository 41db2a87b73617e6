"""The same afternoon's work with torchcfm: python with_torchcfm.py DATA OUT STEPS LR."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchcfm.models.unet import UNetModel
from torchvision.utils import save_image

data, out, steps, lr = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
torch.manual_seed(0)
classes = sorted(folder.name for folder in data.iterdir())
files = [(path, i) for i, name in enumerate(classes) for path in sorted((data / name).glob('*.png'))]
images = torch.stack([torch.from_numpy(np.array(Image.open(path).convert('L'))) for path, _ in files])
images, labels = images[:, None].float() / 127.5 - 1, torch.tensor([label for _, label in files])

network = UNetModel((1, 8, 8), 32, 1, channel_mult=(1, 2), attention_resolutions='4', num_classes=10, class_cond=True)
matcher, optimizer = ConditionalFlowMatcher(sigma=0.0), torch.optim.AdamW(network.parameters(), lr)
average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98))
for _ in range(steps):
    index = torch.randint(len(images), (128,))
    t, xt, target = matcher.sample_location_and_conditional_flow(torch.randn(128, 1, 8, 8), images[index])
    error = (network(t, xt, labels[index]) - target).square().mean((1, 2, 3))
    weight = 1 / (1 + (t / (1 - t)).square())  # here t = 1 is the data
    optimizer.zero_grad()
    (weight * error).mean().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    average.update_parameters(network)

x, label = torch.randn(500, 1, 8, 8), torch.arange(500) % 10
average.eval()
with torch.no_grad():
    for i in range(20):
        x = x + average(torch.full((500,), i / 20), x, label) / 20
out.mkdir(parents=True, exist_ok=True)
save_image((x[:20].clamp(-1, 1) + 1) / 2, out / 'samples.png', nrow=10)
a, b = x.clamp(-1, 1).flatten(1).double().numpy(), images.flatten(1).double().numpy()
root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
frechet = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
print(f'frechet {frechet:.3f}')
