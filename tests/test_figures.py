"The paper's figures: the same input gives the same bytes, and nothing in them is empty."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llprobe.landscape_figures import landscape_figures
from llprobe.solutions import choose_configs
from llprobe.space import config_id
from llprobe.table import read_table
from llprobe.table_figures import level_choices, level_predictions, probe_costs, sharpness_frame, table_figures
from llprobe.visualization import save_figure

FIGURES = Path(__file__).parents[1]/'figures'
NAMES = {'predictions-by-level', 'levels', 'curves-by-level', 'regret', 'importance', 'sharpness', 'cost', 'landscape-lines', 'landscape-planes', 'surface'}
DRAW = '''
import sys
from pathlib import Path
from llprobe.landscape_figures import landscape_figures
from llprobe.table_figures import table_figures
from llprobe.visualization import save_figure
table, replay, landscapes, out = sys.argv[1:]
for name, _, figure, data in [*table_figures(table, replay), *landscape_figures(landscapes)]: save_figure(figure, Path(out)/name, data)
'''


def write_part(folder: Path, n_configs: int, seeds: list[int]) -> Path:
    "A part of the committed table of digits"
    frames, card = read_table(FIGURES/'digits'/'table')
    configs = card['configs'][:n_configs]
    ids = {config_id(c) for c in configs}
    folder.mkdir()
    for name, frame in frames.items():
        frame[frame['config_id'].isin(ids) & frame['seed'].isin(seeds)].to_parquet(folder/f'{name}.parquet', index=False)
    (folder/'card.json').write_text(json.dumps(card | dict(configs=configs, n_configs=n_configs, seeds=seeds)))
    return folder


@pytest.fixture(scope='module')
def table(tmp_path_factory) -> Path:
    "As small as that of CIFAR-10: one seed"
    return write_part(tmp_path_factory.mktemp('figures')/'table', 24, [0])


@pytest.fixture(scope='module')
def drawn(table) -> list[tuple]:
    return [*table_figures(table, FIGURES/'probes'/'replay.csv'), *landscape_figures(FIGURES/'digits'/'landscapes')]


def test_two_processes_draw_the_same_bytes(table, tmp_path):
    for run in ('first', 'second'):
        command = [sys.executable, '-c', DRAW, table, FIGURES/'probes'/'replay.csv', FIGURES/'digits'/'landscapes', tmp_path/run]
        subprocess.run([str(part) for part in command], check=True)
    files = {path.name for path in (tmp_path/'first').iterdir()}
    assert files == {f'{name}.{kind}' for name in NAMES for kind in ('pdf', 'png', 'csv')}
    assert [name for name in sorted(files) if (tmp_path/'first'/name).read_bytes() != (tmp_path/'second'/name).read_bytes()] == []


def test_no_axis_is_empty(drawn):
    assert {name for name, *_ in drawn} == NAMES
    for name, caption, figure, data in drawn:
        assert figure.axes and all(axis.has_data() or axis.get_label() == '<colorbar>' for axis in figure.axes), name
        assert len(data) and set(data.columns[data.isna().all()]) <= {'sem'}, name  # there is none of one seed
        assert 'seed' in caption, name


def test_csv_holds_what_is_drawn(drawn, tmp_path):
    name, _, figure, data = next(d for d in drawn if d[0] == 'predictions-by-level')
    save_figure(figure, tmp_path/name, data)
    kept = pd.read_csv(tmp_path/f'{name}.csv')
    for axis, (level, rows) in zip(figure.axes, kept.groupby('level')):
        x, y = axis.lines[-1].get_data()
        assert x == pytest.approx(rows['reached'].to_numpy(), abs=1e-6) and y == pytest.approx(rows['predicted'].to_numpy(), abs=1e-6), level


def test_a_prediction_sees_no_higher_level(table, tmp_path):
    "Predictions stay when everything above their level is changed"
    changed = shutil.copytree(table, tmp_path/'table')
    for name in ('probes', 'curves'):
        frame = pd.read_parquet(changed/f'{name}.parquet')
        frame.loc[frame['level'] > 0.2, 'val_score'] = frame.loc[frame['level'] > 0.2, 'val_score'].iloc[::-1].to_numpy()
        frame.to_parquet(changed/f'{name}.parquet', index=False)
    before, after = (rows[rows['level'] <= 0.2].reset_index(drop=True) for rows in (level_predictions(table), level_predictions(changed)))
    pd.testing.assert_frame_equal(before.drop(columns='reached'), after.drop(columns='reached'))
    assert not before['reached'].equals(after['reached'])


