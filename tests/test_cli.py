"What the command line does with signals."
import signal
import time

import pytest

from llprobe.cli import main


class Connection:
    "Ctrl-C comes while it is cleaned up"
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize('seconds', [0, 30])
def test_ctrl_c_during_a_cleanup_is_not_lost(monkeypatch, capsys, seconds):
    monkeypatch.setattr('llprobe.study.run_study', lambda *args, **options: Connection() and time.sleep(seconds))
    monkeypatch.setattr('llprobe.cli._write_report', lambda *args, **options: None)
    monkeypatch.setattr('llprobe.cli._print_table', lambda *args, **options: None)
    handler, start = signal.signal(signal.SIGINT, signal.default_int_handler), time.monotonic()
    try:
        assert main(['run', '--quiet']) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic()-start < 20 and 'continues' in capsys.readouterr().err
