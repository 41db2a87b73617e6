"""Rows that the launchers of several machines write for each other, in torch's TCPStore on machine 0.

A machine writes its row twice a second. The row tells the others that the machine is alive and, in the end, how its
workers ended. So the others wait for a late machine and name it, they notice a machine that vanishes whatever the
workers do, and all end with the same code and cause (`run_outcome`). Rows are JSON: nothing from the network is
unpickled.

When the network is cut, a call of the store blocks as long as the cut lasts, whatever its timeout. So one thread talks
to the store and another one watches.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from launch.machines import Place, address_of, explain, free_port, say, whole_number
from runtime.errors import SettingError

SILENCE = 40  # seconds without a heartbeat after which a machine counts as gone
SOON = 10  # the same, before workers begin and once some have failed
PATIENCE = 20  # seconds for the workers here to end by themselves after another machine's workers have ended
LEAVING = 45  # seconds for torchrun to end workers that save (it gives them 30); then this process ends without it
STUCK = 5  # seconds after which a call of the store is given up, and a new connection is tried
SAY_FIRST, SAY_EVERY = 10, 30  # seconds until the first line that names missing machines; seconds between lines


class Incomplete(Exception):
    """Other machines did not come in time."""


@dataclass(frozen=True)
class End:
    """The end of a machine's workers."""

    code: int | None = None  # their exit code; None: they have not ended
    text: str = ''  # why, if they failed
    order: Sequence[float] = (9, 0.0)  # the failure with the lowest order is the cause


@dataclass(frozen=True)
class Row(End):
    """The row that a machine writes for the others."""

    host: str = '?'
    launcher: str = ''  # tells two starts apart; '': this machine is not here yet
    about: str = ''  # what must be the same on all machines
    first: str = ''  # address of machine 0, as this one knows it
    port: int = 0  # port of torchrun's own store; machine 0 sets it once all are here
    beat: int = 0  # counts up, so that the row changes as long as the machine is alive
    knows: bool = False  # whether it knows how all have ended
    gone: str = ''  # how it was lost; the reader fills this in


def run_outcome(rows: list[Row]) -> tuple[int, int, str]:
    """The end of a run, from the rows of machines that have ended or are gone: its exit code, the machine that is the
    cause, and the reason as text. A lost machine comes before the failures that follow from it."""
    for code, reason in ((2, 'a setting is wrong'), (3, 'the loss is not finite'), (75, 'it was asked to stop')):
        for rank, row in sorted(enumerate(rows), key=lambda pair: not pair[1].text):  # rows with a text first
            if row.code == code:
                return code, rank, f'machine {rank} ({row.host}): {row.text or reason}'
    failed = [((*row.order,), rank, f': {row.text}') for rank, row in enumerate(rows) if row.code]
    failed += [((1.5, 0.0), rank, f' {row.gone}') for rank, row in enumerate(rows) if row.gone]
    _, rank, text = min(failed, default=(0, 0, ''))
    return (1, rank, f'machine {rank} ({rows[rank].host}){text}') if failed else (0, 0, '')


