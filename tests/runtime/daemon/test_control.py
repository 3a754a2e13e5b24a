"""The control socket: answers what it is asked, survives whoever asks wrongly, and never waits."""

import json
import os
import socket
import stat
import threading
import time

import pytest

from chatvla_edge.drivers.standins.control import until
from chatvla_edge.runtime.daemon import control, places
from chatvla_edge.runtime.daemon.control import MOST_BYTES, MOST_CLIENTS, Client, ControlError, Server


@pytest.fixture
def served(tmp_path):
    """A server turned by a thread, as the supervisor's loop does; answers with what it was asked."""
    server = Server(tmp_path / "rig.sock")
    over = threading.Event()

    def turn():
        while not over.is_set():
            server.turn(lambda request: {"ok": True, "asked": request})
            time.sleep(0.002)

    thread = threading.Thread(target=turn)
    thread.start()
    yield tmp_path / "rig.sock"
    over.set()
    thread.join()
    server.close()
    assert not (tmp_path / "rig.sock").exists()


def raw(path):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(5)
    connection.connect(str(path))
    return connection


def test_requests_are_answered_in_order(served):
    with Client(served) as client:
        for number in range(50):
            assert client.ask({"act": "status", "number": number})["asked"]["number"] == number


def test_nobody_else_may_connect(served):
    assert stat.S_IMODE(served.stat().st_mode) == 0o600


@pytest.mark.parametrize("line", [b"no json\n", b"[1]\n", b"\xff\xfe\n", b'"text"\n', b"\n"])
def test_what_is_no_object_gets_an_error_and_the_connection_goes_on(served, line):
    with raw(served) as connection:
        connection.sendall(line + b'{"act": "x"}\n')
        lines = connection.makefile("rb")
        refusal = json.loads(lines.readline())
        assert not refusal["ok"]
        assert "expected" in refusal["text"]
        assert json.loads(lines.readline())["asked"] == {"act": "x"}


def test_a_line_without_end_costs_its_client_the_connection_and_nobody_else_theirs(served):
    with raw(served) as connection, Client(served) as other:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(b"x" * (100 * MOST_BYTES))
        assert other.ask({"act": "status"})["ok"]


def test_a_client_that_does_not_read_is_dropped(served):
    with raw(served) as connection, Client(served) as other:
        connection.setblocking(False)
        request = b'{"act": "' + b"y" * 4000 + b'"}\n'
        end = time.monotonic() + 10
        dropped = False
        while not dropped and time.monotonic() < end:
            try:
                connection.send(request)
            except BlockingIOError:
                time.sleep(0.001)
            except OSError:
                dropped = True
        assert dropped
        assert other.ask({"act": "status"})["ok"]


def test_more_clients_than_there_is_room_for_are_turned_away(served):
    first = [Client(served) for _ in range(MOST_CLIENTS)]
    for client in first:
        client.ask({"act": "status"})
    with pytest.raises(ControlError, match="did not answer"):
        control.ask(served, {"act": "status"})
    for client in first:
        client.close()
    assert until(lambda: _answers(served), 5)


def _answers(path):
    try:
        return control.ask(path, {"act": "status"})["ok"]
    except ControlError:
        return False


def test_no_daemon_is_said_with_the_path(tmp_path):
    with pytest.raises(ControlError, match=r"gone\.sock: no daemon answers"):
        control.ask(tmp_path / "gone.sock", {"act": "status"})


# ----------------------------------------------------------------------------------------------------------- places


def test_a_run_is_found_by_its_rig_while_its_supervisor_lives(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATVLA_EDGE_RUN", str(tmp_path))
    run = places.Run("arx", os.getpid(), 7)
    run.write()
    assert places.find("arx") == places.find(None) == run
    assert run.estop == places.Path(f"/proc/{os.getpid()}/fd/7")
    with pytest.raises(places.PlaceError, match="found arx running"):
        places.find("franka")
    run.remove()
    with pytest.raises(places.PlaceError, match="found none running"):
        places.find(None)


def test_what_a_dead_daemon_left_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATVLA_EDGE_RUN", str(tmp_path))
    (tmp_path / "old.json").write_text('{"pid": 99999999, "estop_fd": 3}')
    (tmp_path / "torn.json").write_text('{"pid": 1')
    assert places.runs() == []


def test_two_runs_must_be_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATVLA_EDGE_RUN", str(tmp_path))
    for name in ("a", "b"):
        places.Run(name, os.getpid(), 7).write()
    with pytest.raises(places.PlaceError, match="a, b"):
        places.find(None)
    assert places.find("b").rig == "b"


def test_a_folder_that_others_may_write_to_is_refused(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("CHATVLA_EDGE_RUN", str(tmp_path))
    with pytest.raises(places.PlaceError, match="nobody else may write to"):
        places.folder()