def test_costs_are_those_of_the_records(table):
    frames, _ = read_table(table)
    probes = frames['probes']
    expected = (probes['train_samples']+probes['forward_samples']/3).groupby(probes['level']).mean()/(probes['n_samples'].max()*probes['n_epochs'].iloc[0])
    costs = probe_costs(table)
    assert costs.groupby('level')['fte'].sum().to_numpy() == pytest.approx(expected.to_numpy())
    assert (costs['fte'] > 0).all()


def test_a_config_that_diverged_has_no_sharpness(tmp_path):
    table = write_part(tmp_path/'table', 128, [0, 1, 2])
    probes = read_table(table)[0]['probes']
    diverged = set(probes.loc[(probes['level'] == 1) & (probes['status'] != 'ok'), 'config_id'])
    assert diverged
    assert set(sharpness_frame(table)['config_id']) == set(probes['config_id'])-diverged


def test_gaps_are_what_training_is_better_by(table):
    frames, _ = read_table(table)
    found = sharpness_frame(table).set_index('config_id')
    probes, responses = (frames[name][frames[name]['level'] == 1].set_index('config_id') for name in ('probes', 'responses'))
    train = responses[(responses['kind'] == 'gaussian') & (responses['sample'] == 'train')]
    still, shaken = (train[np.isclose(train['radius'], r)].groupby('config_id')[['loss', 'accuracy']].mean() for r in (0, found['radius'].iloc[0]))
    expected = dict(sharpness=shaken['loss']-still['loss'], loss_gap=probes['val_loss']-still['loss'], accuracy_gap=still['accuracy']-probes['val_score'])
    for name, values in expected.items():
        assert found[name].to_numpy() == pytest.approx(values[found.index].to_numpy(), abs=1e-6), name
    assert len(found) == 24 and (found['loss_gap'] > 0).mean() > 0.5


def test_a_prediction_costs_the_levels_below_as_well():
    "Two seeds of three configs by hand, with other costs each"
    predictions = pd.DataFrame([dict(level=level, seed=seed, config_id=c, score=s, predicted=p, reached=r) for level in (0.1, 0.3) for seed in (0, 1)
                                for c, s, p, r in zip('abc', [0.1, 0.2, 0.3], [0.3, 0.9, 0.5], [0.5, 0.8, 0.6])])
    costs = pd.DataFrame([dict(level=level, seed=seed, part=part, fte=(1+seed)*level*share) for level in (0.1, 0.3, 1.0) for seed in (0, 1)
                          for part, share in dict(training=1, validation=0.5).items()])
    found = level_choices(predictions, costs).set_index(['level', 'seed', 'signal'])
    assert found['fte'].to_dict() == pytest.approx({(level, seed, signal): 1.5*(1+seed)*fte for seed in (0, 1) for level, signal, fte in
                                                    [(0.1, 'score', 0.1), (0.1, 'predicted', 0.1), (0.3, 'score', 0.3), (0.3, 'predicted', 0.4)]})
    for signal, spearman, regret in [('score', 0.5, 0.2), ('predicted', 1, 0)]:
        rows = found.xs(signal, level='signal')
        assert rows['spearman'].to_numpy() == pytest.approx(spearman) and rows['regret'].to_numpy() == pytest.approx(regret, abs=1e-12)


def test_the_median_config_has_as_many_above_as_below(tmp_path):
    table = write_part(tmp_path/'table', 25, [0, 1])
    probes = read_table(table)[0]['probes']
    means = probes[probes['level'] == 1].groupby('config_id')['val_score'].mean()
    chosen = choose_configs(table)
    assert [c['val_score'] for c in chosen.values()] == pytest.approx([means.max(), means.median(), means.min()])
    assert [means[config_id(c['config'])] for c in chosen.values()] == pytest.approx([c['val_score'] for c in chosen.values()])
    assert means.max() > means.median() > means.min()
