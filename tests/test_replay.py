"Searches on tables: the ledger's arithmetic, every method on odd tables, interruption, missing packages."
import math
import sys
from collections import defaultdict

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis

from llprobe import comparison, peers
from llprobe.comparison import METHODS, average_ranks, mean_regrets, replay
from llprobe.core import InputError
from llprobe.replay import BudgetSpent, ReplayTable, Run, ladder, play, regrets, synthetic_table

SHAPES = {'curves': dict(n_epochs=51), 'levels': dict(levels=(0.1, 0.2, 0.3, 1.0), n_epochs=5)}


def make_table(shape: str, n: int = 40, seed: int = 0) -> ReplayTable:
    "With a categorical, as many configs as asked for, and costs that differ between configs"
    table, rng = synthetic_table(n=n, seed=seed, **SHAPES[shape]), np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    encoded = np.concatenate([table.encoded, np.eye(3)[kind]], 1)
    names = table.names+['kind=a', 'kind=b', 'kind=c']
    return ReplayTable(shape, encoded, names, table.score-0.1*(kind == 1)[:, None, None], table.levels, table.epochs,
                       table.cost*rng.uniform(0.8, 1.2, (n, 1, 1)))


def play_or_skip(name: str, table: ReplayTable, budget: float, seed: int) -> Run:
    try:
        peers.peer_versions([name])
    except InputError as e:
        pytest.skip(str(e))
    return play(METHODS[name], table, budget, seed)


calls = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 4)), max_size=60)


@settings_of_hypothesis(deadline=None, max_examples=60)
@given(calls, st.floats(0.05, 6), st.integers(0, 3))
def test_ledger_charges_each_epoch_once_and_never_too_much(calls, budget, seed):
    table = make_table('levels', n=10, seed=seed)
    run = Run(table, budget)
    for call in calls:
        try:
            curve = run.evaluate(*call)
            assert len(curve) == call[2]+1
        except BudgetSpent:
            config, level, epoch = call
            assert run.increment(config, level, run.reached.get((config, level), -1)+1) > run.budget-run.spent-1e-9
    assert run.spent <= run.budget
    assert run.spent == pytest.approx(sum(table.cost[c, l, e] for (c, l), e in run.reached.items()), abs=1e-9)
    paid = [row[0] for row in run.trace]
    assert paid == sorted(paid) and len({row[1:4] for row in run.trace}) == len(run.trace)
    first = defaultdict(list)
    for _, c, l, e, score in run.trace:
        first[c, l].append(e)
        assert score == table.score[c, l, e] or (math.isnan(score) and e == first[c, l][-1])
    assert all(epochs == list(range(len(epochs))) for epochs in first.values())
    frame = regrets(run, np.linspace(0.01, budget, 7))
    assert frame['regret'].is_monotonic_decreasing and frame.filter(like='normalised').stack().between(0, 1).all()


def test_nothing_is_charged_after_divergence():
    table = synthetic_table(n=10, n_epochs=10)
    run = Run(table, 5)
    assert np.isnan(run.evaluate(0)[5:]).all()
    assert run.spent == pytest.approx(0.6)
    run.evaluate(0)
    assert run.spent == pytest.approx(0.6)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', METHODS)
def test_every_method_repeats_itself_and_spends_its_budget(name, shape):
    table = make_table(shape)
    runs = [play_or_skip(name, table, 6, seed) for seed in (3, 3, 4)]
    assert str(runs[0].trace) == str(runs[1].trace)
    assert str(runs[0].trace) != str(runs[2].trace)
    assert all(run.budget-run.spent < table.cost[:, :, 0].max() for run in runs)
    assert all(np.isfinite(run.seconds) and run.seconds > 0 for run in runs)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', METHODS)
def test_every_method_ends_when_the_table_is_used_up(name, shape):
    table = make_table(shape, n=12)
    run = play_or_skip(name, table, 1000, 0)
    assert run.spent < 40
    assert regrets(run, [1000])['regret_in_full'].item() == pytest.approx(0)


def table_by_hand(scores: np.ndarray, fidelity: str, rungs: list[int], seed: int) -> tuple[ReplayTable, list[int]]: # And the place of each config
    "A row of scores by rung for each config, in the order in which this seed draws them; rungs are epochs, or levels with a single epoch"
    order, share = np.random.default_rng(seed).permutation(len(scores)), np.array(rungs)/rungs[-1]
    score = np.empty((len(scores), 1, len(rungs)))
    score[order, 0] = scores
    levels, epochs = ([1.0], rungs) if fidelity == 'epochs' else (share, [1])
    shape = len(levels), len(epochs)
    return ReplayTable('by hand', np.zeros((len(scores), 1)), ['a'], score.reshape(-1, *shape), levels, epochs, share.reshape(1, *shape)), np.argsort(order).tolist()


