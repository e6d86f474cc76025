"Studies in the real MLflow and the real TensorBoard: each probe once, whatever happens, and nothing leaves the machine."
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import llprobe
from llprobe.core import InputError
from llprobe.probe import ProbeSettings
from llprobe.space import SearchSpace, config_id
from llprobe.store import open_store
from llprobe.study import StudySettings, run_study
from llprobe.tracking import MLflowTracker, TensorBoardTracker, log_study
from llprobe.training import TrainSettings

SMALL = StudySettings(levels=(0.1, 0.2), n_configs=4, probe=ProbeSettings(train=TrainSettings(n_epochs=2)))
N_PROBES = 4+2+1


def run(out: Path, *trackers, **more) -> dict:
    return run_study('digits', out, settings=SMALL, n_workers=1, progress=False, trackers=trackers, **more)


def runs_of(uri: str, experiment: str = 'llprobe') -> tuple[list, list]:
    "The parents and the nested runs of an experiment"
    import mlflow
    client = mlflow.MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return [r for r in found if 'mlflow.parentRunId' not in r.data.tags], [r for r in found if 'mlflow.parentRunId' in r.data.tags]


def boards(folder: Path) -> dict[str, EventAccumulator]:
    "The event files under a folder, by their own folder's name"
    return {p.parent.name: EventAccumulator(str(p.parent)).Reload() for p in sorted(folder.rglob('*tfevents*'))}


class Interrupting:
    "Ctrl-C after so many probes"
    def __init__(self, after: int):
        self.left = after

    def begin(self, store, study):
        pass

    def log(self, record):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def finish(self, result):
        pass


@pytest.fixture(scope='module')
def tracked(tmp_path_factory) -> Path:
    "A study that was interrupted, resumed, run again when it was finished, and exported: always with both trackers"
    folder = tmp_path_factory.mktemp('tracked')
    def trackers():
        return MLflowTracker(f'sqlite:///{folder}/mlflow.db'), TensorBoardTracker(folder/'board')
    with pytest.raises(KeyboardInterrupt):
        run(folder/'study', *trackers(), Interrupting(3))
    stopped, children = runs_of(f'sqlite:///{folder}/mlflow.db')
    assert [r.info.status for r in stopped] == ['KILLED'] and len(children) == 3 == len(boards(folder/'board'))
    for _ in range(2):
        run(folder/'study', *trackers())
    for tracker in trackers():
        assert log_study(folder/'study', tracker) == dict(digits=(N_PROBES, 0))
    return folder


@pytest.fixture(scope='module')
def records(tracked) -> dict[tuple, dict]:
    with open_store(tracked/'study'/'study.db', create=False, read_only=True) as store:
        return {(r['config_id'], r['level'], r['purpose']): r for r in store.probes('digits')}


def test_mlflow_has_each_probe_once_with_its_numbers(tracked, records):
    import mlflow
    client = mlflow.MlflowClient(f'sqlite:///{tracked}/mlflow.db')
    [parent], children = runs_of(f'sqlite:///{tracked}/mlflow.db')
    result = json.loads((tracked/'study'/'result.json').read_text())
    assert parent.info.status == 'FINISHED'
    assert parent.data.metrics['test_accuracy'] == result['reached']['test_accuracy']
    assert parent.data.metrics['cost/fte/probe'] == result['cost']['fte']['probe']
    assert len(client.get_metric_history(parent.info.run_id, 'test_accuracy')) == 1
    assert {r.data.tags['mlflow.parentRunId'] for r in children} == {parent.info.run_id}
    found = {(r.data.tags['config_id'], float(r.data.params['level']), r.data.tags['purpose']): r for r in children}
    assert found.keys() == records.keys() and len(children) == N_PROBES
    for key, record in records.items():
        assert found[key].info.status == 'FINISHED' and found[key].data.tags['status'] == record['status']
        assert {name: found[key].data.params[name] for name in record['config']} == {name: str(v) for name, v in record['config'].items()}
        assert found[key].data.metrics['val_accuracy'] == record['val_score']
        assert found[key].data.metrics['seconds'] == record['seconds']
        curve = client.get_metric_history(found[key].info.run_id, 'curve/val_loss')
        assert [(m.step, m.value) for m in curve] == [(row['epoch'], row['val_loss']) for row in record['curve']]
    fte = sum(r.data.metrics['fte'] for r in children if r.data.tags['purpose'] == 'probe')
    assert fte == pytest.approx(result['cost']['fte']['probe'])
    final = next(r for key, r in found.items() if key[2] == 'final').data.metrics
    assert final['predicted_val_accuracy'] == pytest.approx(result['predicted']['val_accuracy'])
    assert final['prediction_error'] == pytest.approx(final['predicted_val_accuracy']-final['val_accuracy'])


