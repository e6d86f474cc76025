"Workers that really die, drivers that are really killed."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llprobe.execution import WorkerDied, Workers
from llprobe.store import open_store


def square_or_die(x: int) -> int:
    if x < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return x*x


def thread_count(_) -> tuple[int, str]:
    import torch
    return torch.get_num_threads(), os.environ['OMP_NUM_THREADS']


@pytest.mark.parametrize('poison', [(), (3,), (0, 9), (2, 3, 4)])
def test_every_innocent_task_finishes(poison):
    tasks = [-x-1 if x in poison else x for x in range(10)]
    with Workers(2) as workers:
        results = dict(workers.run(square_or_die, tasks))
    assert {t for t, r in results.items() if isinstance(r, WorkerDied)} == {-x-1 for x in poison}
    assert {t: r for t, r in results.items() if t >= 0} == {x: x*x for x in range(10) if x not in poison}


def test_workers_have_one_thread_and_the_driver_keeps_its_environment():
    before = os.environ.get('OMP_NUM_THREADS')
    with Workers(2) as workers:
        assert {r for _, r in workers.run(thread_count, range(4))} == {(1, '1')}
    assert os.environ.get('OMP_NUM_THREADS') == before


WARNING_DRIVER = '''
import warnings
from llprobe.execution import Workers
from llprobe.progress import plain_warning
if __name__ == '__main__':
    for form in (warnings.showwarning, plain_warning):
        warnings.showwarning = form
        with Workers(2) as workers: list(workers.run(warnings.warn, ['a\\nword']*2))
'''


def test_workers_show_warnings_as_their_driver_does(tmp_path):
    (tmp_path/'driver.py').write_text(WARNING_DRIVER)
    said = subprocess.run([sys.executable, tmp_path/'driver.py'], check=True, capture_output=True, text=True).stderr
    first, second = said.split('llprobe: ', 1)
    assert 'UserWarning: a\nword' in first and second.startswith('a word\n') and 'UserWarning: a' not in second


LONG_PATH_DRIVER = '''
from llprobe.execution import Workers, prepare_workers
if __name__ == '__main__':
    with Workers(2) as workers: print(prepare_workers(), sorted(result for _, result in workers.run(abs, [-1, -2, -3])))
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='workers are forked on Linux only')
def test_workers_start_where_no_socket_can_be(tmp_path):
    (tmp_path/'driver.py').write_text(LONG_PATH_DRIVER)
    folder = tmp_path/('x'*100)
    folder.mkdir()
    done = subprocess.run([sys.executable, tmp_path/'driver.py'], env=dict(os.environ, TMPDIR=str(folder)), check=True, capture_output=True, text=True)
    assert done.stdout == 'False [1, 2, 3]\n'


def test_workers_know_what_the_environment_has_become(monkeypatch):
    for value in ('before', 'after'): # the second pool's workers come from the process that began with the first
        monkeypatch.setenv('LLPROBE_TEST', value)
        with Workers(2) as workers:
            assert {r for _, r in workers.run(os.getenv, ['LLPROBE_TEST']*4)} == {value}


DRIVER = '''
import sys, time
sys.path.insert(0, {tests!r})
from llprobe.execution import Workers
import test_execution
if __name__ == '__main__':
    with Workers(2) as workers:
        for task, result in workers.run(test_execution.write_pid_and_sleep, [{folder!r}]*4): pass
'''


def write_pid_and_sleep(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_driver(tmp_path, how):
    script, pids = tmp_path/'driver.py', tmp_path/'pids'
    pids.mkdir()
    script.write_text(DRIVER.format(tests=str(Path(__file__).parent), folder=str(pids)))
    # a shell's background jobs ignore Ctrl-C, and so would their children
    driver = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    _until(lambda: len(list(pids.iterdir())) == 2)
    driver.send_signal(how)
    driver.wait(20)
    _until(lambda: not any(_alive(int(p.name)) for p in pids.iterdir()))


@pytest.mark.skipif(sys.platform != 'linux', reason='no fork server')
def test_a_driver_that_ends_at_once_lets_go_of_its_pipes():
    code = 'from llprobe.execution import prepare_workers; assert prepare_workers("llprobe.study")'
    driver = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert driver.wait(120) == 0
    start = time.monotonic()
    assert driver.stdout.read() == b''
    assert time.monotonic()-start < 1  # what workers need takes longer to import


def _until(condition, seconds: float = 60) -> None:
    end = time.monotonic()+seconds
    while not condition():
        assert time.monotonic() < end, 'waited too long'
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except FileNotFoundError:
        return False


def test_dask_is_an_executor_like_any_other():
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            results = dict(Workers(2, client.get_executor()).run(abs, [-1, -2, -3]))
    assert results == {-1: 1, -2: 2, -3: 3}


def test_a_script_without_a_main_guard_is_told_so_and_nothing_is_recorded(tmp_path):
    script = tmp_path/'script.py'
    script.write_text("from llprobe.study import StudySettings, run_study\n"
                      f"run_study('digits', {str(tmp_path/'out')!r}, settings=StudySettings(levels=(0.1,), n_configs=3), n_workers=2, progress=False)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "put what it does below if __name__ == '__main__':" in done.stderr.splitlines()[-1]
    with open_store(tmp_path/'out'/'study.db') as store:
        assert store.probes('digits') == []
