"Orders and levels: size, nesting, stratification of every prefix, determinism."
import re
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from llprobe.core import InputError
from llprobe.data import strata
from llprobe.sampler import STRATEGIES, feature_space, level_size, sample_level, sample_order

targets = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=120).map(torch.tensor)
INFORMED = ('herding', 'kcenter', 'el2n')
labels = st.lists(st.integers(1, 40), min_size=2, max_size=9).flatmap(
    lambda counts: st.randoms(use_true_random=False).map(lambda r: torch.tensor(r.sample(ys := np.repeat(np.arange(len(counts)), counts).tolist(), len(ys)))))
level = st.floats(0, 1, exclude_min=True)
seed = st.integers(0, 2**40)

def inputs(y, seed=0): return torch.from_numpy(np.random.default_rng(seed).normal(size=(len(y), 5)).astype(np.float32)) + y[:, None]

def shares(y, order): # (n, k): of each class among the first m
    return np.cumsum(y.numpy()[order.numpy()][:, None] == np.unique(y), axis=0)


@given(level, st.integers(1, 10**9))
def test_level_size(r, n):
    m = level_size(r, n)
    assert 1 <= m <= n and (abs(m - r*n) <= 0.5000001 or m == 1)
    assert level_size(1.0, n) == n and level_size(r, n) <= level_size(min(1, r*1.1), n)

@settings(deadline=None)
@given(labels, seed, level, level, st.sampled_from(('random', 'stratified', 'balanced')))
def test_size_nesting_determinism(y, seed, low, high, strategy):
    low, high = sorted((low, high))
    order = sample_order(y, strategy, seed)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(len(y)))
    assert torch.equal(order, sample_order(y, strategy, seed))
    try: small = sample_level(y, low, strategy, seed)
    except InputError: return
    large = sample_level(y, high, strategy, seed)
    assert len(small) == level_size(low, len(y)) and len(large) == level_size(high, len(y))
    assert set(small.tolist()) <= set(large.tolist())
    assert set(y[small].tolist()) == set(y.tolist())

@settings(deadline=None)
@given(labels, seed)
def test_every_prefix_is_stratified(y, seed):
    n, n_class = len(y), torch.bincount(y).numpy()
    counts = shares(y, sample_order(y, 'stratified', seed))
    assert (abs(counts*n - np.arange(1, n+1)[:, None]*n_class) < n).all()

@settings(deadline=None, max_examples=30)
@given(labels, seed, st.sampled_from(INFORMED))
def test_informed_prefixes_are_stratified_too(y, seed, strategy):
    n, n_class = len(y), torch.bincount(y).numpy()
    order = sample_order(y, strategy, seed, inputs(y))
    assert torch.equal(order, sample_order(y, strategy, seed, inputs(y)))
    assert torch.equal(order.sort().values, torch.arange(n))
    assert (abs(shares(y, order)*n - np.arange(1, n+1)[:, None]*n_class) < n).all()

@settings(deadline=None)
@given(labels, seed)
def test_balanced_takes_turns(y, seed):
    counts, n_class = shares(y, sample_order(y, 'balanced', seed)), torch.bincount(y).numpy()
    left = counts < n_class # a class that is not used up is at most one behind the most frequent
    assert (np.where(left, counts, len(y)).min(1) >= counts.max(1) - 1).all()

@settings(deadline=None)
@given(labels, level, seed, st.sampled_from(('random', 'stratified', 'balanced')))
def test_named_level_works(y, level, seed, strategy):
    "The level that the message names is enough, and the largest that is clearly smaller is not"
    try: sample_level(y, level, strategy, seed)
    except InputError as error: text = str(error)
    else: assume(False)
    smallest = float(re.search(r'at least ([\d.e-]+),', text)[1])
    assert '\n' not in text and level < smallest <= 1
    assert set(y[sample_level(y, smallest, strategy, seed)].tolist()) == set(y.tolist())
    smaller = smallest - 1e-4 - 1/len(y)
    if smaller > 0:
        with pytest.raises(InputError): sample_level(y, smaller, strategy, seed)