def test_tensorboard_has_each_probe_once_with_its_numbers(tracked, records):
    found = boards(tracked/'board')
    assert len(found) == N_PROBES+1  # one for the study itself
    for (config, level, purpose), record in records.items():
        board = found[f'{purpose}-level{level}-{config}-seed0']
        for name, column in dict(train_loss='train_loss', val_accuracy='val_score').items():
            values = board.Scalars(f'curve/{name}')
            assert [e.step for e in values] == [row['epoch'] for row in record['curve']]
            assert [e.value for e in values] == pytest.approx([row[column] for row in record['curve']])
        losses = [r['loss'] for r in record['responses'] if (r['kind'], r['sample'], r['radius']) == ('gaussian', 'val', 0.1)]
        if losses:
            assert board.Scalars('response/gaussian/val/0.1/loss')[0].value == pytest.approx(sum(losses)/len(losses))
        assert board.Scalars('val_accuracy')[0].value == pytest.approx(record['val_score'])
    assert not list((tracked/'board').rglob('unfinished'))


def test_tensorboard_shows_hyperparameters(tracked, records):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [sys.executable, '-m', 'tensorboard.main', '--logdir', tracked/'board', '--host', '127.0.0.1', '--port', str(port), '--load_fast', 'false']
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    def ask(what, **question):
        request = urllib.request.Request(f'http://127.0.0.1:{port}/data/plugin/hparams/{what}', json.dumps(question).encode(), {'Content-Type': 'application/json'})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            return json.load(answer)
    def sessions():
        return ask('session_groups', experimentName='', sliceSize=100, allowedStatuses=['STATUS_SUCCESS']).get('sessionGroups', [])
    try:
        end, groups = time.monotonic()+120, []
        while len(groups) < N_PROBES and time.monotonic() < end:
            time.sleep(1)
            try:
                groups = sessions()
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None
        experiment = ask('experiment', experimentName='')
    finally:
        server.terminate()
        server.wait()
    def score(group):
        return next(m['value'] for m in group['metricValues'] if m['name']['tag'] == 'val_accuracy')
    shown = {(round(g['hparams']['learning_rate'], 9), g['hparams']['level'], round(score(g), 5)) for g in groups}
    assert shown == {(round(r['config']['learning_rate'], 9), r['level'], round(r['val_score'], 5)) for r in records.values()}
    assert {'learning_rate', 'level', 'purpose'} <= {h['name'] for h in experiment['hparamInfos']}
    assert 'test_accuracy' in {m['name']['tag'] for m in experiment['metricInfos']}


class Failing:
    def __init__(self, step: str):
        self.step, self.calls = step, Counter()

    def __getattr__(self, name: str):
        def method(*arguments):
            self.calls[name] += 1
            if name == self.step:
                raise ConnectionError('the server is gone\nsecond line')
        return method


@pytest.mark.parametrize('step', ['begin', 'log', 'finish'])
def test_a_failing_tracker_is_left_out_and_the_study_goes_on(tmp_path, step):
    failing, other = Failing(step), Failing('')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        result = run(tmp_path/'study', failing, other)
    said = [str(w.message) for w in caught if 'left out' in str(w.message)]
    assert len(said) == 1 and 'ConnectionError: the server is gone)' in said[0]
    assert failing.calls[step] == 1 and other.calls == dict(begin=1, log=N_PROBES, finish=1)
    assert result == json.loads((tmp_path/'study'/'result.json').read_text())


def test_what_the_user_can_mend_is_said_before_anything_is_trained(tmp_path):
    with pytest.raises(InputError, match='cannot be opened'):
        run(tmp_path/'study', MLflowTracker('nodb://me:secret@host/x'))
    with open_store(tmp_path/'study'/'study.db') as store:
        assert store.probes('digits') == []


