"The main job from outside: same answer twice, killed and resumed, two drivers, bad input, another folder."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from PIL import Image
from sklearn.datasets import load_wine
from sqlalchemy import create_engine, text

from conftest import Command, llprobe
from llprobe.batches import evaluate, task_loss
from llprobe.checkpoint import load_checkpoint
from llprobe.core import InputError
from llprobe.data import Dataset, from_arrays, load_dataset, save_dataset, split_dataset
from llprobe.predictor import load_predictor
from llprobe.probe import ProbeSettings
from llprobe.reader import read_study
from llprobe.results import summary_rows
from llprobe.space import SearchSpace
from llprobe.store import open_store
from llprobe.study import StudySettings, _threads, open_study, run_study
from llprobe.training import TrainSettings, network_samples

LLPROBE = [sys.executable, '-m', 'llprobe.cli']
STUDY = ['--dataset', 'digits', '--architecture', 'mlp', '--levels', '0.1', '0.2', '--configs', '8', '--epochs', '4', '--seed', '0', '--quiet']
DIABETES = ['--dataset', 'diabetes', '--levels', '0.2', '0.5', '--configs', '6', '--epochs', '10', '--seed', '0', '--quiet']
DETERMINISTIC = ('best_config', 'best_config_id', 'predicted', 'predictions', 'settings')


def run(out: Path, *more: str, arguments=STUDY) -> Command:
    return llprobe('run', *arguments, '--out', out, *more)


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


def records(out: Path) -> dict[tuple, dict]:
    "The probes by what identifies them, without their seconds"
    with open_store(out/'study.db', create=False, read_only=True) as store:
        (name,) = store.studies()['name']
        probes = store.probes(name)
    return {(r['config_id'], r['level'], r['purpose']): r | dict(seconds=0, curve=[row | dict(seconds=0) for row in r['curve']]) for r in probes}


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('study')/'uninterrupted'
    done = subprocess.run([*LLPROBE, 'run', *STUDY, '--out', str(out), '--jobs', '2'], capture_output=True, text=True)
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
    assert (uninterrupted/'report'/'index.html').exists()
    assert (uninterrupted/'figures'/'levels.png').exists()


