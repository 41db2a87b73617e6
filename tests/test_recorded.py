"""Gaps in the tests that a changed line once slipped through: the code was right, and no test saw it."""

import os
import subprocess
import sys

import pytest
import torch

import main
from config import SettingError
from data_loading import packed
from data_loading.choice import held_out_order
from evaluation import detectors, likelihood
from processes import RectifiedFlow
from runtime.errors import DataError
from scripts import evaluate
from tests.examples.test_examples import batch_of, build, load  # noqa: F401
from tests.helpers import ROOT
from trainer import ExampleDiffusionTrainer
from training import run_folder


def test_couplings_differ_from_step_to_step(tiny_config, build_trainer):
    orders = []

    class Mine(ExampleDiffusionTrainer):
        def couple(self, x0, x1, label):
            orders.append(torch.randperm(len(x1)))
            return x1

    steps = build_trainer(tiny_config(), Mine).batches.steps(0)
    for _ in range(2):
        list(next(steps))
    assert len(orders) == 2 and not orders[0].equal(orders[1])


def test_held_out_items_are_of_all_classes_in_turn(tiny_config, build_trainer):
    loader = build_trainer(tiny_config()).test_loader
    assert loader.labels[held_out_order(loader, 20, in_turn=True)].tolist() == 2 * list(range(10))


def test_held_out_items_are_of_the_requested_classes(tiny_config, build_trainer):
    loader = build_trainer(tiny_config()).test_loader
    for in_turn in (True, False):
        order = held_out_order(loader, 300, in_turn, classes=(3, 10, 3, 7))
        labels = loader.labels[order]
        assert (labels[0::4] == 3).all() and (labels[2::4] == 3).all() and (labels[3::4] == 7).all()
        assert len(labels[1::4].unique()) == 10 and len({*order[0::4]}) > 10
    loader.labels[loader.labels == 7] = 6
    with pytest.raises(SettingError, match='labels=7: samples start from held-out items, and none is of this class'):
        held_out_order(loader, 4, True, classes=(3, 7))


def test_the_noise_of_a_sampler_differs_from_part_to_part(tiny_config, build_trainer):
    trainer, seen = build_trainer(tiny_config()), []

    def sampler(model_fn, inputs):
        seen.append(torch.randn(4))
        return inputs.x1

    trainer.drawing.samples(sampler, trainer.network, trainer.sample_inputs(80))
    assert len(seen) > 1 and not seen[0].equal(seen[1])


def test_the_standard_error_of_two_probes_is_half_their_difference(monkeypatch):
    g = torch.Generator().manual_seed(0)
    matrix, x0 = torch.randn(3, 3, generator=g), torch.randn(4, 3, generator=g)
    probes = torch.sign(torch.randn(2, 4, 3, generator=g))

    def found(chosen):
        monkeypatch.setitem(likelihood.PROBES, 'mine', lambda x, n: chosen.to(x))
        network = lambda x, t, label=None: torch.sin(x @ matrix.T)  # noqa: E731
        return likelihood.log_likelihood(network, RectifiedFlow(), x0, divergence='mine', num_probes=len(chosen))

    both, a, b = found(probes), found(probes[:1]), found(probes[1:])
    torch.testing.assert_close(both.standard_error, (a.log_prob - b.log_prob).abs() / 2, rtol=1e-3, atol=1e-5)


def test_an_unreadable_training_item_costs_no_held_out_one(tmp_path):
    class Items:
        def __len__(self):
            return 10

        def __getitem__(self, i):
            if i == 3:
                raise DataError('bad')
            return torch.zeros(1, 2, 2, dtype=torch.uint8), 0

    packed.build(Items(), tmp_path / 'x.pt', 3, True, 'x')
    found = packed.read(tmp_path / 'x.pt')
    assert found['held_out'] == 3 and len(found['x']) == 9


def test_the_classifier_sees_held_out_images_only_to_be_tested(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setattr(detectors, 'CLASSIFIER_STEPS', 3)
    trainer, calls = build_trainer(tiny_config()), []
    take = trainer.test_loader.take
    monkeypatch.setattr(trainer.test_loader, 'take', lambda rows: (calls.append(len(rows)), take(rows))[1])
    detectors.train_classifier(trainer.judge.data)
    assert sum(calls) == trainer.test_loader.size


def test_the_line_of_other_weights_of_the_same_step_is_not_taken(tiny_config, build_trainer, tmp_path):
    trainer = build_trainer(tiny_config())
    before = detectors.digest_of(trainer.network)
    evaluate.append_line(tmp_path / 'x.jsonl', dict(step=0, weights_digest=before, commit='a'))
    assert evaluate.find_line(tmp_path / 'x.jsonl', dict(step=0, weights_digest=before, commit='b'))
    with torch.no_grad():
        next(trainer.network.parameters()).add_(1)
    after = detectors.digest_of(trainer.network)
    assert evaluate.find_line(tmp_path / 'x.jsonl', dict(step=0, weights_digest=after, commit='a')) is None


@pytest.mark.slow
def test_a_student_moves_from_the_fake_to_the_teacher(build, monkeypatch):  # noqa: F811
    teacher, _ = build('distill', 'Flow', experiment_name='teacher')
    teacher.train_loop()
    monkeypatch.setattr(main, 'load_run', lambda folder: teacher)
    student, _ = build('distill', 'Student', experiment_name='student')
    batch = batch_of(student)
    x = torch.randn_like(batch.x0).requires_grad_()
    student.sample = lambda *_: x
    with torch.no_grad():
        for p in student.modules['fake'].parameters():
            p.add_(0.1)
    student.loss_fn(batch, None).sum().backward()
    coefs = student.process(batch.t)
    xt = student.process.compute_xt(x.detach(), batch.x1.roll(1, 0), coefs)
    fake, real = (
        student.model_convert_fn(
            student.get_model_fn(student.modules[name])(xt, batch.t, batch.label), batch.t, xt, coefs
        )
        for name in ('fake', 'teacher')
    )
    assert (x.grad * (fake.x0 - real.x0).detach()).sum() > 0  # a step against the gradient goes from fake to real


def test_a_bridge_is_drawn_from_the_true_end(build):  # noqa: F811
    trainer, _ = build('bridge')
    data, seen = trainer.train_loader.take(range(64)), {}
    trainer.step = 12
    trainer.travel = lambda fn, x, way: (seen.update(x=x, way=way), x)[1]
    batch = trainer.prepare_batch_fn(data, is_train=True)
    up, true_x1 = batch.label == 1, {tuple(row) for row in data[2].tolist()}
    assert seen['way'].equal(1 - batch.label)
    assert all(tuple(row) in true_x1 for row in seen['x'][up].tolist()) and seen['x'][~up].equal(data[0][~up])


# ---------------------------------------------------------------- the lock of a run


OTHER = """
import sys
from pathlib import Path
from training.run_folder import lock_run
lock_run(Path(sys.argv[1]))
print('locked', flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_has_locked_is_refused_until_it_ends(tmp_path):
    command = [sys.executable, '-c', OTHER, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'locked\n'
        told = (tmp_path / 'lock').read_text()
        assert str(other.pid) in told
        with pytest.raises(SettingError, match=f'{other.pid}'):
            run_folder.lock_run(tmp_path)
        assert (tmp_path / 'lock').read_text() == told  # the refused process writes nothing
    finally:
        other.kill()
        other.wait()
    run_folder.lock_run(tmp_path)
    assert str(os.getpid()) in (tmp_path / 'lock').read_text()
    run_folder.lock_run(tmp_path)  # again by the same process
    run_folder._locks.pop(tmp_path.resolve() / 'lock').close()
