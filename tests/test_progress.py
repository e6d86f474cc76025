"Bars where they are seen: a real terminal, a redirected process, a notebook under papermill, a notebook in JupyterLab."
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import llprobe, serving_lab
from nbformat.v4 import new_code_cell, new_notebook

LOOP = '''
import time
from llprobe.progress import progress_bar
with progress_bar('level 0.1', 20, 'probes', interval=0.5) as bar:
    for i in range(20):
        time.sleep({seconds})
        bar.show(i+1, f'best {{(i+1)/40:.1%}}')
'''
LINE = r'level 0\.1, \d+/20 probes, \d+%, best \d+\.\d%, \d+\.\d s so far, about \d s left'
LAST = r'level 0\.1, 20/20 probes, 100%, best 50\.0%, took \d+\.\d s'
STUDY = ['run', '--dataset', 'digits', '--architecture', 'mlp', '--levels', '0.1', '0.2', '--configs', '4', '--epochs', '2', '--jobs', '1']


def in_terminal(command: list, interrupt: bytes = b'', environment: dict = os.environ) -> str:
    "What a process writes to a terminal of its own; Ctrl-C once it wrote `interrupt`"
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.execve(sys.executable, [sys.executable, *command], dict(environment, TERM='xterm', COLUMNS='100'))
    seen = b''
    while True:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # the process has ended
            break
        if interrupt and interrupt in seen:
            os.write(terminal, b'\x03')
            interrupt = b''
    os.waitpid(pid, 0)
    os.close(terminal)
    return seen.decode()


def screen(text: str) -> list[str]:
    "The lines that stay on a screen: a carriage return begins a line anew"
    return [line.rstrip('\r').split('\r')[-1] for line in text.replace('\x1b[A', '').split('\n')]


def test_a_terminal_has_one_live_line():
    text = in_terminal(['-c', LOOP.format(seconds=0.15)])
    assert text.count('\n') == 1 and text.endswith('\n')
    assert text.count('\r') > 10
    assert re.search(r'level 0\.1, 20/20 probes 100%\|█+\| best 50\.0% \[00:0\d<00:00\]', screen(text)[0])


def test_a_log_has_whole_lines_now_and_then():
    done = subprocess.run([sys.executable, '-c', LOOP.format(seconds=0.15)], capture_output=True, text=True, check=True)
    *lines, last = done.stderr.splitlines()
    assert done.stdout == '' and done.stderr.endswith('\n') and '\r' not in done.stderr
    assert 3 <= len(lines) <= 6  # one every 0.5 s of 3 s
    assert all(re.fullmatch(LINE, line) for line in lines) and re.fullmatch(LAST, last)


def test_a_dumb_terminal_is_a_log():
    text = in_terminal(['-c', f'import os; os.environ["TERM"] = "dumb"\n{LOOP.format(seconds=0.01)}'])
    assert re.fullmatch(LAST, text.strip())