def test_the_wall_clock_counts_report_and_figures(uninterrupted, monkeypatch, capsys):
    from llprobe import cli
    now = [0.0]
    def write_report(out, details):
        now[0] += 100
        return out/'report'/'index.html'
    monkeypatch.setattr(cli, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(cli, '_write_report', write_report)
    assert cli.main(['run', *STUDY, '--out', str(uninterrupted), '--jobs', '1']) == 0
    assert re.search(r'^wall clock +100\.0 s$', capsys.readouterr().out, re.MULTILINE)


def test_one_worker_gives_the_same_predictions_as_two(uninterrupted, tmp_path):
    assert run(tmp_path/'serial', '--jobs', '1').returncode == 0
    one, two = result(tmp_path/'serial'), result(uninterrupted)
    for key in DETERMINISTIC:
        assert one[key] == two[key], key
    assert one['reached']['val_accuracy'] == pytest.approx(two['reached']['val_accuracy'], abs=0.02)  # threads add in another order


@pytest.mark.parametrize('kill_after', [1, 9])
def test_killed_and_resumed_is_as_uninterrupted(uninterrupted, tmp_path, kill_after):
    out = tmp_path/'killed'
    driver = Command('run', *STUDY, '--out', out, '--jobs', '2')
    end = time.monotonic()+120
    while len(finished(out)) < kill_after and driver.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = finished(out)
    assert len(before) >= kill_after
    again = run(out, '--jobs', '2') # the full training has as many threads as there are jobs
    assert again.returncode == 0, again.stderr
    after = finished(out)
    assert {i: after[i] for i in before} == before, 'a finished probe was done again'
    assert len(after) == 8+4+1
    assert result(out) == result(uninterrupted)


def test_a_search_with_pauses_killed_thrice_is_as_uninterrupted(tmp_path):
    within = ['--dataset', 'digits', '--architecture', 'mlp', '--levels', '0.1', '0.3', '--budget', '4', '--full', '2', '--epochs', '4', '--quiet']
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    assert run(whole, '--jobs', '1', arguments=within).returncode == 0
    n_probes = sum(purpose == 'probe' for _, _, purpose in records(whole))
    for kill_after in (3, 12, n_probes+1):  # the last time beside a full training that has ended
        driver = Command('run', *within, '--out', killed, '--jobs', '2')
        end = time.monotonic()+120
        while len(finished(killed)) < kill_after and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert kill_after <= len(finished(killed)) and not (killed/'result.json').exists()
        assert list((killed/('full-trainings' if kill_after > n_probes else 'paused')).glob('*.safetensors'))
    assert run(killed, '--jobs', '1', arguments=within).returncode == 0
    assert records(killed) == records(whole) and {r['status'] for r in records(whole).values()} >= {'ok', 'paused'}
    assert result(killed) == result(whole) and not (killed/'paused').exists() and not (killed/'full-trainings').exists()


def test_a_full_training_killed_half_way_goes_on_from_its_last_epoch(tmp_path):
    short = ['--dataset', 'digits', '--levels', '0.1', '--configs', '2', '--epochs', '20', '--seed', '0', '--quiet', '--jobs', '1']
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    assert run(whole, arguments=short).returncode == 0
    assert not (whole/'full-trainings').exists()  # it has done its work
    driver = Command('run', *short, '--out', killed)
    end = time.monotonic()+120
    while not (found := list((killed/'full-trainings').glob('[!.]*.safetensors'))) and driver.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, before = load_checkpoint(found[0])
    assert 1 <= before['epoch'] < 20 and len(finished(killed)) == 2
    assert run(killed, arguments=short).returncode == 0
    with open_store(killed/'study.db') as store:
        curve = [record for record in store.probes('digits') if record['purpose'] == 'final'][0]['curve']
    assert [row['seconds'] for row in curve[:before['epoch']]] == [row['seconds'] for row in before['curve']], 'an epoch was done again'
    assert len(curve) == 20 and result(killed) == result(whole)


def test_a_hyperparameter_that_nothing_reads_is_named(tmp_path):
    space = SearchSpace('simple_cnn', dict(num_channels=8, learning_rte=dict(low=1e-3, high=0.1)))
    with pytest.raises(InputError, match=r"'learning_rte' is read neither by simple_cnn nor by training \(did you mean learning_rate\?\): choose from num_channels, dropout, optimizer, learning_rate"):
        run_study('digits', tmp_path, space, StudySettings(n_configs=2), n_workers=1, progress=False)


def test_ctrl_c_stops_cleanly_and_the_command_says_how_to_go_on(tmp_path):
    out = tmp_path/'stopped'
    driver = subprocess.Popen([*LLPROBE, 'run', *STUDY, '--out', str(out), '--jobs', '2'], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore Ctrl-C
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
            waiting = Command('run', *STUDY, '--out', out, '--jobs', '1', '--wait')
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
    assert main(['run', '--quiet', '--out', str(tmp_path/'new'/'out'), *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert word in message and len(message.splitlines()) == 1, message
    assert not (tmp_path/'new').exists()


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


def study_with(architecture, out: Path, budget: float | None = None) -> dict:
    space = SearchSpace.from_dict(dict(architecture='mlp', hyperparameters=dict(width=[1, 2, 3, 4], learning_rate=dict(low=0.01, high=1.0, log=True))))
    probe = ProbeSettings(architecture=architecture, train=TrainSettings(n_epochs=3))
    return run_study('digits', out, space, StudySettings(levels=(0.1, 0.2), n_configs=8, probe=probe, budget=budget), n_workers=1, progress=False)


def test_a_model_that_raises_is_a_recorded_crash_and_is_never_chosen(tmp_path):
    values = study_with(sometimes_broken, tmp_path/'out')
    by_width = {True: set(), False: set()}
    for p in values['predictions']:
        by_width[p['config']['width'] >= 3].add(p['status'])
    assert by_width == {True: {'crashed'}, False: {'ok'}}
    assert values['best_config']['width'] < 3 and values['status'] == 'ok'
    with open_store(tmp_path/'out'/'study.db', read_only=True) as store:
        [error] = {r['error'] for r in store.probes('digits') if r['status'] == 'crashed'}
    assert re.fullmatch(r'RuntimeError: no such layer \(.*test_study.py, line \d+\)', error)


def test_when_every_probe_crashes_the_study_stops_and_says_why(tmp_path):
    with pytest.raises(InputError, match='all 8 probes at level 0.1 crashed.*no such'):
        study_with(always_broken, tmp_path/'out')


def too_narrow(config, input_shape, n_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(63, n_classes))


def misspelt(config, input_shape, n_classes):
    return torch.nn.Linear(64, config['widht'])


def without_arguments():
    return torch.nn.Linear(64, 10)


@pytest.mark.parametrize('architecture, error, line', [(too_narrow, 'RuntimeError: mat1', 0), (misspelt, "KeyError: 'widht'", 1), (without_arguments, 'TypeError: without_arguments', 0)])
def test_a_model_that_cannot_be_built_is_named_with_config_file_and_line(tmp_path, architecture, error, line):
    place = f'test_study.py, line {architecture.__code__.co_firstlineno+line}'
    with pytest.raises(InputError, match=rf"architecture .*{architecture.__name__} fails for the config {{.*'width': .*}} with {error}.* \(.*{place}\)"):
        study_with(architecture, tmp_path/'out')


def without_numbers(config, input_shape, n_classes):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, n_classes))
    torch.nn.init.constant_(model[1].weight, torch.nan)
    return model


def broken_or_without_numbers(config, input_shape, n_classes):
    return (always_broken if config['width'] == 1 else without_numbers)(config, input_shape, n_classes)


def test_a_budget_holds_where_some_trainings_cost_twice_as_much(tmp_path):
    space = SearchSpace('mlp', dict(width=[16, 32], learning_rate=dict(low=0.01, high=0.3, log=True), sharpness_aware=['none', 'sam']))
    settings = StudySettings(levels=(0.1, 0.2), budget=4, probe=ProbeSettings(train=TrainSettings(n_epochs=4)))
    out = run_study('digits', tmp_path/'out', space, settings, n_workers=1, progress=False)
    fte = out['cost']['fte']
    assert 2 < fte['probe']+fte['final'] <= 4
    assert out['n_configs'] < fte['all_configs_in_full'] < 2*out['n_configs']


def test_a_large_budget_for_a_small_space_trains_all_of_it(tmp_path):
    settings = StudySettings(levels=(0.1, 0.2), budget=15, probe=ProbeSettings(train=TrainSettings(n_epochs=2)))
    out = run_study('digits', tmp_path/'out', SearchSpace('mlp', dict(width=[8, 16, 32])), settings, n_workers=1, progress=False)
    assert len(out['full_trainings']) == 3


@pytest.mark.parametrize('architecture, budget, message', [
    (without_numbers, None, '^all 8 probes at level 0.1 diverged: lower the learning rates'),
    (broken_or_without_numbers, None, '^all 8 probes at level 0.1 crashed or diverged, the first crash with .*no such'),
    (without_numbers, 4.0, '^all [0-9]+ probes .*diverged: lower the learning rates'),
    (without_numbers, 1.9, '^all [0-9]+ probes .*diverged: lower the learning rates')])
def test_when_every_training_diverges_the_study_stops_and_says_so_each_time(tmp_path, architecture, budget, message):
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            study_with(architecture, tmp_path/'out', budget)
    assert not (tmp_path/'out'/'result.json').exists()


@pytest.mark.parametrize('dataset', ['wine', 'breast_cancer'])
def test_tabular_data_runs_end_to_end(dataset, tmp_path):
    arguments = ['--dataset', dataset, '--levels', '0.3', '0.6', '--configs', '4', '--epochs', '10', '--quiet', '--jobs', '1']
    done = run(tmp_path/'out', arguments=arguments)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path/'out'/'result.json').read_text())
    assert values['architecture'] == 'mlp' and values['reached']['test_accuracy'] > 0.8


