"A finished study explained and exported from the command line."
from pathlib import Path

import pytest

from conftest import llprobe
from llprobe.explain import importance, interactions, why_chosen
from llprobe.space import SearchSpace
from llprobe.store import open_store

@pytest.fixture(scope='module')
def study(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('explain')/'study'
    done = llprobe('run', '--architecture', 'mlp', '--levels', '0.1', '--configs', '12', '--epochs', '2', '--jobs', '1', '--quiet', '--out', out)
    assert done.returncode == 0, done.stderr
    return out


def test_explain(study):
    done = llprobe('explain', study)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith('digits: 12 probes at level 0.1')
    for title in ('share of the variation', 'interactions', 'chosen config: '):
        assert title in done.stdout


def test_tables_cover_the_space(study):
    with open_store(study/'study.db', read_only=True) as store:
        records, space = store.probes('digits'), SearchSpace.from_dict(store.study('digits')['space'])
    final = next(r for r in records if r['purpose'] == 'final')
    assert set(importance(records, space).hyperparameter) == set(space.names)
    assert len(interactions(records, space)) == len(space.names)*(len(space.names)-1)//2
    table = why_chosen(records, space, final['config'])
    assert set(table.hyperparameter) == set(final['config'])
    assert (table.change[[value == typical for value, typical in zip(table.value, table.typical)]] == 0).all()


def test_export(study):
    optuna = pytest.importorskip('optuna')
    url = f'sqlite:///{study}/optuna.db'
    done = llprobe('export', study, '--optuna', url)
    assert done.returncode == 0, done.stderr
    exported = optuna.load_study(study_name='digits', storage=url)
    assert len(exported.trials) == 12
    assert sum(t.user_attrs['level'] == 1 for t in exported.trials) == 1
    assert all('predicted' in t.user_attrs for t in exported.trials if t.user_attrs['status'] == 'ok')
    again = llprobe('export', study, '--optuna', url)
    assert (again.returncode, again.stdout, again.stderr) == (0, 'digits: 12 trials, 0 new\n', '')
