"""Lists the collectives of training steps in the file that QUIET names (see test_calling.py)."""

import json
import os
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from main import main
from runtime import ranks
from trainer import ExampleDiffusionTrainer

WATCHED = (7, 9)  # nothing is due after step 7; a line of the record is due after step 9, the tenth


class Quiet(ExampleDiffusionTrainer):
    """Lists the calls of collectives, DDP's too, from the start of a watched step to the start of the next."""

    def train_step(self, micro_batches):
        if self.step - 1 in WATCHED:
            self.watch.stop()
            sent = [event.name for event in self.watch.events() if event.name.startswith('c10d::')]
            Path(f'{os.environ["QUIET"]}_{ranks.rank()}_{self.step - 1}').write_text(json.dumps(sent))
        if self.step in WATCHED:
            self.watch = profile(activities=[ProfilerActivity.CPU])
            self.watch.start()
        super().train_step(micro_batches)


if __name__ == '__main__':
    main(trainer_class=Quiet)