@pytest.fixture(scope='module')
def regression(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('regression')/'diabetes'
    done = run(out, '--jobs', '1', arguments=DIABETES)
    assert done.returncode == 0, done.stderr
    assert 'reached test R²' in done.stdout and '%' not in done.stdout
    return out


def test_a_regression_runs_end_to_end(regression):
    values = json.loads((regression/'result.json').read_text())
    assert (values['metric'], values['architecture'], len(values['predictions'])) == ('r2', 'mlp', 6)
    assert list(values['reached']) == ['val_r2', 'test_r2', 'val_loss', 'test_loss', 'val_rmse', 'test_rmse'] and list(values['predicted']) == ['val_r2', 'std']
    assert 0.2 < values['reached']['test_r2'] < 0.8
    page = ''.join(p.read_text() for p in (regression/'report').rglob('*.html'))
    assert 'validation R²' in page and 'accuracy' not in page
    status = llprobe('status', regression)
    assert status.returncode == 0 and 'best R²' in status.stdout and f'{values["reached"]["val_r2"]:.3f}' in status.stdout


def test_the_weights_of_a_regression_reach_what_the_result_says(regression):
    "Recomputed in the target's own units with scikit-learn"
    from safetensors.torch import load_file
    from sklearn.metrics import r2_score
    from llprobe.data import load_dataset, split_dataset
    from llprobe.models import build_model
    from llprobe.training import network_input
    values, split = json.loads((regression/'result.json').read_text()), split_dataset(load_dataset('diabetes'), 0)
    model = build_model('mlp', values['best_config'], (10,), 1).eval()
    model.load_state_dict(load_file(regression/'best.safetensors'))
    for part in ('val', 'test'):
        x, y = split.inputs(part)
        with torch.no_grad():
            predicted = model(network_input(split, x))[:, 0]*split.target_std + split.target_mean
        assert values['reached'][f'{part}_r2'] == pytest.approx(r2_score(y, predicted), abs=1e-4)
        assert values['reached'][f'{part}_loss'] == pytest.approx(float((predicted-y).square().mean())/split.target_std**2, rel=1e-4)


def test_a_regression_resumed_from_its_database_is_as_uninterrupted(regression, tmp_path):
    "The probes but the last are in the database; what a fresh search makes of them is the same"
    with open_store(regression/'study.db', read_only=True) as store:
        study, records = store.study('diabetes'), store.probes('diabetes')
        configs = store.configs('diabetes')
    with open_store(tmp_path/'study.db') as store:
        store.create_study('diabetes', **{k: study[k] for k in ('settings', 'dataset', 'fingerprint', 'space', 'data_features', 'versions', 'metric')})
        store.add_configs('diabetes', configs)
        for record in [r for r in records if r['purpose'] == 'probe'][:-1]:
            store.add_probe('diabetes', record)
    done = run(tmp_path, '--jobs', '1', arguments=DIABETES)
    assert done.returncode == 0, done.stderr
    one, other = result(regression), result(tmp_path)
    assert one == other


def linear(config, input_shape, n_outputs):
    return torch.nn.Linear(input_shape[0], n_outputs)


def arrays(noise: float) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 5))
    return from_arrays(x, 1e4 + 50*(x@[1, -2, 0.5, 0, 3] + noise*rng.normal(size=600)), task='regression')


