"""What solvers are called with: the network's memory, coefficients of one time, and the step for few of them."""

import torch

from processes import Coefs
from solvers import SOLVERS, TIME_GRIDS, Predict, Solver, coefs_at
from tests.oracle import F64, process_named


def test_predict_remembers_only_what_is_asked_for():
    predict = Predict(lambda x, t: t, process_named('rf'), memory=2)
    for t in (0.9, 0.8, 0.7):
        predict(None, t)
    assert list(predict.past) == [(0.7, 0.7), (0.8, 0.8)] and predict.nfe == 3


def test_coefs_of_one_time_are_double():
    c = coefs_at(process_named('cosine'), 0.5)
    assert isinstance(c, Coefs) and c.alpha.dtype == F64 and c.alpha.shape == (1,)
    assert c.to(torch.zeros(1)).alpha.dtype == torch.float32


def test_few_steps_have_a_step_and_a_grid_of_their_own():
    many, few = (lambda *_: None), (lambda *_: None)
    solver = Solver(many, nfe=1, order=1, few=few, few_steps=3)
    (step, grids), (other, others) = solver.for_steps(3), solver.for_steps(4)
    assert step is few and other is many and others is TIME_GRIDS
    assert [name for name in grids if grids[name] is not others[name]] == ['logistic']
    assert SOLVERS['euler'].for_steps(1) == (SOLVERS['euler'].step, TIME_GRIDS)