@settings(deadline=None, max_examples=60)
@given(targets, seed, level, level, st.sampled_from(STRATEGIES))
def test_regression_levels_nest_and_are_stratified(y, seed, low, high, strategy):
    low, high = sorted((low, high))
    x, n = inputs(y/1e6), len(y)
    order, bins = sample_order(y, strategy, seed, x), strata(y)
    assert torch.equal(order, sample_order(y, strategy, seed, x)) and torch.equal(order.sort().values, torch.arange(n))
    if strategy not in ('random', 'balanced'):
        assert (abs(shares(bins, order)*n - np.arange(1, n+1)[:, None]*torch.bincount(bins).numpy()) < n).all()
    small, large = (sample_level(y, max(l, 2/n), strategy, seed, x) for l in (low, high))
    assert set(small.tolist()) <= set(large.tolist()) and len(small) >= 2

@pytest.mark.parametrize('strategy', STRATEGIES)
def test_a_single_sample_is_too_little_for_a_regression(strategy):
    y = torch.arange(300).float()
    with pytest.raises(InputError, match='at least') as error: sample_level(y, 0.001, strategy, 0, inputs(y))
    assert len(sample_level(y, float(re.search(r'at least ([\d.]+)', str(error.value))[1]), strategy, 0, inputs(y))) == 2

@pytest.mark.parametrize('strategy', STRATEGIES)
def test_seeds_differ_and_global_state_is_untouched(strategy):
    y = torch.arange(200) % 4
    x = inputs(y)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert not torch.equal(sample_order(y, strategy, 0, x), sample_order(y, strategy, 1, x))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])

@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('x', [torch.zeros(30, 4), torch.zeros(30, 3, 20, 24, dtype=torch.uint8), torch.ones(30, 1)*1e30])
def test_constant_and_extreme_inputs(strategy, x):
    order = sample_order(torch.arange(30) % 3, strategy, 0, x)
    assert torch.equal(order.sort().values, torch.arange(30))

@pytest.mark.parametrize('y', [torch.tensor([0]*10+[7]*2), torch.tensor([3]*4), torch.tensor([0, 1])])
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_odd_labels(strategy, y):
    assert len(sample_level(y, 1.0, strategy, 0, inputs(y))) == len(y)

def test_feature_space_keeps_what_varies():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 6)).astype(np.float32)*[1, 10, 100, 1e3, 1e4, 0]
    z = feature_space(torch.from_numpy(x))
    standard = x[:, :5]/x[:, :5].std(0)
    assert np.allclose(np.linalg.norm(z[0]-z[1:], axis=1), np.linalg.norm(standard[0]-standard[1:], axis=1), rtol=1e-4)

@pytest.mark.parametrize('strategy', ['herding', 'kcenter'])
def test_informed_beats_random_at_its_own_aim(strategy):
    y = torch.zeros(400, dtype=torch.int64)
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(400, 3)).astype(np.float32))
    z = feature_space(x)
    aim = dict(herding=lambda o: np.linalg.norm(z[o].mean(0)), kcenter=lambda o: np.linalg.norm(z[:, None]-z[o], axis=2).min(1).max())[strategy]
    for m in (10, 40, 100):
        random = [aim(np.random.default_rng(s).permutation(400)[:m]) for s in range(20)]
        assert aim(sample_order(y, strategy, 0, x)[:m].numpy()) < min(random)

def test_easy_comes_first():
    "Samples with a wrong label are hard, so el2n puts them last"
    y = torch.arange(400) % 2
    x = inputs(y)*0.2 + 2*y[:, None]
    noisy = y.clone()
    noisy[:40] = 1-noisy[:40]
    order = sample_order(noisy, 'el2n', 0, x)
    assert (order[:200] < 40).sum() == 0 and (order[-50:] < 40).sum() >= 35

@pytest.mark.parametrize('call, message', [
    (lambda y: sample_level(y, 0), r'level must be in \(0, 1\]'), (lambda y: sample_level(y, 1.01), 'level must be'), (lambda y: sample_level(y, None), 'level must be'),
    (lambda y: sample_order(y, 'Stratified'), 'choose one of'), (lambda y: sample_order(y, 'kcenter'), 'needs the inputs'),
    (lambda y: sample_order(y, 'el2n', 0, torch.zeros(3, 2)), 'one for each of the 20 labels'),
    (lambda y: sample_level(y, 0.05, 'balanced'), 'hold none of class')])
def test_mistakes(call, message):
    with pytest.raises(InputError, match=message): call(torch.arange(20) % 2)
