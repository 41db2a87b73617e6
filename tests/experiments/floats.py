"""Float fields of any range as data, scaled only by encode and decode."""

from data_utils import DATASETS, DataSpec, load_digits
from main import main
from trainer import ExampleDiffusionTrainer


def load_fields(config):
    return tuple((100 + 40 * images.float(), labels) for images, labels in load_digits(config))


DATASETS['fields'] = DataSpec(load_fields, num_classes=10, scale='float', flip_keeps_label=False)


class Fields(ExampleDiffusionTrainer):
    def encode(self, x):
        return (x - 400) / 300

    def decode(self, x0):
        return 300 * x0 + 400


class Raw(ExampleDiffusionTrainer):
    """Without encode: the first batch gives a warning."""


if __name__ == '__main__':
    import sys

    main(trainer_class=Raw if '--experiment_name' in sys.argv and 'raw' in sys.argv else Fields)