def test_a_run_that_was_cut_short_is_written_again(tmp_path, tracked):
    uri = f'sqlite:///{tmp_path}/mlflow.db'
    class Dying(MLflowTracker):
        def _write(self, run_id, parameters, metrics):
            super()._write(run_id, parameters, [])
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        log_study(tracked/'study', Dying(uri))
    assert [r.info.status for r in runs_of(uri)[1]] == ['RUNNING']
    log_study(tracked/'study', MLflowTracker(uri))
    _, children = runs_of(uri)
    assert len(children) == N_PROBES and all('val_accuracy' in r.data.metrics and r.info.status == 'FINISHED' for r in children)


HOSTILE = ['<script>alert(1)</script>', '../../../escaped', '..', '🔥', 'a/b', 'long '*100, "it's; DROP TABLE runs", 'level', '%s{0}']


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_names_stay_in_their_place(tmp_path, tracked, name):
    inside = tmp_path/'deep'/'inside'
    space = SearchSpace('mlp', dict(learning_rate=dict(low=1e-3, high=1.0)))
    config = {name: name, 'learning_rate': 0.1}
    record = dict(config=config, config_id=config_id(config), level=0.1, seed=0, purpose='probe', status='diverged', n_epochs=1, n_samples=10, val_score=math.nan,
                  val_loss=math.inf, train_samples=10, forward_samples=0.0, seconds=0.1, error=name, curve=[dict(epoch=1, val_loss=math.nan)], responses=[])
    with open_store(inside/'study.db') as store:
        store.create_study(name, {}, dataset=name, space=space.to_dict())
        store.add_configs(name, [config])
        store.add_probe(name, record)
        for tracker in (TensorBoardTracker(inside/'board'), MLflowTracker(f'sqlite:///{tracked}/mlflow.db', name)):
            assert [log_study(store, tracker), log_study(store, tracker)] == [{name: (1, 1)}, {name: (1, 0)}]
    assert {p.name for p in tmp_path.rglob('*') if p.is_file() and 'tfevents' in p.name} == {'events.out.tfevents.llprobe'}
    assert [p.name for p in tmp_path.iterdir()] == ['deep'] and [p.name for p in (tmp_path/'deep').iterdir()] == ['inside']
    assert len(boards(inside/'board')) == 1
    [parent], [child] = runs_of(f'sqlite:///{tracked}/mlflow.db', name[:250])
    assert parent.data.tags['study'] == name and name in child.data.params.values()


ALONE = '''
import sys
calls = []
sys.addaudithook(lambda event, arguments: calls.append(arguments) if event in ('socket.connect', 'socket.getaddrinfo') else None)
from llprobe.tracking import MLflowTracker, TensorBoardTracker, log_study
for tracker in (MLflowTracker(sys.argv[2]), TensorBoardTracker(sys.argv[3])): log_study(sys.argv[1], tracker)
import time
time.sleep(3)
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None
assert not calls, calls
'''


def test_nothing_is_sent_and_nothing_is_said(tmp_path, tracked):
    "In a process that MLflow cannot take for a test"
    environment = {k: v for k, v in os.environ.items() if k not in ('CI', 'PYTEST_CURRENT_TEST', 'GITHUB_ACTIONS', 'DO_NOT_TRACK', 'MLFLOW_DISABLE_TELEMETRY')}
    command = [sys.executable, '-c', ALONE, tracked/'study', f'sqlite:///{tmp_path}/new.db', tmp_path/'board']
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['board', 'new.db']


def test_the_command_line(tmp_path):
    arguments = ['--dataset', 'digits', '--levels', '0.2', '--configs', '2', '--epochs', '1', '--jobs', '1', '--quiet', '--out', tmp_path/'study']
    places = ['--track', f'mlflow:sqlite:///{tmp_path}/mlflow.db', '--track', f'tensorboard:{tmp_path}/board']
    done = llprobe('run', *arguments, *places)
    assert (done.returncode, done.stderr) == (0, '')
    again = llprobe('export', tmp_path/'study', '--mlflow', f'sqlite:///{tmp_path}/mlflow.db', '--tensorboard', tmp_path/'board')
    assert (again.returncode, again.stderr) == (0, '') and again.stdout.count('digits: 3 probes logged to ') == again.stdout.count(', 0 of them new\n') == 2
    assert len(runs_of(f'sqlite:///{tmp_path}/mlflow.db')[1]) == 3 and len(boards(tmp_path/'board')) == 4
