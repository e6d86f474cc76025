"The main job from outside: same answer twice, killed and resumed, two drivers, bad input, another folder."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sqlalchemy import create_engine, text

from llprobe.checkpoint import load_checkpoint
from llprobe.core import InputError
from llprobe.probe import ProbeSettings
from llprobe.space import SearchSpace
from llprobe.store import open_store
from llprobe.study import StudySettings, run_study
from llprobe.training import TrainSettings

LLPROBE = [sys.executable, '-m', 'llprobe.cli']
STUDY = ['--dataset', 'digits', '--levels', '0.1', '0.2', '--configs', '8', '--epochs', '4', '--seed', '0', '--quiet']
DETERMINISTIC = ('best_config', 'best_config_id', 'predicted', 'predictions', 'settings')


def run(out: Path, *more: str, arguments=STUDY) -> subprocess.CompletedProcess:
    return subprocess.run([*LLPROBE, 'run', *arguments, '--out', str(out), *more], capture_output=True, text=True)


def result(out: Path) -> dict:
    values = json.loads((out/'result.json').read_text())
    return {key: values[key] for key in DETERMINISTIC} | {'reached': values['reached']}


def finished(out: Path) -> dict[int, str]:
    "The probes committed by now, and when"
    if not (out/'study.db').exists():
        return {}
    engine = create_engine(f'sqlite:///{out/"study.db"}')
    try:
        with engine.connect() as connection:
            return {row.id: row.finished_at for row in connection.execute(text('select id, finished_at from probe'))}
    except Exception:  # the driver has not made the table yet
        return {}
    finally:
        engine.dispose()


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('study')/'uninterrupted'
    done = run(out, '--jobs', '2')
    assert done.returncode == 0, done.stderr
    return out


def test_what_a_run_leaves_behind(uninterrupted):
    values = json.loads((uninterrupted/'result.json').read_text())
    assert {'dataset', 'levels', 'seed', 'best_config', 'predicted', 'reached', 'predictions', 'cost', 'versions'} <= values.keys()
    assert len(values['predictions']) == 8
    assert values['reached']['test_accuracy'] > 0.5
    parts = values['cost']['fte']
    assert parts['total'] == pytest.approx(parts['probe']+parts['final']+parts['metamodel'])
    assert parts['probe'] > 8*0.1+4*0.2  # the trainings, and validation and perturbation on top
    assert (uninterrupted/'report.html').stat().st_size > 10_000
    assert (uninterrupted/'figures'/'levels.png').exists()


def test_one_worker_gives_the_same_predictions_as_two(uninterrupted, tmp_path):
    assert run(tmp_path/'serial', '--jobs', '1').returncode == 0
    one, two = result(tmp_path/'serial'), result(uninterrupted)
    for key in DETERMINISTIC:
        assert one[key] == two[key], key
    assert one['reached']['val_accuracy'] == pytest.approx(two['reached']['val_accuracy'], abs=0.02)  # threads add in another order


