"""Steps whose loss or gradient is not finite: they change no weight, are counted, and end the run if many in a row."""

import numpy as np
import pytest
import torch

import saving
from runtime.errors import NonFiniteLoss
from tests.helpers import Interrupted, assert_same, cut_off, record_of
from trainer import ExampleDiffusionTrainer
from training import checkpoints, run_folder
from training.bad_steps import BadSteps


def test_one_loss_that_is_not_finite_makes_the_whole_mean_nan():
    """Necessary because an infinite loss can have a finite gradient."""
    for bad in (float('nan'), float('inf'), -float('inf')):
        assert BadSteps.poison(torch.tensor([1.0, bad, 2.0])).isnan()
    assert BadSteps.poison(torch.tensor([1.0, 3.0])) == 2


def bad_in(steps, where='loss'):
    """A trainer whose loss, or only its gradient, is not finite in these steps."""

    class Trainer(ExampleDiffusionTrainer):
        def loss_fn(self, batch, model_fn):
            losses = super().loss_fn(batch, model_fn)
            if self.step not in steps or not torch.is_grad_enabled():
                return losses
            if where == 'loss':
                return torch.where(
                    torch.arange(len(losses)) == 3, float('inf'), losses
                )  # finite gradient, infinite loss
            losses.register_hook(lambda gradient: gradient * float('nan'))
            return losses

    return Trainer


def state_of(trainer):
    return checkpoints.to_host(
        {'network': trainer.network.state_dict(), 'optimizer': trainer.optimizers['network'].state_dict()}
    )


@pytest.mark.parametrize('where', ['loss', 'gradient'])
@pytest.mark.parametrize('accumulation_steps', [1, 2])
def test_a_bad_step_changes_nothing_and_training_continues(tiny_config, build_trainer, where, accumulation_steps):
    trainer = build_trainer(tiny_config(accumulation_steps=accumulation_steps), bad_in({2, 3}, where))
    steps = trainer.batches.steps(trainer.step)
    states = []
    for _ in range(5):
        trainer.train_step(next(steps))
        states.append(state_of(trainer))
    lr = [group.pop('lr') for state in states for group in state['optimizer']['param_groups']]
    assert len(set(lr)) > 1  # the schedule continues
    assert_same(states[1], states[2])
    assert_same(states[1], states[3])
    assert all(
        not a.equal(b)
        for a, b in zip(states[3]['network'].values(), states[4]['network'].values(), strict=True)
        if a.ndim > 1
    )
    assert int(states[4]['optimizer']['state'][0]['step']) == 3
    assert trainer.bad_steps.counts.tolist() == [0, 2, 3]
    assert all(w.isfinite().all() for w in trainer.ema.networks[0.999].state_dict().values())


def test_a_bad_step_is_in_the_record(tiny_config, build_trainer, capsys):
    config = tiny_config(log_every=2, eval_every=0)
    build_trainer(config, bad_in({2, 7})).train_loop()
    lines = record_of(config.run_dir)
    assert [line['train/bad_steps'] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert all(np.isfinite(line['train/loss']) and np.isfinite(line['train/grad_norm']) for line in lines)
    assert capsys.readouterr().out.count('skipped 1 of the last steps') == 2


@pytest.mark.parametrize('log_every', [1, 50])
def test_too_many_bad_steps_in_a_row_stop_the_run_with_finite_weights(tiny_config, build_trainer, log_every):
    """Even if that is noticed later: no weight changes after max_bad_steps, though later steps are good."""
    config = tiny_config(max_bad_steps=3, log_every=log_every, save_every=0 if log_every == 50 else 5, keep_every=0)
    trainer = build_trainer(config, bad_in({2, 3, 6, 7, 8}))
    with pytest.raises(NonFiniteLoss, match=r'max_bad_steps=3 steps in a row, from step 6 on'):
        trainer.train_loop()
    assert int(trainer.optimizers['network'].state_dict()['state'][0]['step']) == 4  # steps 0, 1, 4, 5
    networks = [trainer.network, *trainer.ema.networks.values()]
    assert all(w.isfinite().all() for network in networks for w in network.state_dict().values())
    if log_every == 1:
        kept = saving.load(run_folder.last_path(config))
        assert kept['step'] == 5 and kept['bad_steps'].tolist() == [0, 2, 3]


def test_bad_steps_in_a_row_are_counted_across_a_restart(tiny_config, build_trainer):
    config = tiny_config(max_bad_steps=3, save_every=1, log_every=1)

    with pytest.raises(Interrupted):
        cut_off(build_trainer(config, bad_in({4, 5, 6})), 6, 'killed')
    again = build_trainer(config, bad_in({4, 5, 6}))
    assert again.bad_steps.counts.tolist() == [1, 1, 4]  # the save of step 5
    with pytest.raises(NonFiniteLoss, match='from step 4 on'):
        again.train_loop()
