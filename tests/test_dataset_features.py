"Meta-features are finite, deterministic and come from the training part."
import math
import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import example, given, settings
from llprobe.core import InputError
from llprobe.data import Split, from_arrays, load_dataset, split_dataset
from llprobe.dataset_features import data_features

@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 4), st.sampled_from([(1,), (7,), (1, 1, 1), (3, 5, 4), (1, 20, 20)]), st.booleans())
@example(0, 2, 3, (1,), False) # its fitted half has one class
def test_finite_and_deterministic(seed, n_classes, n_each, shape, is_constant):
    y = np.repeat(np.arange(n_classes), n_each+1)
    x = np.random.default_rng(seed).random((len(y), *shape))*(not is_constant)
    try: split = split_dataset(from_arrays(x, y), seed)
    except InputError: return
    features = data_features(split, seed)
    assert all(type(v) is float and math.isfinite(v) for v in features.values())
    assert features == data_features(split, seed)
    assert 0 <= features['class_entropy'] <= 1+1e-9 and 0 <= features['pca_share'] <= 1

def test_names_do_not_depend_on_the_data():
    assert list(data_features(split_dataset(load_dataset('digits')))) == list(data_features(split_dataset(load_dataset('iris'))))
    assert 'n_classes' not in data_features(split_dataset(load_dataset('diabetes')))

@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 60), st.sampled_from([(1,), (7,), (3, 5, 4)]), st.sampled_from([0, 1, 1e-30, 1e30]), st.booleans())
def test_finite_for_a_regression(seed, n, shape, scale, is_constant):
    rng = np.random.default_rng(seed)
    try: split = split_dataset(from_arrays(rng.random((n, *shape))*(not is_constant), rng.normal(size=n)*scale, task='regression'), seed)
    except InputError: return
    features = data_features(split, seed)
    assert all(type(v) is float and math.isfinite(v) for v in features.values())
    assert features == data_features(split, seed)
    assert all(0 <= v <= 1 for k, v in features.items() if k.endswith('_r2'))

def test_landmarks_of_a_regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 3))
    linear, noise = (data_features(split_dataset(from_arrays(x, y, task='regression'))) for y in (x@[1, 2, -1]*1e4+7, rng.exponential(size=1000)))
    assert linear['landmark_ridge_r2'] > 0.999 and linear['landmark_neighbours_r2'] > 0.8 and abs(linear['target_skew']) < 0.3
    assert noise['landmark_ridge_r2'] < 0.05 and noise['landmark_neighbours_r2'] == 0 and 1 < noise['target_skew'] < 3

def test_other_parts_are_not_looked_at():
    d = load_dataset('digits')
    s = split_dataset(d)
    x = d.train_x.clone()
    x[torch.cat([s.val, s.test])] = 255
    other = from_arrays(x, d.train_y, classes=d.classes)
    assert data_features(Split(other, s.train, s.val, s.test, 0, s.mean, s.std)) == data_features(s)

def test_landmarks_of_balanced_classes():
    "Both halves hold every class, however regular the order of the samples is"
    y = np.arange(1000) % 10
    split = split_dataset(from_arrays(np.eye(10)[y] + np.random.default_rng(0).normal(size=(1000, 10))*0.05, y))
    features = data_features(split)
    assert min(features[k] for k in features if k.startswith('landmark_')) == 1 and features['fisher_ratio'] > 10