@pytest.mark.parametrize('kill_after', [1, 9])
def test_killed_and_resumed_is_as_uninterrupted(uninterrupted, tmp_path, kill_after):
    out = tmp_path/'killed'
    driver = subprocess.Popen([*LLPROBE, 'run', *STUDY, '--out', str(out), '--jobs', '2'], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic()+120
    while len(finished(out)) < kill_after and driver.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = finished(out)
    assert len(before) >= kill_after
    again = run(out, '--jobs', '2')
    assert again.returncode == 0, again.stderr
    after = finished(out)
    assert {i: after[i] for i in before} == before, 'a finished probe was done again'
    assert len(after) == 8+4+1
    assert result(out) == result(uninterrupted)


def test_a_full_training_killed_half_way_goes_on_from_its_last_epoch(tmp_path):
    short = ['--dataset', 'digits', '--levels', '0.1', '--configs', '2', '--epochs', '20', '--seed', '0', '--quiet', '--jobs', '1']
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    assert run(whole, arguments=short).returncode == 0
    assert not (whole/'full-training.safetensors').exists()  # it has done its work
    driver = subprocess.Popen([*LLPROBE, 'run', *short, '--out', str(killed)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoint, end = killed/'full-training.safetensors', time.monotonic()+120
    while not checkpoint.exists() and driver.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, before = load_checkpoint(checkpoint)
    assert 1 <= before['epoch'] < 20 and len(finished(killed)) == 2
    assert run(killed, arguments=short).returncode == 0
    with open_store(killed/'study.db') as store:
        curve = [record for record in store.probes('digits') if record['purpose'] == 'final'][0]['curve']
    assert [row['seconds'] for row in curve[:before['epoch']]] == [row['seconds'] for row in before['curve']], 'an epoch was done again'
    assert len(curve) == 20 and result(killed) == result(whole)


def test_ctrl_c_stops_cleanly_and_the_command_says_how_to_go_on(tmp_path):
    out = tmp_path/'stopped'
    driver = subprocess.Popen([*LLPROBE, 'run', *STUDY, '--out', str(out), '--jobs', '2'], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while len(finished(out)) < 2 and driver.poll() is None:
        time.sleep(0.02)
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 130 and 'continues' in errors and 'Traceback' not in errors
    assert run(out, '--jobs', '2').returncode == 0


def test_a_second_driver_is_told_who_drives_or_waits(tmp_path):
    out = tmp_path/'busy'
    out.mkdir()
    with open_store(out/'study.db') as store:
        with store.lock('digits'):  # this process is the first driver
            second = run(out, '--jobs', '1')
            assert second.returncode == 2 and str(os.getpid()) in second.stderr and 'Traceback' not in second.stderr
            waiting = subprocess.Popen([*LLPROBE, 'run', *STUDY, '--out', str(out), '--jobs', '1', '--wait'], stdout=subprocess.DEVNULL)
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(8)
            assert not finished(out)
        assert waiting.wait(300) == 0
    assert len(finished(out)) == 8+4+1


@pytest.fixture
def images(tmp_path) -> Path:
    "A small data set in folders: bright and dark noise"
    rng, root = np.random.default_rng(0), tmp_path/'images'
    for name, mean in (('dark', 60), ('bright', 190)):
        (root/name).mkdir(parents=True)
        for i in range(60):
            Image.fromarray(rng.normal(mean, 40, (12, 12, 3)).clip(0, 255).astype(np.uint8)).save(root/name/f'{i}.png')
    return root


def test_a_folder_of_images_runs_end_to_end(images, tmp_path):
    arguments = ['--dataset', str(images), '--levels', '0.2', '0.5', '--configs', '4', '--epochs', '3', '--quiet', '--jobs', '1']
    done = run(tmp_path/'out', arguments=arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path/'out'/'result.json').read_text())['reached']['test_accuracy'] > 0.8


SPACE = 'architecture: simple_cnn\nhyperparameters:\n  optimizer: [sgd, lion]\n  learning_rate: {low: 0.001, high: 1, log: true}\n'


def bad_input(case: str, tmp_path: Path, images: Path) -> tuple[list[str], str]:
    "Arguments that cannot work, and a word of the sentence that says so"
    if case == 'empty folder':
        (tmp_path/'empty').mkdir()
        return ['--dataset', str(tmp_path/'empty')], 'empty'
    if case == 'truncated image':
        broken = images/'dark'/'7.png'
        broken.write_bytes(broken.read_bytes()[:60])
        return ['--dataset', str(images)], '7.png'
    if case == 'one class':
        shutil.rmtree(images/'dark')
        return ['--dataset', str(images)], 'class'
    if case == 'unknown optimizer':
        (tmp_path/'space.yaml').write_text(SPACE)
        return ['--space', str(tmp_path/'space.yaml')], 'lion'
    if case == 'missing space file':
        return ['--space', str(tmp_path/'nowhere.yaml')], 'nowhere.yaml'
    return {'level above one': (['--levels', '1.5'], '1.5'), 'level zero': (['--levels', '0'], '0'), 'no such data': (['--dataset', 'nope'], 'nope'),
            'tiny level': (['--levels', '0.001'], 'level'), 'one config': (['--configs', '1'], '2 configs'), 'no epoch': (['--epochs', '0'], 'epochs'),
            'no such architecture': (['--architecture', 'vgg'], 'vgg'), 'no such design': (['--design', 'spiral'], 'spiral'),
            'no such strategy': (['--strategy', 'best'], 'best'), 'no such device': (['--device', 'tpu'], 'tpu'), 'no jobs': (['--jobs', '0'], 'jobs'),
            'promote none': (['--promote', '0'], 'promote')}[case]


@pytest.mark.parametrize('case', ['level above one', 'level zero', 'no such data', 'tiny level', 'one config', 'no epoch', 'no such architecture', 'no such design',
                                  'no such strategy', 'no such device', 'no jobs', 'promote none', 'empty folder', 'truncated image', 'one class', 'unknown optimizer', 'missing space file'])
def test_bad_input_costs_one_sentence_and_exit_code_2(case, tmp_path, images, monkeypatch, capsys):
    from llprobe.cli import main
    monkeypatch.setenv('LLPROBE_CACHE', str(tmp_path/'cache'))
    arguments, word = bad_input(case, tmp_path, images)
    assert main(['run', '--quiet', '--out', str(tmp_path/'out'), *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert word in message and len(message.splitlines()) == 1, message


@pytest.mark.parametrize('below', ['', 'new/study'])
def test_a_read_only_folder_is_refused_even_to_root(tmp_path, capsys, below):
    from llprobe.cli import main
    read_only = tmp_path/'read-only'
    read_only.mkdir(mode=0o555)
    assert main(['run', '--quiet', '--out', str(read_only/below)]) == 2
    message = capsys.readouterr().err
    assert 'cannot be written' in message and 'read-only' in message and list(read_only.iterdir()) == []


def test_a_place_where_no_folder_can_be(tmp_path, capsys):
    from llprobe.cli import main
    (tmp_path/'file').touch()
    assert main(['run', '--quiet', '--out', str(tmp_path/'file'/'study')]) == 2
    assert 'cannot be written' in capsys.readouterr().err


class FailsInTraining(torch.nn.Linear):
    "Evaluates but cannot be trained with some widths"

    def forward(self, x):
        if self.training and self.width >= self.limit:
            raise RuntimeError('no such\nlayer')
        return super().forward(x.flatten(1))


def sometimes_broken(config, input_shape, n_classes):
    model = FailsInTraining(64, n_classes)
    model.width, model.limit = config['width'], 3
    return model


def always_broken(config, input_shape, n_classes):
    model = sometimes_broken(config, input_shape, n_classes)
    model.limit = 0
    return model


def study_with(architecture, out: Path) -> dict:
    space = SearchSpace.from_dict(dict(architecture='mlp', hyperparameters=dict(width=[1, 2, 3, 4], learning_rate=dict(low=0.01, high=1.0, log=True))))
    probe = ProbeSettings(architecture=architecture, train=TrainSettings(n_epochs=3))
    return run_study('digits', out, space, StudySettings(levels=(0.1, 0.2), n_configs=8, probe=probe), n_workers=1, progress=False)


def test_a_model_that_raises_is_a_recorded_crash_and_is_never_chosen(tmp_path):
    values = study_with(sometimes_broken, tmp_path/'out')
    by_width = {True: set(), False: set()}
    for p in values['predictions']:
        by_width[p['config']['width'] >= 3].add(p['status'])
    assert by_width == {True: {'crashed'}, False: {'ok'}}
    assert values['best_config']['width'] < 3 and values['status'] == 'ok'
    with open_store(tmp_path/'out'/'study.db', read_only=True) as store:
        assert {r['error'] for r in store.probes('digits') if r['status'] == 'crashed'} == {'RuntimeError: no such'}


def test_when_every_probe_crashes_the_study_stops_and_says_why(tmp_path):
    with pytest.raises(InputError, match='all 8 probes at level 0.1 crashed.*no such'):
        study_with(always_broken, tmp_path/'out')


@pytest.mark.parametrize('dataset', ['wine', 'breast_cancer'])
def test_tabular_data_runs_end_to_end(dataset, tmp_path):
    arguments = ['--dataset', dataset, '--levels', '0.3', '0.6', '--configs', '4', '--epochs', '10', '--quiet', '--jobs', '1']
    done = run(tmp_path/'out', arguments=arguments)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path/'out'/'result.json').read_text())
    assert values['architecture'] == 'mlp' and values['reached']['test_accuracy'] > 0.8


def test_settings_that_differ_are_named(uninterrupted, capsys):
    from llprobe.cli import main
    assert main(['run', *STUDY, '--epochs', '5', '--out', str(uninterrupted)]) == 2
    message = capsys.readouterr().err
    assert 'n_epochs' in message and '4' in message and '5' in message
