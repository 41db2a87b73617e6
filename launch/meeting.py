"""How the launchers of several machines meet, and what they tell each other while their workers run.

Machine 0 listens on MASTER_PORT, and every other machine keeps one connection to it. A machine sends what it knows of
itself when that changes, and a sign of life every second; machine 0 sends everybody the list of what all have said.
What follows from the list each machine decides for itself, by one rule (`verdict`). So a machine that is late is waited
for and named, one that vanishes is missed within SILENCE seconds whatever the workers are doing, and all end with the
same code and the same cause. The messages are lines of JSON: nothing that comes from the network is unpickled.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.machines import Place, address_of

SILENCE = 40  # seconds without a sign of life after which a machine counts as gone
PATIENCE = 20  # seconds that the workers here get to end by themselves, after those of another machine have ended
LEAVING = 45  # seconds for torchrun to end its workers (it gives them 30), before this process ends without it
SAY_FIRST, SAY_EVERY = 10, 30  # seconds until the first line that tells for whom this machine waits; between two
LONGEST = 1 << 20  # bytes of a line


class Refused(Exception):
    """The machines cannot run together; the text says why."""


class Alone(Exception):
    """Other machines did not come in time."""


@dataclass
class Row:
    """What all know of one machine."""

    host: str
    code: int | None = None  # exit code of its workers, once they have ended
    text: str = ''  # why, if they failed
    order: tuple[int, float] = (9, 0.0)  # of several failures the least is the cause
    gone: str = ''  # how it was lost


def verdict(rows: list[Row]) -> tuple[int, int, str]:
    """How the whole run has ended, from the rows of machines that have ended or are gone: its exit code, the machine
    that is the cause, and why, as text."""
    ranked = list(enumerate(rows))
    for said, reason in ((2, 'a setting is wrong'), (3, 'the loss is not finite'), (75, 'it was asked to stop')):
        for rank, row in ranked:
            if row.code == said:
                return said, rank, f'machine {rank} ({row.host}): {row.text or reason}'
    for rank, row in ranked:
        if row.gone:
            return 1, rank, f'machine {rank} ({row.host}) {row.gone}'
    failed = [(row.order, rank) for rank, row in ranked if row.code]
    if not failed:
        return 0, 0, ''
    rank = min(failed)[1]
    return 1, rank, f'machine {rank} ({rows[rank].host}): {rows[rank].text}'


def read_row(message: dict[str, Any]) -> Row:
    return replace(Row(**message), order=tuple(message['order']))  # JSON has lists only


class Wire:
    """A connection that carries lines of JSON, and empty lines as signs of life."""

    def __init__(self, connection: socket.socket):
        self.connection, self.unread, self.heard = connection, b'', time.monotonic()
        connection.settimeout(5)

    def send(self, message: Any = None) -> None:
        """Raises OSError if the other end is gone."""
        self.connection.sendall((json.dumps(message) if message is not None else '').encode() + b'\n')

    def receive(self) -> list[Any]:
        """The messages that have come. Raises OSError if the other end is gone, ValueError for what is no message."""
        data = self.connection.recv(1 << 16)
        if not data or len(self.unread) > LONGEST:
            raise ConnectionError('it left')
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + data).split(b'\n')
        return [json.loads(line) for line in lines if line]

    @property
    def silent(self) -> bool:
        return time.monotonic() - self.heard > SILENCE


@dataclass
class Table:
    """What machine 0 sends to all."""

    rows: list[Row | None]
    port: int = 0  # of torch's store on machine 0; not 0 once all machines have come
    refused: str = ''

    @property
    def settled(self) -> bool:
        return all(row is not None and (row.code is not None or row.gone) for row in self.rows)


@dataclass
class Meeting:
    """This machine's end of it, for one start of the workers. `about`: what must be the same on all machines."""

    place: Place
    about: dict[str, str]
    reports: Path  # the folder in which the workers look for a file `give_up`
    wait: int = 600  # seconds, for machines that are late

    address: str = ''  # of machine 0, as seen from here
    my_address: str = ''  # of this machine, as the other one sees it
    table: Table = field(init=False)
    trouble: str = ''  # why a machine is not there yet

    def __post_init__(self) -> None:
        self.me = Row(socket.gethostname())
        self.table = Table([None] * self.place.machines)
        self.over = False  # nothing more is to be said
        self.lost = False  # machine 0 is gone, and with it all word of the others
        self.watching = False  # the workers run
        self.since: float | None = None  # when this machine learned that another has ended
        self.asked = False  # this process was asked to end its workers for that
        self.listener: socket.socket | None = None
        if self.place.rank == 0:
            self.listener = listen(self.place.port)
        else:
            try:
                self.address = address_of(self.place.first)
            except ValueError as error:
                raise Refused(str(error)) from None
        self.thread = threading.Thread(target=self.talk, daemon=True)
        self.thread.start()

    # ---------------------------------------------------------------- for the launcher

    def gather(self) -> bool:
        """Wait until all machines are here, and say every SAY_EVERY s for whom. False: one was asked to stop meanwhile.

        Raises Refused if they cannot run together, Alone after `wait` seconds, RuntimeError if the thread has failed.
        """
        began = time.monotonic()
        say_next = began + SAY_FIRST
        while not self.table.port:
            table, now = self.table, time.monotonic()
            if table.refused:
                raise Refused(table.refused)
            if any(row is not None and row.code is not None for row in table.rows):
                return False
            if not self.thread.is_alive():
                raise RuntimeError('the thread that talks to the other machines has failed: its error is above')
            if now - began > self.wait:
                raise Alone(f'{self.whom()} did not come in {self.wait} s: {self.trouble or "no word of it"}')
            if now > say_next:
                say_next, why = now + SAY_EVERY, f' ({self.trouble})' if self.trouble else ''
                say(f'waiting for {self.whom()}{why}; it ends after {self.wait} s, see NODE_WAIT')
            time.sleep(0.1)
        self.watching = not any(row is not None and row.code is not None for row in self.table.rows)
        return self.watching

    def whom(self) -> str:
        """The machines that are missing, as text."""
        here, port = self.place, self.place.port
        if here.rank > 0 and self.table.rows[0] is None:
            return f'machine 0 at {here.first}:{port}' + (f' = {self.address}' * (self.address != here.first))
        missing = [str(rank) for rank, row in enumerate(self.table.rows) if row is None and rank != here.rank]
        which = f'machine{"s" * (len(missing) > 1)} {", ".join(missing[:8])}{", ..." * (len(missing) > 8)}'
        return f'{which} of {here.machines} to come to port {port} of machine 0'

    def settle(self, code: int, text: str = '', order: tuple[int, float] = (9, 0.0)) -> tuple[int, int, str]:
        """Tell how the workers here have ended, wait for the others' ends, and return the `verdict` of all.

        It may wait long, for a last upload of rank 0, say, but never for a machine that is gone.
        """
        self.watching = False
        self.me = Row(self.me.host, code, text, order)
        while self.table.port and not self.table.settled and not self.lost and self.thread.is_alive():
            time.sleep(0.05)
        self.close()
        return self.known()

    def known(self) -> tuple[int, int, str]:
        """The `verdict` of what is known by now."""
        rows = [row or Row('?') for row in self.table.rows]
        rows[self.place.rank] = self.me
        return verdict(rows)

    def tell(self, code: int, seconds: float = 0) -> None:
        """Tell the others how it ends here, with the last word. Wait `seconds` at most for those that come just now."""
        self.watching = False
        self.me = Row(self.me.host, code)
        end = time.monotonic() + seconds
        while None in self.table.rows and self.thread.is_alive() and time.monotonic() < end:
            time.sleep(0.05)

    def close(self) -> None:
        """Leave, once what there is to say has been said."""
        self.over = True
        self.thread.join(10)
        if self.listener is not None:
            self.listener.close()

    # ---------------------------------------------------------------- the thread

    def talk(self) -> None:
        (self.host if self.place.rank == 0 else self.visit)()

    def host(self) -> None:
        """Machine 0's part: hear all, tell all."""
        assert self.listener is not None
        wires: dict[Wire, int | None] = {}  # the machine at the other end, once it has said which it is
        rows: list[Row | None] = [None] * self.place.machines
        sent, beat, refused, port = '', 0.0, '', 0
        while True:
            last_round = self.over
            rows[0] = self.me
            ends = {wire.connection: wire for wire in wires}
            for ready in select.select([self.listener, *ends], [], [], 0.1)[0]:
                if ready is self.listener:
                    wires[Wire(self.listener.accept()[0])] = None
                    continue
                wire = ends[ready]
                try:
                    for message in wire.receive():
                        row, rank = read_row(message['row']), int(message['rank'])
                        differs = self.differs(rank, row.host, message['about'], rows)
                        if differs and port:  # a start that is not of this run, which goes on: it alone is refused
                            another = 'A run has begun there. Give another one another MASTER_PORT.'
                            wire.send(asdict(Table([None] * len(rows), refused=f'{differs}\n{another}')))
                            raise ConnectionError('it was refused')
                        refused = refused or differs
                        if refused:
                            continue
                        if not 0 < rank < len(rows):
                            raise ValueError(f'there is no machine {rank}')
                        if message['hello']:
                            for other in [other for other in wires if wires[other] == rank]:
                                wires[other] = None  # the machine came again
                        wires[wire] = rank
                        if message['hello'] and port:
                            raise ConnectionError('was started again')
                        rows[rank] = row
                        self.my_address = wire.connection.getsockname()[0]
                except Exception as error:  # whatever a stranger's line can lead to: RecursionError for '[[[...'
                    self.lose(wires, wire, rows, port, str(error))
            for wire in [wire for wire in wires if wire.silent]:
                self.lose(wires, wire, rows, port, f'has not been heard for {SILENCE} s: is it on, and its network?')
            if not port and not refused and None not in rows:
                port = free_port()
            table = Table(list(rows), port, refused)
            news = json.dumps(asdict(table))
            for wire in list(wires):
                if news != sent or time.monotonic() - beat > 1:
                    try:
                        wire.send(asdict(table) if news != sent else None)
                    except OSError as error:
                        self.lose(wires, wire, rows, port, str(error))
            if news != sent or time.monotonic() - beat > 1:
                sent, beat = news, time.monotonic()
            self.table = table
            self.react()
            if last_round:
                break
        for wire in wires:
            wire.connection.close()

    def differs(self, rank: int, host: str, about: dict[str, str], rows: list[Row | None]) -> str:
        """Why machine `rank` cannot take part, or nothing."""
        before = rows[rank] if 0 <= rank < len(rows) else None
        if before is not None and before.host != host:
            return f'NODE_RANK={rank} was given on both {before.host} and {host}. Number the machines from 0.'
        lines = [
            f'  {name}: {self.about.get(name)!r} on machine 0 ({self.me.host}), {about.get(name)!r} on {rank} ({host})'
            for name in {**self.about, **about}
            if self.about.get(name) != about.get(name)
        ]
        return '\n'.join(['the machines were not started alike. Give all of them the same:', *lines]) if lines else ''

    def lose(self, wires: dict[Wire, int | None], wire: Wire, rows: list[Row | None], begun: int, how: str) -> None:
        """A connection is lost, and with it a machine, unless that has said how its workers ended."""
        rank = wires.pop(wire)
        wire.connection.close()
        row = None if rank is None else rows[rank]
        if rank is None or row is None:
            return
        if not begun and row.code is None:
            rows[rank] = None  # it may come again
        elif row.code is None:
            rows[rank] = Row(row.host, gone=row.gone or how)

    def visit(self) -> None:
        """Another machine's part: come to machine 0, tell it of this one, hear of all."""
        wire: Wire | None = None
        sent, beat = '', 0.0
        while True:
            last_round = self.over
            if wire is None:
                try:
                    wire = Wire(socket.create_connection((self.address, self.place.port), timeout=5))
                    self.my_address, sent, beat = wire.connection.getsockname()[0], '', time.monotonic()
                    self.trouble = 'it was reached, and has not answered yet'
                except OSError as error:
                    self.trouble = hint(error)
            try:
                if wire is not None:
                    news = json.dumps(asdict(self.me))
                    if news != sent:
                        wire.send(dict(rank=self.place.rank, row=asdict(self.me), about=self.about, hello=not sent))
                        sent = news
                    elif time.monotonic() - beat > 1:
                        wire.send()
                        beat = time.monotonic()
                    if select.select([wire.connection], [], [], 0.1)[0]:
                        for message in wire.receive():
                            rows = [row and read_row(row) for row in message['rows']]
                            self.table, self.trouble = Table(rows, message['port'], message['refused']), ''
                    if wire.silent:
                        raise ConnectionError(f'has not been heard for {SILENCE} s: is it on, and its network?')
            except Exception as error:  # see `host`
                assert wire is not None, 'it is what failed'
                wire.connection.close()
                wire, first = None, self.table.rows[0]
                if self.table.port or self.table.refused:
                    if first is not None and first.code is None:
                        first.gone = f'{error}' if 'heard' in f'{error}' else 'left'
                    self.lost = True
                    break
                strange = not isinstance(error, OSError)
                self.trouble = 'what answers there is no run of this program' if strange else 'it was there, and left'
                self.table = Table([None] * self.place.machines)
            self.react()
            if last_round:
                break
            if wire is None:
                time.sleep(1)
        while not self.over:
            self.react()
            time.sleep(0.1)
        if wire is not None:
            wire.connection.close()

    def react(self) -> None:
        """End the workers here if those of another machine have failed or stopped, or the machine is gone."""
        others = [row for rank, row in enumerate(self.table.rows) if row is not None and rank != self.place.rank]
        gone = any(row.gone for row in others)
        codes = {row.code for row in others} - {None, 0}
        if not self.watching or not (gone or codes):
            return
        now = time.monotonic()
        self.since = self.since or now
        if not self.asked and (gone or now - self.since > PATIENCE):
            self.asked, self.since = True, now
            if gone or codes == {1}:
                (self.reports / 'give_up').touch()
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        if self.asked and now - self.since > LEAVING:  # torchrun itself waits for a machine that is gone
            code, _, text = verdict([row or Row('?') for row in self.table.rows])
            say(text)
            os._exit(code)


def listen(port: int) -> socket.socket:
    """Raises Refused if the port is taken."""
    try:
        return socket.create_server(('', port), backlog=1024)
    except OSError as error:
        raise Refused(
            f'MASTER_PORT={port}: machine 0 cannot listen there ({error.strerror}); another run may use it. '
            'Give all machines another MASTER_PORT.'
        ) from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('', 0))
        return probe.getsockname()[1]


def hint(error: OSError) -> str:
    """What a failed connection most likely means."""
    if isinstance(error, ConnectionRefusedError):
        return 'nothing listens there: it is not started yet, or has another MASTER_PORT, or is not machine 0'
    if isinstance(error, TimeoutError):
        return 'no answer: the machine is off, or a firewall keeps the port closed'
    return str(error)


def say(text: str) -> None:
    print(f'run.sh: {text}', file=sys.stderr, flush=True)