@pytest.mark.parametrize('r2', [0.5, 0.9, 1.0])
def test_the_r2_of_a_linear_law_is_recovered(r2, tmp_path):
    "The law explains a known share of the variance, far from zero and in large units, and the study reaches it"
    noise = (14.25*(1/r2-1))**0.5
    space = SearchSpace.from_dict(dict(architecture='mlp', hyperparameters=dict(learning_rate=[0.01, 0.03, 0.1], batch_size=32, momentum=0.9, weight_decay=[0.0, 1e-4])))
    settings = StudySettings(levels=(0.2, 0.5), n_configs=4, probe=ProbeSettings(architecture=linear, train=TrainSettings(n_epochs=20)))
    values = run_study(arrays(noise), tmp_path, space, settings, n_workers=1, progress=False)
    n_test = 120
    assert values['reached']['test_r2'] == pytest.approx(r2, abs=4*2*r2**0.5*(1-r2)/n_test**0.5+0.005)


def test_a_regression_that_diverges_scores_chance_and_is_never_chosen(tmp_path):
    space = SearchSpace.from_dict(dict(architecture='mlp', hyperparameters=dict(learning_rate=[0.03, 1e4], batch_size=32, weight_decay=[0.0, 1e-4])))
    settings = StudySettings(levels=(0.2, 0.5), n_configs=4, probe=ProbeSettings(architecture=linear, train=TrainSettings(n_epochs=20)))
    values = run_study(arrays(0.1), tmp_path, space, settings, n_workers=1, progress=False)
    diverged = [p for p in values['predictions'] if p['config']['learning_rate'] == 1e4]
    assert len(diverged) == 2 and all((p['status'], p['val_r2'], p['predicted']) == ('diverged', 0, 0) for p in diverged)
    assert values['best_config']['learning_rate'] == 0.03 and values['reached']['test_r2'] > 0.9


