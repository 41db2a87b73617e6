"""What the processes send each other in one step of training; QUIET names the file for it (see test_calling.py)."""

import json
import os
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from main import main
from runtime import ranks
from trainer import ExampleDiffusionTrainer

WATCHED = int(os.environ.get('WATCHED', 7))


class Quiet(ExampleDiffusionTrainer):
    """Counts the calls of collectives, DDP's own too, from the begin of the watched step to the begin of the next."""

    def train_step(self, micro_batches):
        if self.step == WATCHED:
            self.watch = profile(activities=[ProfilerActivity.CPU])
            self.watch.start()
        if self.step == WATCHED + 1:
            self.watch.stop()
            sent = [event.name for event in self.watch.events() if event.name.startswith('c10d::')]
            Path(f'{os.environ["QUIET"]}_{ranks.rank()}').write_text(json.dumps(sent))
        super().train_step(micro_batches)


if __name__ == '__main__':
    main(trainer_class=Quiet)
