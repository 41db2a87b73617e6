"""The loss on several processes: parameters that it leaves out, and what the processes send each other."""

import json

import pytest
from torch import nn

from training.parallel import has_unused


def test_parts_of_a_network_that_the_loss_leaves_out_are_found(tiny_config, build_trainer):
    """Two processes would wait for their gradients for ever, or end with an error, if this were not known."""
    trainer = build_trainer(tiny_config())
    losses = lambda: trainer.loss_fn(trainer.example, trainer.get_model_fn(trainer.network))  # noqa: E731
    assert not has_unused(trainer.modules, losses())
    trainer.network.add_module('auxiliary', nn.Linear(3, 3))
    assert has_unused(trainer.modules, losses())
    trainer.network.auxiliary.requires_grad_(False)
    assert not has_unused(trainer.modules, losses())
    assert all(p.grad is None for p in trainer.network.parameters())


@pytest.mark.parametrize(('watched', 'due'), [(7, False), (9, True)])
def test_processes_send_gradients_and_the_stop_flag_only(run_sh, tmp_path, watched, due):
    """One bucket of gradients, averaged in the last of two backward passes, and the flag; unless something is due."""
    env = dict(QUIET=str(tmp_path / 'sent'), WATCHED=str(watched))
    settings = dict(num_training_steps=12, log_every=5, save_every=0, eval_every=0, accumulation_steps=2)
    done = run_sh('tests/experiments/quiet.py', nproc=2, env=env, final_pictures=False, **settings)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        sent = json.loads((tmp_path / f'sent_{rank}').read_text())
        assert (sent != ['c10d::allreduce_', 'c10d::allreduce_']) == due, sent
