"""The table of networks, and the scaling that makes each a plain forward(xt, t, label, **cond) -> like xt (B, ...)."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from config import Config, SettingError, choose
from networks.residual_mlp import MLP
from networks.transformer import DIT_SIZES, DiT
from processes import GaussianProcess, c_in, get_process
from unet import ConditionedNetwork, UNet
from utils import bcast_right

Shape = tuple[int, ...]  # shape of one item, without the batch: (C, H, W), (D,), ()

# time_input -> (t, process) -> (B,) time that the network sees; spans some hundreds, as a sinusoid needs.
TIME_INPUTS: dict[str, Callable[[Tensor, GaussianProcess], Tensor]] = {
    't': lambda t, process: 1000 * t,
    'log_snr': lambda t, process: -25 * process.log_snr(t),  # infinite where alpha or sigma is 0
}


class ScaledNetwork(nn.Module):
    """`net` behind a fixed scaling of its input: net(c_in xt, time, label, **cond). Conditions go through unchanged.

    c_in gives the input unit variance for any process; `ve`, whose noise has a standard deviation of 80, cannot be
    trained without it.
    """

    def __init__(self, net: nn.Module, process: GaussianProcess, time_input: str):
        super().__init__()
        self.net, self.process = net, process
        self.time_input = choose('time_input', time_input, TIME_INPUTS)

    def forward(self, xt: Tensor, t: Tensor, label: Tensor | None = None, **cond: Tensor) -> Tensor:
        scale = c_in(self.process.alpha(t), self.process.sigma(t), self.process.sigma_data)
        return self.net(bcast_right(scale, xt.ndim) * xt, self.time_input(t, self.process), label, **cond)


def construct(config: Config, network: type[ConditionedNetwork], *args: Any) -> ConditionedNetwork:
    """network(*args), which remembers its arguments. A ValueError becomes a SettingError."""
    try:
        net = network(*args)
    except ValueError as error:
        raise SettingError(f'network={config.network!r}: {error}.') from None
    net.arguments = inspect.signature(network).bind(*args).arguments
    return net


def unet(config: Config, shape: Shape, num_classes: int, cond: Mapping[str, Shape] | None = None) -> nn.Module:
    return construct(
        config, UNet, shape, num_classes, config.channels, config.channel_mults, config.num_res_blocks,
        config.attention_resolutions, config.dropout, cond, config.padding,
    )  # fmt: skip


def dit(config: Config, shape: Shape, num_classes: int, cond: Mapping[str, Shape] | None = None) -> nn.Module:
    defaults = choose('dit_size', config.dit_size, DIT_SIZES)
    given = config.dit_depth, config.dit_width, config.dit_heads
    depth, width, heads = (value or default for value, default in zip(given, defaults, strict=True))
    if width % (4 * heads):
        fit = [n for n in range(1, 65) if width % (4 * n) == 0]
        raise SettingError(
            f'dit_width={width}, dit_heads={heads}: the width must be a multiple of 4 x heads. With this width, pass '
            f'--dit_heads {", ".join(map(str, fit)) or "1 and another --dit_width"}.'
        )
    return construct(config, DiT, shape, num_classes, depth, width, heads, config.dit_patch, config.dropout, cond)


def mlp(config: Config, shape: Shape, num_classes: int, cond: Mapping[str, Shape] | None = None) -> nn.Module:
    width = 8 * config.channels
    return construct(config, MLP, shape, num_classes, width, config.num_res_blocks, config.dropout, cond)


# name -> (config, shape of one item of data, num_classes) -> forward(scaled xt, time, label, **cond); label num_classes
# is the null class. cond={name: shape of one item} is passed only if there are conditions.
NETWORKS: dict[str, Callable[..., nn.Module]] = {'unet': unet, 'mlp': mlp, 'dit': dit}


def get_network(
    config: Config, shape: Shape, num_classes: int, cond: Mapping[str, Shape] | None = None
) -> ScaledNetwork:
    """The network with its scaling, for data of `shape`; its weights depend only on the seed of torch's generator.

    `cond`: the conditions besides the class, name -> shape of one item, such as {'ink': (), 'text': (16,)}.
    Raises SettingError, also if there are conditions and the network takes none.
    """
    build = choose('network', config.network, NETWORKS)
    if cond:
        reserved = sorted({'xt', 't', 'time', 'label'} & set(cond))
        if reserved:
            raise SettingError(
                f'condition {reserved[0]!r}: networks have an argument of that name. Choose another name.'
            )
        parameters = inspect.signature(build).parameters.values()
        if not any(p.name == 'cond' or p.kind is p.VAR_KEYWORD for p in parameters):
            raise SettingError(
                f'network={config.network!r} takes no conditions, but there are some: {", ".join(cond)}. Give its '
                'builder in NETWORKS a fourth parameter, cond=None (a dict from name to shape of one item), and its '
                'network forward(self, xt, time, label, **cond); or use --network unet, dit or mlp.'
            )
        net = build(config, shape, num_classes, cond=cond)
    else:
        net = build(config, shape, num_classes)
    if config.checkpointing:
        if not isinstance(net, ConditionedNetwork):
            raise SettingError(f'checkpointing=True: network={config.network!r} has no blocks. Use --no_checkpointing.')
        net.checkpointing = True
    process = get_process(config)
    if config.time_input == 'log_snr':
        ends = torch.tensor([config.t_min, config.t_max])  # float32, as the network sees them
        if not process.log_snr(ends).isfinite().all():
            raise SettingError(
                f"time_input='log_snr' is infinite at t_min={config.t_min:g} or t_max={config.t_max:g} with "
                f'process_name={config.process_name!r}. Use --time_input t, or --t_min 0.001 --t_max 0.999.'
            )
    return ScaledNetwork(net, process, config.time_input)