def test_an_interrupted_bar_leaves_no_half_line():
    text = in_terminal(['-c', LOOP.format(seconds=0.15)], b' 3/20')
    bar = next(line for line in screen(text) if 'probes' in line)
    assert 'Traceback' not in bar and not bar.startswith(' 3/20')
    process = subprocess.Popen([sys.executable, '-c', LOOP.format(seconds=0.15)], stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    line = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    stopped = process.communicate()[1].splitlines()[0]
    assert re.fullmatch(LINE+'\n', line)
    assert re.fullmatch(r'level 0\.1, \d+/20 probes, \d+%, best .*, stopped after \d\.\d s', stopped)


def executed(tmp_path: Path, source: str) -> list[dict]:
    "The outputs of a notebook with one cell that papermill ran"
    notebook = new_notebook(cells=[new_code_cell(source)], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    nbformat.write(notebook, tmp_path/'in.ipynb')
    papermill.execute_notebook(tmp_path/'in.ipynb', tmp_path/'out.ipynb', progress_bar=False)
    written = nbformat.read(tmp_path/'out.ipynb', 4)
    assert 'widgets' not in written.metadata
    return written.cells[0].outputs


def test_papermill_gets_whole_lines(tmp_path):
    outputs = executed(tmp_path, 'import ipywidgets\n'+LOOP.format(seconds=0.15))
    assert {(o.output_type, o.name) for o in outputs} == {('stream', 'stdout')}
    *lines, last = ''.join(o.text for o in outputs).splitlines()
    assert 3 <= len(lines) <= 6 and all(re.fullmatch(LINE, line) for line in lines) and re.fullmatch(LAST, last)


def test_a_study_says_what_it_found_and_what_it_cost(tmp_path):
    done = llprobe(*STUDY, '--out', tmp_path/'log')
    assert done.returncode == 0, done.stderr
    begins, said, *between, probes, final = done.stderr.splitlines()
    assert re.match('begins with what others have shown: cifar10-10k of batch_size, .*; mnist5k of batch_size', begins)
    assert all(re.match(r'level 0\.[12], probes [1-5]/6 \(', line) for line in between)  # one every ten seconds: on a slow machine only
    cost = float(re.fullmatch(r'level 0\.2, probes 6/6 \(([\d.]+) of \1 FTE\), 100%, best [\d.]+%, took .* s', probes)[1])
    assert cost > 4*0.1+2*0.2
    assert float(re.match(r'expected cost: ([\d.]+) full trainings, more than the 4 of', said)[1]) == pytest.approx(cost+1, rel=0.1)
    assert re.fullmatch(r'full training, 2/2 epochs, 100%, validation [\d.]+%, [\d.]+ FTE, took .* s', final)


def test_a_study_in_80_columns_says_that_workers_start_then_the_best_and_the_time_left(tmp_path):
    text = in_terminal(['-m', 'llprobe.cli', *STUDY, '--jobs', '2', '--out', str(tmp_path/'terminal')])
    bars = [line for line in screen(text) if '%|' in line]
    assert len(bars) == 2 and re.search(r'probes 6/6 \(.* FTE\) 100%\|', bars[0]) and '2/2 epochs 100%|' in bars[1]
    frames = [frame for frame in re.split('[\r\n]', text) if 'probes ' in frame and '%|' in frame]
    assert any(re.search(r'level 0\.1, probes 0/6 .*workers start \[00:0\d<\?\]$', frame) for frame in frames)
    begun = [frame for frame in frames if '█' in frame]  # how many depends on the machine
    assert len(begun) > 1 and all(re.search(r'█.*\| best [\d.]+% \[[\d:]+<[\d:]+\]$', frame) for frame in begun)


CELL = LOOP.format(seconds=0.05)+'print("do"+"ne")'


@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab that serves a notebook of one cell"
    notebook = new_notebook(cells=[new_code_cell(CELL)], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    nbformat.write(notebook, tmp_path/'bar.ipynb')
    with serving_lab(tmp_path) as url:
        yield f'{url}/lab/tree/bar.ipynb?reset'


@pytest.mark.browser
def test_a_person_in_jupyterlab_sees_the_widget(lab, driver):
    from selenium.webdriver import ActionChains
    def until(function):
        end = time.monotonic()+60
        while not (found := function()) and time.monotonic() < end:
            time.sleep(0.3)
        return found
    def texts(selector):
        return [element.text for element in driver.find_elements('css selector', selector)]
    driver.get(lab)
    assert until(lambda: '| Idle' in ' '.join(texts('body')))
    driver.find_element('css selector', '.jp-Notebook .cm-content').click()
    ActionChains(driver).key_down('\ue008').send_keys('\ue007').key_up('\ue008').perform()  # Shift and Enter
    assert until(lambda: 'done' in texts('.jp-OutputArea-output'))
    [bar] = texts('.jp-OutputArea-output .widget-hbox')
    assert len(driver.find_elements('css selector', '.jp-OutputArea-output .progress-bar')) == 1
    assert re.match(r'level 0\.1, 20/20 probes 100%\s+best 50\.0% \[00:0\d<00:00\]', bar.replace('\u2007', ' '))
    assert len(texts('.jp-OutputArea-output')) == 2  # the widget, and what was printed
