"The wheel holds the whole package, and works from another folder without the sources."
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def unpacked(tmp_path_factory) -> Path:
    "A wheel built from a copy of the sources, unpacked"
    folder = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob('llprobe-*.whl'))) as wheel:
        wheel.extractall(folder/'site')
    return folder/'site'


def test_the_wheel_holds_every_module_and_nothing_else(unpacked):
    modules = {p.relative_to(unpacked) for p in unpacked.rglob('*.py')}
    assert modules == {p.relative_to(ROOT) for p in (ROOT/'llprobe').rglob('*.py')}
    assert {p.name for p in (unpacked/'llprobe'/'sources').iterdir()} == {p.name for p in (ROOT/'llprobe'/'sources').iterdir()} != set()
    entry_points = next(unpacked.glob('*.dist-info/entry_points.txt')).read_text()
    assert 'llprobe=llprobe.cli:main' in entry_points.replace(' ', '')


def test_it_runs_from_another_folder(unpacked, tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(unpacked))
    code = 'import llprobe; print(llprobe.__file__)'
    where = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert where.startswith(str(unpacked))
    command = [sys.executable, '-m', 'llprobe.cli', 'run', '--levels', '0.2', '--configs', '2', '--epochs', '2', '--jobs', '1', '--quiet']
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'runs'/'study'/'result.json').exists()
    assert (tmp_path/'runs'/'study'/'report'/'assets'/'llprobe.css').exists()  # the wheel holds what the site is made from


def test_a_reader_that_has_seen_enough_is_no_error():
    process = subprocess.Popen([sys.executable, '-m', 'llprobe.cli', 'datasets'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ''
    process.stderr.close()
    assert process.wait() == 1