class Meeting:
    """This machine's part in one start of the workers on all machines. Raises SettingError.

    `report_dir`: the folder in which workers look for a file `give_up`. `wait`: seconds, for machines that are late.
    """

    def __init__(self, place: Place, report_dir: Path, wait: int = 600):
        self.place, self.report_dir, self.wait = place, report_dir, wait
        self.rows = self.found = [Row()] * place.machines  # rows of machines that are here; all rows in the store
        self.heard = [time.monotonic()] * place.machines  # when each row last changed
        # why this machine cannot take part; how machine 0 was lost; this machine's address on the way to machine 0
        self.refused = self.lost = self.my_address = ''
        host = socket.gethostname()
        here = '' if place.rank else f'; {host} is machine 0 at {place.first}:{place.port}'
        self.trouble = self.no_word = f'no word from it{here}'  # why another machine is not here
        self.other_starts = 0  # changes of this machine's row by another launcher
        self.running = self.over = False  # whether the workers run; whether this meeting has been closed
        self.port, self.sent, self.server = 0, Row(), None
        address = address_of(place.first) if place.rank else ''
        if place.rank == 0:
            try:
                socket.create_server(('', place.port)).close()  # torch's own message would be two pages
                self.server = TCPStore('127.0.0.1', place.port, None, True, wait_for_workers=False)
                for rank in range(place.machines):
                    self.server.set(f'row{rank}', '{}')
            except OSError as error:
                why = f'machine 0 cannot listen there ({error.strerror}); another run may use it'
                raise SettingError(f'MASTER_PORT={place.port}: {why}. Give all machines another MASTER_PORT.') from None
        about = f'NNODES={place.machines} MAX_RESTARTS={whole_number("MAX_RESTARTS", 0)}'
        self.mine = Row(host=host, launcher=uuid.uuid4().hex, about=about, first=address)
        self.start_talking()
        threading.Thread(target=self.watch, daemon=True).start()

    def gather(self) -> bool:
        """Wait until all machines are here, and print every SAY_EVERY s which are missing. False if one was asked to
        stop meanwhile. Raises SettingError if they cannot run together, Incomplete after `wait` seconds.
        """
        began = time.monotonic()
        say_next = began + SAY_FIRST
        while not self.begun:
            now = time.monotonic()
            if self.refused:
                raise SettingError(self.refused)
            if any(row.code is not None for row in self.rows):
                return False
            if now - began > self.wait:
                raise Incomplete(f'gave up waiting for {self.missing()} after {self.wait} s: {self.trouble}')
            if now > say_next:
                say_next = now + SAY_EVERY
                say(f'waiting for {self.missing()} ({self.trouble}); gives up after {self.wait} s (NODE_WAIT)')
            time.sleep(0.1)
        self.running = all(row.code is None for row in self.rows)
        return self.running

    @property
    def begun(self) -> bool:
        """Whether all machines are here, including this one."""
        return self.rows[0].port > 0 and self.rows[self.place.rank].launcher == self.mine.launcher

    def missing(self) -> str:
        """The machines that are missing, as text."""
        here = self.place
        if not self.rows[0].launcher:
            address = '' if self.mine.first == here.first else f' = {self.mine.first}'
            return f'machine 0 at {here.first}:{here.port}{address}'
        ranks = [str(rank) for rank, row in enumerate(self.rows) if not row.launcher]
        if not ranks:
            return 'machine 0 to begin'
        return f'machine {", ".join(ranks[:8])} of {here.machines} to come to port {here.port} of machine 0'

    def announce_end(self, end: End, wait: float = 0) -> None:
        """Tell the others how the workers here have ended, and wait until the workers of all machines that are here
        have: a last upload of rank 0, for example, may take long. `wait`: seconds for machines that are just coming."""
        self.running, late = False, time.monotonic() + wait
        self.mine = replace(self.mine, **vars(end))
        while not self.lost and any(
            row.code is None and not row.gone and (row.launcher or time.monotonic() < late) for row in self.judged()
        ):
            time.sleep(0.05)

    def judged(self) -> list[Row]:
        """The rows, with `gone` filled in for lost machines, and with the newest row of this machine."""
        rows, now = [*self.rows], time.monotonic()
        rows[self.place.rank] = self.mine
        limit = SOON if not self.begun or any(row.code == 1 for row in rows) else SILENCE
        for rank, row in enumerate(rows):
            silence = int(now - self.heard[rank])
            if row.launcher and row.code is None and rank != self.place.rank and silence >= limit:
                rows[rank] = replace(row, gone=f'has been silent for {silence} s: is it on, and is its network up?')
        if self.lost and rows[0].code is None:
            rows[0] = replace(rows[0], gone=self.lost)
        return rows

    def close(self) -> None:
        """Leave once this machine's last row is written. Machine 0, which has the store, leaves last."""
        self.mine, late = replace(self.mine, knows=True), time.monotonic() + 5
        while not self.lost and time.monotonic() < late:
            rest = [] if self.place.rank else self.judged()
            if self.sent.knows and all(row.knows or row.gone or not row.launcher for row in rest):
                break
            if self.place.rank and not self.rows[0].launcher:
                break
            time.sleep(0.05)
        self.over = True
        self.thread.join(2)
        self.server = None  # closes its port

    def start_talking(self) -> None:
        self.called, self.thread = time.monotonic(), threading.Thread(target=self.keep_exchanging, daemon=True)
        self.thread.start()

    def keep_exchanging(self) -> None:
        store, beat = self.server, 0
        while not self.over and self.thread is threading.current_thread():
            self.called, beat = time.monotonic(), beat + 1
            try:
                store = store or self.connect()
                self.exchange(store, beat)
                self.trouble = self.no_word
            except Exception as error:  # torch's network errors, or any error that a stranger's answer leads to
                store = self.server
                if isinstance(error, OSError):
                    self.trouble = explain(error)
                elif isinstance(error, (TypeError, ValueError)):
                    self.trouble = 'another version of this program runs there'
                if not self.begun:
                    self.rows = [Row()] * self.place.machines
                elif isinstance(error, ConnectionRefusedError):
                    self.lost = 'left'
            time.sleep(0.5)

    def connect(self) -> TCPStore:
        where = self.mine.first, self.place.port
        with socket.create_connection(where, timeout=5) as probe:  # torch would print two pages if nothing listens
            self.my_address = probe.getsockname()[0]
        time.sleep(0.2)  # torch's server may miss a connection that is opened just as another one ends
        self.trouble = 'another program answers there'  # TCPStore waits forever if that is so
        return TCPStore(*where, timeout=timedelta(seconds=STUCK))

    def exchange(self, store: TCPStore, beat: int) -> None:
        """Read all rows, and write this machine's. Raises ConnectionError as long as machine 0 does not accept it."""
        here, now, keys = self.place.rank, time.monotonic(), [f'row{rank}' for rank in range(self.place.machines)]
        mine = replace(self.mine, beat=beat, port=self.port)
        first = mine if here == 0 else Row(**json.loads(store.get('row0')))
        if not first.launcher:
            raise ConnectionError('it is just starting')
        if self.begun and first.launcher != self.rows[0].launcher:
            raise ConnectionRefusedError  # machine 0 was started again
        if not first.port and store.check(['refused']):
            self.refused = store.get('refused').decode()
        elif first.about != mine.about:
            unlike = f'{first.about} on {first.host}, {mine.about} on {mine.host}'
            self.refused = self.lost = f'the machines were not started alike: {unlike}'
            store.set('refused', self.refused)
            return
        found = [first, *(Row(**json.loads(text)) for text in store.multi_get(keys)[1:])]
        is_mine = found[here].launcher in ('', mine.launcher)
        for rank in [rank for rank, row in enumerate(found) if row != self.found[rank]]:
            self.heard[rank] = now
            self.other_starts += rank == here and not is_mine
        self.found = found
        if self.other_starts > 2:
            text = f'NODE_RANK={here} was given on both {found[here].host} and {mine.host}. Number the machines from 0'
            self.refused = self.lost = f'{text}. For a second run on the same machines pass another MASTER_PORT.'
        if not is_mine and (first.port or now - self.heard[here] < SOON):
            raise ConnectionError('an earlier start of this machine has not ended there')
        rows = [row if first.port or now - t < SOON else Row() for row, t in zip(found, self.heard, strict=True)]
        if here == 0 and not self.port and not self.refused and all(row.launcher for row in rows):
            self.port = free_port()
        if self.thread is threading.current_thread():  # else this thread was stuck, and a newer one has taken over
            store.set(keys[here], json.dumps(asdict(mine)))
            self.sent, self.rows = mine, rows

    def watch(self) -> None:
        """End the workers here if another machine's workers have failed or stopped, or if a machine is gone."""
        since = asked = 0.0
        while not self.over:
            time.sleep(0.25)
            now = time.monotonic()
            if now - self.called > (STUCK if self.begun else SILENCE):  # leaves the stuck thread behind
                self.start_talking()
            others = [row for rank, row in enumerate(self.judged()) if rank != self.place.rank]
            gone, codes = any(row.gone for row in others), {row.code for row in others} - {None, 0}
            since = since or (now if gone or codes else 0.0)
            if not self.running or not since:
                continue
            if not asked and (gone or now - since > PATIENCE):
                asked = now
                if gone or codes == {1}:
                    (self.report_dir / 'give_up').touch()
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
            limit = SOON if (self.report_dir / 'give_up').exists() else LEAVING
            if asked and now - asked > limit:  # torchrun would keep waiting for a machine that is gone
                code, _, text = run_outcome(self.judged())
                say(text)
                os._exit(code)
