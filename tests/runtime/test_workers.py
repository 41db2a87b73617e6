"""The number of loader processes. What signals do to them: data_loading/test_loader.py."""

import os

from runtime.workers import cores_per_process


def test_the_cores_of_a_machine_are_shared_by_its_processes(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(6)), raising=False)
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    assert cores_per_process() == 6
    for processes, cores in ((1, 6), (2, 3), (4, 1), (8, 1)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
        assert cores_per_process() == cores
    monkeypatch.delattr(os, 'sched_getaffinity')  # macOS
    monkeypatch.setattr(os, 'cpu_count', lambda: None)
    assert cores_per_process() == 1
