"""Names of arrays in a file: x, labels, x1 and conditions, of one part or of two, and arrays that are not used."""

import numpy as np
import pytest

from config import SettingError
from data_loading.named import parts_in

X, N, T = np.zeros((40, 3)), np.zeros(40), np.ones((9, 3))


def test_only_arrays_with_the_prefix_are_conditions(capsys):
    given = dict(
        x=X, wind=N, cond_Re=N, x1=X + 1, cond_b_2=np.zeros((40, 2, 4, 4)), table=np.zeros((5, 2)), kind=N.astype(int)
    )
    (part,), _, text = parts_in(given, 'here')
    assert list(part.cond) == ['Re', 'b_2'] and part.x1 is given['x1'] and part.label is None
    assert text.startswith(
        'not used: wind float64 (40,), table float64 (5, 2), kind int64 (40,). If kind holds the classes'
    )
    assert 'To give wind to the network as a condition, rename it to cond_wind' in text
    assert text in capsys.readouterr().out


def test_a_condition_may_have_the_name_of_a_part():
    (part,), _, text = parts_in(dict(x=X, cond_valid=N), 'here')
    assert list(part.cond) == ['valid'] and not text
    parts, _, _ = parts_in(dict(x_train=X, x_test=T, cond_valid_train=N, test_cond_valid=T[:, 0]), 'here')
    assert [list(part.cond) for part in parts] == [['valid'], ['valid']]


@pytest.mark.parametrize('sign', ['_', '/'])
def test_both_parts_have_their_own(sign):
    names = {
        f'train{sign}x': X,
        f'train{sign}cond{sign}wind': N,
        f'test{sign}x': T,
        f'test{sign}cond{sign}wind': T[:, 0],
    }
    parts, _, text = parts_in(names | {'eval_cond_wind': N}, 'here')
    assert [len(part.cond['wind']) for part in parts] == [40, 9] and text.startswith('not used: eval_cond_wind')


@pytest.mark.parametrize(
    ('arrays', 'words'),
    [
        (dict(x_train=X, x_test=T, cond_a_train=N), r'x_test has no cond_a\. .*cond_a_train and cond_a_test'),
        (dict(x_train=X, x_test=T, x1=X), r'x_train has no x1\. .*x1_train and x1_test'),
        (dict(x=X, x_val=T, x1=X), r'x_val has no x1\. .*: x1_val'),
        (dict(x=X, x1=X[:9]), r'x1 is float64 \(9, 3\), and x is float64 \(40, 3\)'),
        (dict(x=X, x1=X.astype(int)), r'x1 is int64'),
        (dict(x=X, cond_a=N[:9]), r'a is float64 \(9,\)'),
        (dict(x=X, cond_a=N.astype(str)), r'a is <U32 \(40,\)'),
        (dict(x=np.array(3.0)), r'x: the data are float64 \(\)'),
    ],
)
def test_arrays_that_do_not_fit_together_are_named(arrays, words):
    with pytest.raises(SettingError, match=words):
        parts_in(arrays, 'here')