@settings_of_hypothesis(deadline=None, max_examples=50)
@given(st.integers(2, 60), st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([1e-3, 1, 1e5]), st.sampled_from([0, 1, -1e6]))
def test_r2_is_scikit_learns_however_the_batches_are_cut(n, batch_size, seed, scale, shift):
    from sklearn.metrics import r2_score
    rng = np.random.default_rng(seed)
    x, model = torch.from_numpy(rng.normal(size=(n, 3))), torch.nn.Linear(3, 1).double()
    y = torch.from_numpy(shift+scale*rng.normal(size=n))
    with torch.no_grad():
        model.weight.mul_(scale), model.bias.fill_(shift)
    scores = evaluate(model, x, y, batch_size=batch_size)
    predicted = model(x).detach()[:, 0]
    assert scores['r2'] == pytest.approx(r2_score(y, predicted), rel=1e-6, abs=1e-6)
    assert scores['loss'] == pytest.approx(float((predicted-y).square().mean()), rel=1e-9)


@pytest.mark.parametrize('value', [0.1, 0.0, -3e7])
def test_r2_of_a_constant_target_does_not_exist(value):
    model = torch.nn.Linear(2, 1).double()
    for n in (1, 7):
        scores = evaluate(model, torch.randn(n, 2), torch.full((n,), value, dtype=torch.double), batch_size=3)
        assert np.isnan(scores['r2']) and np.isfinite(scores['loss'])


def test_shapes_that_would_broadcast_are_refused():
    for outputs in (torch.zeros(4), torch.zeros(4, 2), torch.zeros(3, 1)):
        with pytest.raises(InputError, match=r'outputs \(n, 1\)'):
            task_loss(outputs, torch.zeros(4))


def test_label_smoothing_is_refused_for_a_regression(tmp_path):
    settings = StudySettings(probe=ProbeSettings(train=TrainSettings(label_smoothing=0.1)))
    with pytest.raises(InputError, match='label_smoothing must be 0 for a regression, got 0.1'):
        run_study('diabetes', tmp_path, settings=settings, n_workers=1, progress=False)


def test_images_can_be_regressed(tmp_path):
    "Brightness is what to predict"
    rng = np.random.default_rng(0)
    level = rng.uniform(40, 200, 120)
    x = (level[:, None, None]+rng.normal(0, 20, (120, 8, 8))).clip(0, 255).astype(np.uint8)
    settings = StudySettings(levels=(0.5,), n_configs=4, probe=ProbeSettings(train=TrainSettings(n_epochs=10)))
    values = run_study(from_arrays(x, level, task='regression'), tmp_path, settings=settings, n_workers=1, progress=False)
    assert values['architecture'] == 'simple_cnn' and values['reached']['test_r2'] > 0.5


