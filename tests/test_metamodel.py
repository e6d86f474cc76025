"""The meta-model's intervals on the committed tables, whose full trainings a fit has not seen; its prior and grids were chosen on them."""

from pathlib import Path
import numpy as np, pandas as pd, pytest
from scipy.special import expit
from llprobe.features import feature_frame
from llprobe.metamodel import PRIOR, PowerLawModel, score_at
from llprobe.table import card_space, read_table, table_records, validation_size

FIGURES = Path(__file__).parent.parent/'figures'


@pytest.fixture(scope='module', params=['digits', 'mnist5k', 'cifar10-10k'])
def table(request) -> tuple[list[pd.DataFrame], int, float]: # One frame a seed, validation samples, score of chance
    folder = FIGURES/request.param/'table'
    frames, card = read_table(folder)
    records = [r | dict(responses=[]) for r in table_records(folder)]
    return [feature_frame([r for r in records if r['seed'] == seed], card_space(card)) for seed in card['seeds']], validation_size(frames, card), card['chance']


def predictions(seeds: list[pd.DataFrame], n_samples: int, chance: float, levels: list[float], n_configs: int = 6, n_draws: int = 20) -> pd.DataFrame:
    "Some configs at the first level, the better half of them at the next: what is predicted for level 1, and what is reached there"
    parts = []
    for draw in range(n_draws):
        known, seen = seeds[draw % len(seeds)], []
        kept = np.random.default_rng(draw).choice(known['config_id'].unique(), n_configs, replace=False)
        for level in levels:
            seen.append(known[known['level'].eq(level) & known['config_id'].isin(kept)])
            kept = seen[-1].nlargest(-(-len(kept)//2), 'val_score')['config_id']
        seen = pd.concat(seen)
        predicted = PowerLawModel(n_samples, chance).fit(seen).predict(seen)
        full = known[known['level'].eq(1) & known['status'].eq('ok')].set_index('config_id')['val_score']
        parts.append(predicted.assign(reached=full.reindex(predicted.index)).query('std > 0').dropna())
    return pd.concat(parts)


@pytest.mark.parametrize('levels, width', [([0.1], 0.35), ([0.1, 0.2], 0.25)], ids=['one level', 'two levels'])
def test_intervals_of_few_configs_hold(table, levels, width):
    "A regression that maximises its evidence, around an exponent of 0.3 ± 0.2, held 56 to 78 % of them"
    found = predictions(*table, levels)
    inside = (found['mean']-found['reached']).abs() < 2*found['std']
    assert inside.mean() > 0.9
    assert found['std'].median() < width # not by being of no use


def test_intervals_of_configs_near_chance_hold():
    "Half of 24 have hardly begun to learn; their exponents spread up to twice as much as those of the others, which alone were seen at two levels. As wide as for those, the intervals held 88 %"
    held, near = [], np.arange(24) < 12
    for draw in range(24):
        rng = np.random.default_rng(draw)
        start = np.where(near, rng.uniform(0.5, 2.5, 24), rng.uniform(-3, -1, 24))
        wider = 1+expit(start)
        exponent = rng.normal(*PRIOR)+rng.normal(0, 0.25, 24)*wider
        reached = {level: score_at(start-exponent*np.log(level/0.1)+rng.normal(0, 0.2, 24)*wider, chance=0.1) for level in (0.1, 0.2, 1.0)}
        seen = [pd.DataFrame(dict(config_id=np.arange(24), level=level, status='ok', val_score=rng.binomial(1000, reached[level])/1000)) for level in (0.1, 0.2)]
        frame = pd.concat([seen[0], seen[1][~near]], ignore_index=True)
        predicted = PowerLawModel(1000, 0.1).fit(frame).predict(frame)[near]
        held += [*(np.abs(predicted['mean']-reached[1.0][near]) < 2*predicted['std'])]
    assert 0.93 < np.mean(held) < 0.98, np.mean(held)
