"""Feature extractors, and numbers for samples of digits against independent computations."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from data_utils import DATASETS, DataSpec
from evaluation import detectors
from evaluation.distances import compare
from main import load_run
from trainer import ExampleDiffusionTrainer
from training.experiment import SampleInputs


@pytest.fixture(scope='module')
def digits():
    """train, train_labels, held_out, held_out_labels; images (N, 1, 8, 8) in [0, 1]."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    x, y = torch.from_numpy(data.images).float()[order, None] / 16, torch.from_numpy(data.target)[order]
    return x[:1500], y[:1500], x[1500:], y[1500:]


def test_numbers_for_digits_equal_pixels_between_minus_1_and_1(tiny_config, build_trainer):
    """Frechet distance (Dowson and Landau 1982, eq. 16), a support-vector machine, and nearest neighbours, by scipy and
    sklearn. All figures in the docs use this unit."""
    trainer = build_trainer(tiny_config())
    train, train_labels = trainer.train_loader.everything()
    held_out, labels = trainer.test_loader.everything()
    samples = (held_out + 0.2 * torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    asked = torch.where(torch.arange(len(labels)) % 3 == 0, (labels + 1) % 10, labels)
    found = trainer.judge.distances(samples, SampleInputs(samples, asked))

    a, b, c = (2 * x.flatten(1).double().numpy() - 1 for x in (samples, train, held_out))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    roots = np.sqrt(scipy.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    frechet = gap + np.trace(cov_a) + np.trace(cov_b) - 2 * roots
    seen = SVC(gamma='scale').fit(b.astype(np.float32), train_labels.numpy()).predict(a.astype(np.float32))
    neighbours = NearestNeighbors(n_neighbors=1).fit(b)
    ratio = neighbours.kneighbors(a)[0].mean() / neighbours.kneighbors(c)[0].mean()
    assert found['frechet'] == pytest.approx(frechet, rel=1e-3)
    assert found['label_agreement'] == pytest.approx((seen == asked.numpy()).mean(), abs=1e-6)
    assert 0.4 < found['label_agreement'] < 0.7
    real = SVC(gamma='scale').fit(b.astype(np.float32), train_labels.numpy()).predict(c.astype(np.float32))
    assert found['real_label_agreement'] == pytest.approx((real == labels.numpy()).mean())
    assert found['nearest_neighbour_ratio'] == pytest.approx(ratio, rel=1e-4) and ratio > 1.2


def test_a_support_vector_machine_knows_the_digits(digits):
    train, train_labels, held_out, labels = digits
    predict = detectors.support_vectors(train, train_labels)
    seen = predict(held_out)
    assert seen.shape == (297,) and (seen == labels).float().mean() > 0.95


def test_held_out_items_are_judged_as_decode_returns_them():
    held_out = SimpleNamespace(size=4, take=lambda rows: (torch.tensor([0, 100, 200, 255])[:, None], torch.ones(4)))
    data = SimpleNamespace(held_out=held_out, as_decoded=lambda x: x / 255, device='cpu')
    judge = detectors.Detector(lambda x: x, 'digest', 'about', predict=lambda x: (x[:, 0] > 0.5).long())
    found = detectors.agreement(torch.tensor([True, True, False, True]), judge, data)
    assert found == dict(label_agreement=0.75, real_label_agreement=0.5)
    assert detectors.agreement(None, judge, data) == {}


def test_data_with_fewer_than_two_classes_have_no_label_agreement(tiny_config, build_trainer, monkeypatch):
    (x, label), held_out = DATASETS['digits'].load(tiny_config())
    for name, classes, factor in (('ten', 10, 1), ('one', 10, 0), ('none', 0, 1)):
        spec = DataSpec(lambda config, k=factor: ((x, k * label), held_out), (1, 8, 8), classes, 16)
        monkeypatch.setitem(DATASETS, name, spec)
        data = build_trainer(tiny_config(dataset=name, experiment_name=name)).judge.data
        detector = detectors.DETECTORS['pixels'](data, '')
        assert (detector.predict is not None) == (name == 'ten'), name
        assert ('support-vector' in detector.about) == (name == 'ten')


@pytest.mark.parametrize(('dataset', 'network'), [('digits', 'unet'), ('moons', 'mlp')])
def test_small_grey_images_and_points_are_judged_by_their_values(tiny_config, build_trainer, dataset, network):
    data = build_trainer(tiny_config(dataset=dataset, network=network)).judge.data
    assert detectors.get_detector(data).name == 'pixels'
    x = data.held_out.everything()[0]
    features = detectors.pixels(data, '').features(x)
    assert torch.equal(features, 2 * x.flatten(1) - 1 if dataset == 'digits' else x)


def test_large_images_are_judged_by_small_ones(tiny_config, build_trainer, monkeypatch):
    """The covariance of all pixels of large images would not fit into memory."""
    images = torch.randint(0, 256, (40, 3, 64, 32), dtype=torch.uint8)
    labels = torch.zeros(40, dtype=torch.int64)
    monkeypatch.setitem(DATASETS, 'large', DataSpec(lambda config: ((images, labels), (images, labels)), (3, 64, 32)))
    trainer = build_trainer(tiny_config(dataset='large'))
    detector = detectors.pixels(trainer.judge.data, '')
    x = images.float() / 255
    first = x[:, 0, :4].mean(1).view(40, 16, 2).mean(2)  # first channel: means of 4 rows and 2 columns
    assert torch.allclose(detector.features(x)[:, :16], 2 * first - 1, atol=1e-6)
    assert detector.features(x).shape == (40, 768) and '16 x 16' in detector.about


@pytest.mark.slow
def test_a_damaged_classifier_is_trained_again(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setattr(detectors, 'CLASSIFIER_STEPS', 100)
    trainer = build_trainer(tiny_config())
    first = detectors.classifier(trainer.judge.data, '')
    (path,) = Path(trainer.config.data_dir, 'cache').glob('classifier-*.pt')
    path.write_bytes(path.read_bytes()[:1000])
    assert detectors.classifier(trainer.judge.data, '').digest == first.digest  # the same network, from the same seed
    assert torch.load(path, weights_only=True)['accuracy'] > 0.5


def test_only_some_of_many_training_images_are_compared(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    detector = detectors.pixels(trainer.judge.data, '')
    train, held_out = detectors.features_of_data(detector, trainer.judge.data, most=200)
    whole, _ = detectors.features_of_data(detector, trainer.judge.data)
    assert len(train) == 200 and len(held_out) == 200 and len(whole) == 1500
    assert (torch.cdist(train, whole).min(1).values == 0).all() and len(train.unique(dim=0)) > 190
    again, _ = detectors.features_of_data(detector, trainer.judge.data, most=200)
    assert torch.equal(train, again)


def test_a_digest_of_weights_sees_one_of_them():
    network = torch.nn.Linear(3, 2)
    before = detectors.digest_of(network)
    assert before == detectors.digest_of(network)
    with torch.no_grad():
        network.weight[1, 2] += 1e-3
    assert detectors.digest_of(network) != before


def test_features_are_kept_for_these_data_and_this_decoder(tiny_config, build_trainer, monkeypatch):
    class Darker(ExampleDiffusionTrainer):
        def decode(self, x0):
            return super().decode(x0) / 2

    trainer, darker = build_trainer(tiny_config()), build_trainer(tiny_config(experiment_name='darker'), Darker)
    detector = detectors.pixels(trainer.judge.data, '')
    plain, dark = (detectors.features_of_data(detector, each.judge.data)[0] for each in (trainer, darker))
    assert torch.allclose(dark + 1, (plain + 1) / 2)
    load = DATASETS['digits'].load

    def other(config):
        (x, label), held_out = load(config)
        return (torch.cat([x[:8], x[8:].flip(3)]), label), held_out

    monkeypatch.setitem(DATASETS, 'other', DataSpec(other, (1, 8, 8), 10, 16))
    trainer = build_trainer(tiny_config(dataset='other', experiment_name='other'))
    found = detectors.features_of_data(detector, trainer.judge.data)[0]
    assert torch.equal(found, detector.features(trainer.train_loader.everything()[0]))


@pytest.mark.slow
def test_the_classifier_knows_the_digits_and_is_trained_once(short_run, capsys):
    trainer = load_run(short_run)
    judged = detectors.classifier(trainer.judge.data, '')
    assert 'training a classifier' in capsys.readouterr().out
    again = detectors.classifier(trainer.judge.data, '')
    assert 'training' not in capsys.readouterr().out and again.digest == judged.digest
    x, label, *_ = trainer.test_loader.everything()
    right = (judged.predict(x) == label).float().mean().item()
    assert right > 0.95 and f'{right:.1%} accuracy on held-out images' in judged.about
    assert judged.features(x).shape == (297, 64)


@pytest.fixture(scope='module')
def stand_in(tmp_path_factory):
    """A file of random weights for the network of torch-fidelity."""
    path = tmp_path_factory.mktemp('weights') / 'inception.pth'
    torch.manual_seed(0)
    made = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    original, torch.load = torch.load, lambda *args, **kwargs: {}
    load, FeatureExtractorInceptionV3.load_state_dict = FeatureExtractorInceptionV3.load_state_dict, lambda *_: None
    try:
        made.__init__('inception-v3-compat', ['2048'], feature_extractor_weights_path='none')
    finally:
        torch.load, FeatureExtractorInceptionV3.load_state_dict = original, load
    torch.save(made.state_dict(), path)
    return path


class Images(torch.utils.data.Dataset):
    """uint8 (3, H, W), as torch-fidelity takes them."""

    def __init__(self, x):
        self.x = (x * 255).round().byte().expand(-1, 3, -1, -1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


@pytest.mark.slow
def test_fid_equals_torch_fidelity(short_run, stand_in):
    """On the same images, with stand-in weights: features and all distances."""
    from torch_fidelity import calculate_metrics

    trainer = load_run(short_run)
    detector = detectors.DETECTORS['inception'](trainer.judge.data, str(stand_in))
    x, *_ = trainer.train_loader.everything()
    a, b = x[:24], x[24:60] ** 0.5
    ours = compare(detector.features(a), detector.features(b), detector.features(b))
    theirs = calculate_metrics(
        input1=Images(a), input2=Images(b), fid=True, kid=True, kid_subset_size=24, cuda=False, verbose=False,
        feature_extractor_weights_path=str(stand_in), batch_size=12, cache=False,
    )  # fmt: skip
    assert ours['frechet'] == pytest.approx(theirs['frechet_inception_distance'], rel=1e-3)
    assert ours['kid'] == pytest.approx(theirs['kernel_inception_distance_mean'], rel=1e-3)