def test_settings_that_differ_are_named(uninterrupted, capsys):
    from llprobe.cli import main
    assert main(['run', *STUDY, '--epochs', '5', '--out', str(uninterrupted)]) == 2
    message = capsys.readouterr().err
    assert '--epochs 4, now 5' in message


NET = '''from torch import nn
def net(config, input_shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, config['width']), nn.{activation}(), nn.Linear(config['width'], n_classes))
'''


def test_a_model_whose_source_has_changed_is_told_when_its_study_goes_on(tmp_path, monkeypatch, recwarn):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path/'net_that_changes.py'
    space = SearchSpace('net_that_changes:net', dict(width=[8, 16], learning_rate=[0.03, 0.1]))

    def go_on(activation):
        source.write_text(NET.format(activation=activation))
        recwarn.clear()
        run_study('digits', tmp_path/'out', space, StudySettings(levels=(0.1,), n_configs=2), n_workers=1, progress=False)
        return ['net_that_changes:net has changed since the study began' in str(w.message) for w in recwarn if 'changed' in str(w.message)]
    assert go_on('ReLU') == [] and go_on('ReLU') == [] and go_on('Tanh') == [True]


def test_the_chosen_model_answers_for_new_samples(tmp_path):
    frame = load_wine(as_frame=True)
    dataset = from_arrays(frame.data, np.array(frame.target_names)[frame.target], name='wine')
    out = run_study(dataset, tmp_path/'out', settings=StudySettings(levels=(0.5,), n_configs=4), n_workers=1, progress=False)
    split = split_dataset(dataset)
    answers = load_predictor(tmp_path/'out').predict(frame.data.iloc[split.test.numpy()].sample(frac=1, axis=1, random_state=0))
    truth = np.array(frame.target_names)[frame.target.iloc[split.test.numpy()]]
    assert (answers == truth).mean() == pytest.approx(out['reached']['test_accuracy'])


@pytest.mark.parametrize('labels', [[9, 100], [False, True]], ids=str)
def test_answers_are_the_labels_that_the_data_had(labels, tmp_path):
    "Numbers stay numbers in a saved data set and in the chosen model, and a column of words is encoded for new samples too"
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(dict(size=rng.normal(size=60), city=rng.choice(['Oslo', 'Rome', 'Bergen'], 60)))
    y = np.array(labels)[(frame['city'] == 'Rome').astype(int)]
    save_dataset(from_arrays(frame, pd.Series(y), name='cities'), tmp_path/'cities.safetensors')
    settings = StudySettings(levels=(0.5,), n_configs=2, probe=ProbeSettings(train=TrainSettings(n_epochs=20)))
    space = SearchSpace('mlp', dict(learning_rate=[0.03, 0.1], batch_size=8))
    run_study(load_dataset(tmp_path/'cities.safetensors'), tmp_path/'out', space, settings, n_workers=1, progress=False)
    predictor = load_predictor(tmp_path/'out')
    new = frame[['city', 'size']].assign(extra='x')[::-1]
    answers = predictor.predict(new)
    assert predictor.classes == tuple(labels) and answers.dtype == y.dtype
    assert answers.tolist() == y[::-1].tolist() and predictor.predict(new[new['city'] == 'Rome']).tolist() == [labels[1]]*(frame['city'] == 'Rome').sum()


def test_errors_of_a_regression_are_in_its_units(tmp_path):
    out = run_study('diabetes', tmp_path/'out', settings=StudySettings(levels=(0.5,), n_configs=4), n_workers=1, progress=False)
    dataset = load_dataset('diabetes')
    test = split_dataset(dataset).test
    residual = load_predictor(tmp_path/'out').predict(dataset.train_x[test])-dataset.train_y[test].numpy()
    assert out['reached']['test_rmse'] == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-4)


@pytest.mark.parametrize('arguments, said', [
    (['--datset', 'digits'], 'did you mean --dataset?) (see llprobe run --help)'), (['--levels', '0.1,0.2'], 'separate several by spaces'),
    (['--dataset', 'IRISS'], 'did you mean iris?'), (['--architecture', 'mpl', '--dataset', 'wine'], 'did you mean mlp?'), (['--jobs', '0'], '--jobs must be at least 1')])
