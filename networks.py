"""The table of networks, and the scaling that turns each into a plain forward(xt, t, label) -> (B, C, H, W)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from config import Config, SettingError, choose
from processes import GaussianProcess, c_in, get_process
from unet import UNet
from utils import bcast_right

Shape = tuple[int, int, int]  # C, H, W

# time_input -> (t, process) -> (B,) time that the network sees; spans some hundreds, as a sinusoid needs.
TIME_INPUTS: dict[str, Callable[[Tensor, GaussianProcess], Tensor]] = {
    't': lambda t, process: 1000 * t,
    'log_snr': lambda t, process: -25 * process.log_snr(t),  # infinite where alpha or sigma is 0
}


class ScaledNetwork(nn.Module):
    """`net` behind a fixed scaling of its input: net(c_in xt, time, label).

    c_in gives the input unit variance for any process; `ve` cannot be trained without, its noise has a standard deviation of 80.
    """

    def __init__(self, net: nn.Module, process: GaussianProcess, time_input: str):
        super().__init__()
        self.net, self.process = net, process
        self.time_input = choose('time_input', time_input, TIME_INPUTS)

    def forward(self, xt: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        scale = c_in(self.process.alpha(t), self.process.sigma(t), self.process.sigma_data)
        return self.net(bcast_right(scale, xt.ndim) * xt, self.time_input(t, self.process), label)


def unet(config: Config, shape: Shape, num_classes: int) -> UNet:
    try:
        return UNet(
            shape,
            num_classes,
            channels=config.channels,
            channel_mults=config.channel_mults,
            num_res_blocks=config.num_res_blocks,
            attention_resolutions=config.attention_resolutions,
            dropout=config.dropout,
        )
    except ValueError as error:
        raise SettingError(
            f'{error}. Choose --attention_resolutions among these (none: pass the flag without a value), or use the preset of the data set.'
        ) from None


# name -> (config, (C, H, W), num_classes) -> forward(scaled xt, time, label); label num_classes is the null class.
NETWORKS: dict[str, Callable[[Config, Shape, int], nn.Module]] = {
    'unet': unet,
}

# The settings that shape a network's weights; saving.py names the first that differs when weights do not fit.
NETWORK_SETTINGS = ('dataset', 'network', 'channels', 'channel_mults', 'num_res_blocks', 'attention_resolutions')


def get_network(config: Config, shape: Shape, num_classes: int) -> ScaledNetwork:
    """The network with its scaling; weights are a function of the seed of torch's generator. Raises SettingError."""
    net = choose('network', config.network, NETWORKS)(config, shape, num_classes)
    process = get_process(config)
    if config.time_input == 'log_snr':
        ends = torch.tensor([config.t_min, config.t_max], dtype=torch.float64)
        if not process.log_snr(ends).isfinite().all():
            raise SettingError(
                f"time_input='log_snr' is infinite at t_min={config.t_min:g} or t_max={config.t_max:g} with "
                f'process_name={config.process_name!r}. Use --time_input t, or --t_min 0.001 --t_max 0.999.'
            )
    return ScaledNetwork(net, process, config.time_input)