LOW = [3, 8, 5, 1, 2, 4, 9, 7, 6, 10, 12, 11]  # at rung 3, by place
MIDDLE = [20, 22, 23, 20, 20, 20, 21, 20, 20, 27, 25, 26]  # at 9
FULL = [40, 31, 32, 39, 38, 37, 33, 34, 35, 30, 28, 29]  # at 27: nearly the order upside down
TRAINED = dict(
    random=(3, [9, 27], [(0, 27), (1, 27), (2, 27)]),
    random_low_then_full=(9, [9, 27], [(0, 9), (1, 9), (2, 9), (1, 27), (3, 9), (4, 9), (5, 9), (2, 27), (6, 9), (7, 9), (8, 9), (6, 27), (7, 27), (8, 27), (5, 27), (0, 27), (4, 27), (3, 27)]),
    successive_halving=(12, [3, 9, 27], [*((place, 3) for place in range(9)), (6, 9), (1, 9), (7, 9), (1, 27), (9, 3), (10, 3), (11, 3), (10, 9), (10, 27),
                                         *((place, 27) for place in (6, 7, 11, 9, 8, 2, 5, 0, 4, 3))]),
    asha=(9, [3, 9, 27], [(0, 3), (1, 3), (2, 3), (1, 9), (3, 3), (4, 3), (5, 3), (2, 9), (6, 3), (6, 9), (2, 27), (7, 3), (8, 3), (7, 9), *((place, 27) for place in (1, 6, 7, 8, 5, 0, 4, 3))]))


@pytest.mark.parametrize('fidelity', ['epochs', 'levels'])
@pytest.mark.parametrize('name', TRAINED)
def test_a_method_promotes_what_is_best_where_it_was_seen(name, fidelity):
    "To the end of the table, by place and rung; worked out by hand"
    n, rungs, expected = TRAINED[name]
    for seed in range(3):
        table, places = table_by_hand(np.array([LOW, MIDDLE, FULL] if 3 in rungs else [LOW, FULL]).T[:n], fidelity, rungs, seed)
        trained = [(places[config], rungs[max(level, epoch)]) for _, config, level, epoch, _ in play(METHODS[name], table, 100, seed).trace]
        passed = [(place, rung) for place, end in expected for rung in rungs if fidelity == 'epochs' and rung <= end or rung == end]  # a training passes the epochs below its last
        assert trained == list(dict.fromkeys(passed))


@pytest.mark.parametrize('name', ['optuna', 'smac', 'dehb'])
def test_peers_train_at_the_rungs_of_the_ladder_only(name):
    table = make_table('curves', n=100)
    run = play_or_skip(name, table, 5, 0)
    rungs, ends = {e for _, e in ladder(table)}, [e for (c, _), e in run.reached.items() if not np.isnan(table.score[c, 0, -1])]
    assert sum(e not in rungs for e in ends) <= 1  # the one that the budget cut off
    assert len(set(ends)) >= 3


@pytest.mark.parametrize('name', ['optuna', 'smac', 'dehb'])
def test_peers_learn(name):
    "On a smooth problem what a model proposes, once it has seen something, is better than what chance would"
    table = synthetic_table(n=1000, n_epochs=27, diverging=0)
    full, gain = table.score[:, 0, -1], []
    for seed in range(2):
        order = list(dict.fromkeys(row[1] for row in play_or_skip(name, table, 40, seed).trace))
        gain.append(full[order[len(order)//3:]].mean()-full.mean())
    assert np.mean(gain) > 0.4*full.std()


def test_interrupted_replay_goes_on(tmp_path):
    table, played = synthetic_table(), []

    def method(run: Run, seed: int) -> None:
        played.append(seed)
        if seed == 2 and len(played) == 3:
            raise RuntimeError('cut')
        run.evaluate(seed)

    with pytest.raises(RuntimeError, match='cut'):
        replay(dict(a=method), [table], [1, 2], range(4), folder=tmp_path)
    frame = replay(dict(a=method), [table], [1, 2], range(4), folder=tmp_path)
    assert played == [0, 1, 2, 2, 3]
    assert frame['seed'].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    whole = replay(dict(a=method), [table], [1, 2], range(4), folder=tmp_path/'whole')
    pd.testing.assert_frame_equal(frame.drop(columns='seconds'), whole.drop(columns='seconds'))
    replay(dict(a=method), [synthetic_table(seed=1)], [1, 2], range(2), folder=tmp_path)  # another table of that name
    assert played[-2:] == [0, 1]


def test_processes_find_what_one_process_finds(tmp_path):
    methods = {name: METHODS[name] for name in ('random', 'asha')}
    frames = [replay(methods, [synthetic_table()], [1, 2], range(3), n, tmp_path/str(n)).drop(columns='seconds') for n in (1, 2)]
    pd.testing.assert_frame_equal(*frames)


@settings_of_hypothesis(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=3, max_size=3), min_size=1, max_size=8))
def test_average_ranks_sum_to_a_constant_whatever_the_ties(rows):
    frame = pd.DataFrame([dict(table='t', budget=1.0, seed=s, method=m, normalised_regret=v) for s, row in enumerate(rows) for m, v in zip('abc', row)])
    ranks = average_ranks(frame)['mean']
    assert ranks.sum() == pytest.approx(6) and ranks.between(1, 3).all()


def test_errors_of_means_are_over_seeds():
    "Of four seeds whose means are 1, 2, 3 and 6 on two tables"
    frame = pd.DataFrame([dict(method=m, table=t, seed=s, budget=1.0, normalised_regret=factor*(v+d))
                          for m, factor in dict(a=1, b=10).items() for s, v in enumerate([1, 2, 3, 6]) for t, d in dict(x=-0.5, y=0.5).items()])
    means = mean_regrets(frame)
    assert means['mean'].tolist() == pytest.approx([3, 30]) and means['se'].tolist() == pytest.approx([math.sqrt(14/3/4), 10*math.sqrt(14/3/4)])


@pytest.mark.parametrize('package', ['optuna', 'smac'])
def test_a_missing_peer_is_a_sentence(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"llprobe\[compare\]"):
        peers.peer_versions([package])
    with pytest.raises(InputError, match=r"llprobe\[compare\]"):
        play(comparison.METHODS[package], synthetic_table(), 1, 0)