def test_slips_are_answered_with_what_was_meant(tmp_path, arguments, said):
    done = run(tmp_path/'out', *arguments, arguments=[])
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


LATE = '''import math
from torch import nn
class Late(nn.Module):
    "Diverges after so many steps that only a full training takes"
    def __init__(self, config, input_shape, n_classes):
        super().__init__()
        self.net, self.steps = nn.Linear(input_shape[0], n_classes), 0
    def forward(self, x):
        self.steps += self.training
        return self.net(x)*(math.nan if self.steps > 40 else 1)
'''


def test_a_full_training_that_diverges_leaves_no_model_and_no_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/'net_that_diverges.py').write_text(LATE)
    space = SearchSpace('net_that_diverges:Late', dict(learning_rate=[0.01, 0.03], batch_size=32))
    settings = StudySettings(levels=(0.1,), n_configs=2, probe=ProbeSettings(train=TrainSettings(n_epochs=10)))
    out = run_study('diabetes', tmp_path/'out', space, settings, n_workers=1, progress=False)
    assert out['status'] == 'diverged' and out['reached']['test_rmse'] is None and out['reached']['val_rmse'] is None
    said = dict(summary_rows(out))
    assert said['reached test R²'] == 'none' and said['reached validation R²'].endswith('the full training diverged')
    with pytest.raises(InputError, match='or its full training failed'):
        load_predictor(tmp_path/'out')


def test_a_predictor_tells_that_its_source_has_changed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path/'net_of_a_predictor.py'
    source.write_text(NET.format(activation='ReLU'))
    run_study('digits', tmp_path/'out', SearchSpace('net_of_a_predictor:net', dict(width=[8, 16])), StudySettings(levels=(0.1,), n_configs=2), n_workers=1, progress=False)
    with warnings.catch_warnings(action='error'):
        load_predictor(tmp_path/'out')
    source.write_text(NET.format(activation='Tanh'))
    with pytest.warns(UserWarning, match='net_of_a_predictor:net has changed'):
        load_predictor(tmp_path/'out')


def test_a_budget_of_any_size_fits_trainings_that_cost_twice(tmp_path):
    space = SearchSpace('mlp', dict(width=[16, 32], learning_rate=dict(low=0.01, high=0.3, log=True), sharpness_aware=['none', 'sam']))
    for budget in (5.9, 6, 10):
        settings = StudySettings(levels=(0.1, 0.2), budget=budget, probe=ProbeSettings(train=TrainSettings(n_epochs=3)))
        with open_study('iris', tmp_path/str(budget), space, settings).store:
            pass


def test_a_small_space_is_tried_whole_by_default(tmp_path):
    space = SearchSpace('mlp', dict(width=[4, 8], depth=[1, 2]))
    settings = StudySettings(levels=(0.2,), probe=ProbeSettings(train=TrainSettings(n_epochs=1)))
    assert run_study('iris', tmp_path/'out', space, settings, n_workers=1, progress=False)['n_configs'] == 4
    with pytest.raises(InputError, match='fewer than 5 different configs, namely 4'):
        run_study('iris', tmp_path/'more', space, replace(settings, n_configs=5), n_workers=1, progress=False)


def test_a_model_that_names_the_most_frequent_class_is_told(tmp_path):
    rng = np.random.default_rng(0)
    noise = from_arrays(rng.normal(size=(300, 4)), np.where(rng.random(300) < 0.8, 'usual', 'rare'), name='noise')
    out = run_study(noise, tmp_path/'out', settings=StudySettings(levels=(0.5,), n_configs=3, probe=ProbeSettings(train=TrainSettings(n_epochs=2))), n_workers=1, progress=False)
    share = (split_dataset(noise).val_y == 1).float().mean()
    assert out['naive']['answer'] == 'usual' and out['naive']['val_accuracy'] == pytest.approx(float(share))
    told = "no better than always answering 'usual'" in dict(summary_rows(out))['reached validation accuracy']
    assert told == (out['reached']['val_accuracy'] <= share+1e-6) == (not out['naive']['beaten'])
    beaten = dict(out, naive=dict(out['naive'], beaten=True))
    assert 'no better' not in dict(summary_rows(beaten))['reached validation accuracy'] and told


