"""Plots of points in the plane: classes, the exact density, paths."""

import torch

from reports.points import paths, scatter


def test_each_set_has_a_plot():
    x, other = torch.randn(50, 2), torch.randn(50, 2)
    one, both = scatter([x]), scatter([other, x])
    assert one.shape == (3, 400, 400) and both.shape == (3, 400, 800)
    assert both[:, :, :400].float().std() > 10 and both[:, :, 400:].float().std() > 10


def test_classes_of_points_have_colours_and_the_density_is_next_to_them():
    x, label = torch.randn(200, 2), torch.arange(200) % 2
    plain, told = (scatter([x, x], label=classes) for classes in (None, label))
    assert plain.shape == told.shape == (3, 400, 800) and not plain.equal(told)

    def orange(picture):  # the second colour of tab10
        return int(((picture[0] > 200) & (picture[1] > 90) & (picture[1] < 200) & (picture[2] < 120)).sum())

    assert orange(plain) == 0 < orange(told)
    both = scatter([x, x], label=label, density=lambda x: (x[:, 0] > 0).double())
    assert both.shape == (3, 400, 1200) and both[:, :, :800].float().std() > 10
    dark = (both[:, 50:350, 820:].sum(0) < 30).float().mean(0)  # the left half of the last plot is black
    assert dark[60:150].min() > 0.9 and dark[230:340].max() < 0.1


def test_points_that_are_not_finite_leave_the_others_to_be_seen():
    x = torch.cat([torch.randn(50, 2), torch.full((1, 2), torch.nan), torch.full((1, 2), torch.inf)])
    assert scatter([x]).float().std() > 10


def test_paths_are_lines_from_start_to_end():
    """All from the left to the right: ink in every column between."""
    start = torch.stack([torch.full((20,), -1.0), torch.linspace(-1, 1, 20)], 1)
    frames = [start + torch.tensor([step, 0.0]) for step in (0.0, 1.0, 2.0)]
    picture = paths(frames, torch.zeros(20).long())
    assert picture.shape == (3, 400, 400)
    ink = (picture.float().mean(0) < 250)[40:360].sum(0)
    assert (ink[80:320] >= 20).all()


def test_the_x_axis_of_a_scatter_plot_is_the_first_number():
    points = torch.stack([torch.linspace(-1, 1, 50), torch.zeros(50)], 1)
    picture = scatter([points]).int()
    coloured = (picture.amax(0) - picture.amin(0) > 60).nonzero()
    assert coloured[:, 1].max() - coloured[:, 1].min() > 200 > 20 > coloured[:, 0].max() - coloured[:, 0].min()