def test_more_budget_than_the_whole_space_costs_is_told(tmp_path, capsys):
    space = SearchSpace('mlp', dict(width=[4, 8]))
    settings = StudySettings(levels=(0.2,), budget=6, probe=ProbeSettings(train=TrainSettings(n_epochs=1)))
    run_study('iris', tmp_path/'out', space, settings, n_workers=1)
    assert 'the budget of 6 full trainings is more than the 2 of training all configs of this space in full' in capsys.readouterr().err


@pytest.fixture
def units(monkeypatch):
    "A switch for what the CPU multiplies in hardware"
    def switch(on):
        for module in ('study', 'training'):
            monkeypatch.setattr(f'llprobe.{module}.has_bfloat16_units', lambda device: on)
    return switch


def begin(out, **train):
    study = open_study('iris', out, settings=StudySettings((0.5,), 2, probe=ProbeSettings(train=TrainSettings(n_epochs=1, device='cpu', **train))))
    study.store.close()
    return study


def test_a_study_multiplies_on_any_cpu_as_it_began(units, tmp_path):
    units(False)
    assert begin(tmp_path/'without').settings.probe.train.precision == 'gpu'
    units(True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = begin(tmp_path/'without').settings
        assert again.probe.train.precision == 'gpu' and 'precision' not in again.to_dict()['probe']['train']
        new = begin(tmp_path/'with').settings
        assert new.probe.train.precision == 'auto' and ProbeSettings.from_dict(new.to_dict()['probe']).train.precision == 'auto'
    units(False)
    with pytest.warns(UserWarning, match='from here on is in float32'):
        begin(tmp_path/'with')
    with pytest.raises(InputError, match="precision 'auto', now unset"):
        begin(tmp_path/'with', precision='gpu')
    for precision in ('float32', 'bfloat16'):
        with pytest.raises(InputError, match=f"precision '?(auto|unset)'?, now '{precision}'"):
            begin(tmp_path/'with', precision=precision)
        assert begin(tmp_path/precision, precision=precision).settings.probe.train.precision == precision
        with pytest.raises(InputError, match=f"precision '{precision}', now"):
            begin(tmp_path/precision)


def test_a_full_training_takes_one_thread_in_bfloat16(tmp_path):
    for precision, threads in dict(float32=2, bfloat16=1).items():
        settings = StudySettings((0.5,), 2, probe=ProbeSettings(train=TrainSettings(precision=precision, device='cpu')))
        study = open_study('digits', tmp_path/precision, SearchSpace('simple_cnn', dict(num_channels=[128, 256])), settings)
        study.store.close()
        assert _threads(study, dict(num_channels=128), 2) == threads


def test_a_study_begun_anew_takes_nothing_of_the_one_before(tmp_path):
    "Its database deleted, the folder still holds another study's weights and checkpoints"
    space = SearchSpace('mlp', dict(width=[4, 8]))
    def study(n_epochs):
        run_study('iris', tmp_path, space, StudySettings((0.5,), probe=ProbeSettings(train=TrainSettings(n_epochs=n_epochs, device='cpu'))), n_workers=1, progress=False)
        return read_study(tmp_path)
    first = study(1)
    config = first.probes[0]['config_id']
    first.model(config, 0.5)
    assert read_study(tmp_path).is_kept(config, 0.5)
    for path in tmp_path.glob('study.db*'):
        path.unlink()
    (tmp_path/'paused').mkdir()
    (tmp_path/'paused'/'left').touch()
    second = study(4)
    assert not second.is_kept(config, 0.5) and not (tmp_path/'paused').exists()
    inputs = network_samples(second.split, 'val', None, torch.device('cpu'))
    assert evaluate(second.model(config, 0.5), *inputs)['loss'] == pytest.approx(second.record(config, 0.5)['val_loss'], rel=1e-5)
