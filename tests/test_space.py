"Guards of the search space: random spaces with conditions, files, designs and encodings"
import itertools, json, pickle, random
from collections import Counter

import ConfigSpace
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from scipy.stats import qmc

from llprobe.core import InputError
from llprobe.space import DESIGNS, SearchSpace, _from_unit, _parse, config_id, default_space, describe, load_space

properties = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
words = ['none', 'weak', 'strong', 'grün', '1e-4', 'yes', '']


@st.composite
def entries(draw, finite=False):
    "One hyper-parameter in its long form, without conditions"
    kinds = ['constant', 'numbers', 'words', 'mixed', 'ordered', 'unordered', 'integers'] + ['reals', 'log']*(not finite)
    kind = draw(st.sampled_from(kinds))
    if kind == 'constant': return dict(value=draw(st.sampled_from([0, 1.5, 'word', None, True])))
    if kind == 'numbers': return dict(values=draw(st.lists(st.sampled_from([1, 2, 16, 0.5, 1e-4, -3]), min_size=1, max_size=4, unique=True)))
    if kind == 'words': return dict(values=draw(st.lists(st.sampled_from(words), min_size=1, max_size=4, unique=True)))
    if kind == 'mixed': return dict(values=draw(st.permutations([None, False, 3, 'a'])))
    if kind == 'ordered': return dict(values=draw(st.permutations(words[:3])), ordered=True)
    if kind == 'unordered': return dict(values=draw(st.permutations([4, 8, 2])), ordered=False)
    if kind == 'integers':
        low = draw(st.integers(1, 5))
        return dict(low=low, high=low+draw(st.integers(1, 6)), log=draw(st.booleans()))
    if kind == 'reals':
        low = draw(st.floats(-1e4, 1e4))
        return dict(low=low, high=low+draw(st.floats(0.1, 1e5)), log=False)
    low = 10**draw(st.floats(-6, 3))
    return dict(low=low, high=low*10**draw(st.floats(0.5, 4)), log=True)


def possible(entry):
    "Values that a condition can name"
    if 'low' in entry: return list(range(entry['low'], entry['high']+1)) if isinstance(entry['low'], int) else []
    return entry.get('values', [entry.get('value')])


@st.composite
def spaces(draw, finite=False, choices=False, max_size=6):
    "A space's dict, its hyper-parameters declared in any order"
    written = {}
    for name in draw(st.permutations('abcdef'))[:draw(st.integers(1, max_size))]:
        entry = draw(entries(finite))
        parents = [p for p in written if possible(written[p]) and ('low' not in written[p] or not choices)]
        if parents and draw(st.booleans()):
            chosen = draw(st.lists(st.sampled_from(parents), min_size=1, max_size=2, unique=True))
            values = {p: draw(st.lists(st.sampled_from(possible(written[p])), min_size=1, max_size=2, unique=True)) for p in chosen}
            entry = entry | dict(when={p: v[0] if len(v) == 1 and draw(st.booleans()) else v for p, v in values.items()})
        written[name] = entry
    return dict(architecture='mlp', hyperparameters={name: written[name] for name in draw(st.permutations(list(written)))})


def build(written): return SearchSpace.from_dict(written)

def brute_force(space, values):
    "All configs over `values`, by the definition of a condition"
    names, found = list(values), {}
    for row in itertools.product(*values.values()):
        full = dict(zip(names, row))
        def active(name): return all(active(p) and full[p] in allowed for p, allowed in space.when.get(name, {}).items())
        config = {name: full[name] for name in space.names if active(name)}
        found[config_id(config)] = config
    return found

def draw_some(space, n, seed=0, design='sobol'):
    "`n` configs, or fewer where the space has fewer"
    for k in (n, 5, 1):
        try: return space.sample(k, seed, design)
        except InputError: pass


@properties
@given(spaces(), st.integers(0, 99), st.sampled_from(['sobol', 'random']))
def test_samples_are_valid_distinct_and_encoded_one_to_one(written, seed, design):
    space = build(written)
    configs = draw_some(space, 30, seed, design)
    assert len({config_id(config) for config in configs}) == len(configs)
    for config in configs:
        assert space.validate(config) == config
        assert [type(v) for v in space.validate(config).values()] == [type(v) for v in config.values()]
        assert json.loads(json.dumps(config)) == config
        for name in space.names: assert (name in config) == space.is_active(name, config)
    encoded = space.encode(configs)
    assert encoded.shape == (len(configs), len(space.encoded_names)) and encoded.dtype == np.float64
    assert np.all((0 <= encoded) & (encoded <= 1))
    assert len(np.unique(encoded, axis=0)) == len(configs)
    assert len(set(space.encoded_names)) == len(space.encoded_names)


@properties
@given(spaces(), st.integers(0, 99))
def test_configspace_agrees(written, seed):
    "What we draw is legal there, what it draws is legal here"
    space = build(written)
    for config in draw_some(space, 20, seed):
        theirs = ConfigSpace.Configuration(space.configspace, values=config)
        assert dict(theirs) == config
    space.configspace.seed(seed)
    for theirs in space.configspace.sample_configuration(20): assert space.validate(theirs) == dict(theirs)


@properties
@given(spaces(), st.sampled_from(['.yaml', '.yml', '.json']), st.randoms(use_true_random=False))
def test_files_keep_the_space(tmp_path_factory, written, suffix, shuffler):
    space = build(written)
    path = tmp_path_factory.mktemp('space')/f'space{suffix}'
    space.save(path)
    again = load_space(path)
    names = list(written['hyperparameters'])
    shuffler.shuffle(names)
    shuffled = SearchSpace('mlp', {name: written['hyperparameters'][name] for name in names})
    configs = draw_some(space, 10)
    for other in (again, build(space.to_dict()), pickle.loads(pickle.dumps(space)), shuffled):
        assert other == space and hash(other) == hash(space) and other.digest == space.digest
        assert other.encoded_names == space.encoded_names
        assert draw_some(other, 10) == configs
        assert np.array_equal(other.encode(configs), space.encode(configs))
    assert again.to_dict() == space.to_dict() and again.declared == space.declared


@properties
@given(spaces(), st.integers(0, 99), st.sampled_from(['sobol', 'random']), st.integers(1, 40))
def test_longer_draws_begin_with_shorter_ones(written, seed, design, n):
    space = build(written)
    try: longer = space.sample(40, seed, design)
    except InputError: longer = draw_some(space, 5, seed, design)
    n = min(n, len(longer))
    assert space.sample(n, seed, design) == longer[:n] == build(written).sample(n, seed, design)


@properties
@given(spaces(finite=True, max_size=4), st.integers(0, 99))
def test_finite_spaces_are_drawn_to_the_last_config(written, seed):
    space = build(written)
    size = len(brute_force(space, {name: possible_values(space, name) for name in space.names}))
    assume(size <= 500)
    for design in DESIGNS:
        configs = space.sample(size, seed, design)
        assert len({config_id(config) for config in configs}) == size
        with pytest.raises(InputError, match=f'fewer than {size+1} different configs'): space.sample(size+1, seed, design)

def possible_values(space, name):
    hp = space.configspace[name]
    return list(range(hp.lower, hp.upper+1)) if hasattr(hp, 'lower') else _from_unit(hp, np.linspace(0, 1, int(hp.size), endpoint=False)+1e-9)


@properties
@given(spaces(choices=True, max_size=5), st.integers(0, 99))
def test_grids_cover_every_combination_of_choices(written, seed):
    space = build(written)
    ranges = [name for name in space.names if hasattr(space.configspace[name], 'lower')]
    combinations = brute_force(space, {name: ['range'] if name in ranges else possible_values(space, name) for name in space.names})
    assume(len(combinations) <= 300)
    configs = space.sample(len(combinations), seed, 'grid')
    assert {config_id({k: 'range' if k in ranges else v for k, v in config.items()}) for config in configs} == set(combinations)
    assert configs == space.sample(len(combinations), seed, 'grid')


def test_a_space_of_rare_branches_is_still_exhausted():
    "The last configs of a chain of conditions have probability 8**-5 each, far below what 2,000 draws find"
    values = list(range(8))
    space = SearchSpace('mlp', {f'x{i}': dict(values=values) | (dict(when={f'x{i-1}': 7}) if i else {}) for i in range(5)})
    configs = space.sample(36)
    assert len({config_id(c) for c in configs}) == 36 and space.sample(20) == configs[:20]
    with pytest.raises(InputError): space.sample(37)


def test_an_unreachable_range_does_not_make_a_space_endless():
    space = SearchSpace('mlp', dict(a=[0, 1], b=dict(values=[0, 1], when=dict(a=0)), c=dict(low=0., high=1., when=dict(a=1, b=1))))
    assert len(space.sample(3)) == 3
    with pytest.raises(InputError): space.sample(4)


def test_designs_are_seeded_and_differ():
    space = default_space()
    draws = [space.sample(8, seed, design) for seed in (0, 1) for design in DESIGNS]
    assert len({json.dumps(draw) for draw in draws}) == 6
    assert draws == [default_space().sample(8, seed, design) for seed in (0, 1) for design in DESIGNS]


def test_the_global_random_states_are_untouched():
    before, python = np.random.get_state()[1].copy(), random.getstate()
    for design in DESIGNS: default_space().sample(20, 3, design)
    assert np.array_equal(before, np.random.get_state()[1]) and python == random.getstate()


@pytest.mark.filterwarnings('error')
def test_sobol_is_balanced():
    "Each value of a choice appears its share of times, and real numbers are spread more evenly than by chance"
    space = SearchSpace('mlp', dict(a=dict(low=0., high=1.), b=dict(low=1e-4, high=1., log=True), c=[1, 2, 4, 8], d=dict(low=1, high=8)))
    for name, counts in (('c', 64), ('d', 32)):
        assert set(Counter(config[name] for config in space.sample(256)).values()) == {counts}
    spread = {design: np.mean([qmc.discrepancy(space.encode(space.sample(64, seed, design))[:, :2]) for seed in range(10)]) for design in DESIGNS[:2]}
    assert spread['sobol'] < spread['random']/3


def test_log_integers_own_equal_parts_of_the_logarithm():
    values = _from_unit(_parse('x', dict(low=1, high=4, log=True)), (np.arange(100_000)+0.5)/100_000)
    shares = np.bincount(values)[1:]/100_000
    assert np.allclose(shares, np.log([1.5/0.5, 2.5/1.5, 3.5/2.5, 4.5/3.5])/np.log(4.5/0.5), atol=1e-4)


def test_default_spaces_are_as_specified():
    cnn = default_space('simple_cnn').to_dict()
    assert cnn == dict(architecture='simple_cnn', hyperparameters=dict(
        num_channels=[16, 32, 64], dropout=dict(low=0.0, high=0.5), optimizer=['sgd', 'adam', 'adamw'],
        learning_rate=dict(low=1e-4, high=1.0, log=True), momentum=dict(low=0.0, high=0.99, when=dict(optimizer='sgd')),
        weight_decay=dict(low=1e-6, high=1e-2, log=True), batch_size=[64, 128, 256]))
    assert all('momentum' in c if c['optimizer'] == 'sgd' else 'momentum' not in c for c in default_space().sample(100))
    assert {'width', 'depth'} <= set(default_space('mlp').names) and {'num_channels', 'num_blocks'} <= set(default_space('resnet').names)
    for architecture in ('simple_cnn', 'mlp', 'resnet'):
        assert list(describe(default_space(architecture)).index) == list(default_space(architecture).declared)
    with pytest.raises(InputError, match='choose from simple_cnn, mlp, resnet'): default_space('vgg')


def test_encoding_by_hand():
    space = SearchSpace('mlp', dict(
        learning_rate=dict(low=1e-4, high=1, log=True), width=[64, 128, 512], optimizer=['sgd', 'adam'], depth=dict(low=1, high=5),
        momentum=dict(low=0, high=0.9, when=dict(optimizer='sgd')), mode=dict(values=['a', 'b'], when=dict(optimizer='adam')), seed=3))
    sgd = dict(learning_rate=1e-3, width=128, optimizer='sgd', depth=2, momentum=0.45, seed=3)
    adam = dict(learning_rate=1.0, width=512, optimizer='adam', depth=5, mode='b', seed=3)
    expected = {'learning_rate': (0.25, 1), 'width': (0.5, 1), 'optimizer=sgd': (1, 0), 'optimizer=adam': (0, 1), 'depth': (0.25, 1),
        'momentum': (0.5, 0.5), 'momentum:active': (1, 0), 'mode=a': (0.5, 0), 'mode=b': (0.5, 1), 'mode:active': (0, 1)}
    assert set(space.encoded_names) == set(expected)
    assert np.allclose(space.encode([sgd, adam]), np.array([expected[name] for name in space.encoded_names]).T)
    assert space.encode([]).shape == (0, len(expected))


def test_one_config_has_one_name():
    space = default_space('mlp')
    config = space.sample(1)[0]
    other = {k: np.float32(v) if k == 'width' else v for k, v in reversed(config.items())}
    assert config_id(space.validate(other)) == config_id(config)
    assert list(space.validate(other)) == list(config)
    zero = SearchSpace('mlp', dict(x=dict(low=-1.0, high=1.0)))
    assert len({config_id(zero.validate(dict(x=x))) for x in (0, 0.0, -0.0, np.float64(-0.0), 1e-15)}) == 1


@pytest.mark.parametrize('change, message', [
    (dict(learning_rate=2), r'learning_rate must be a number in \[0.0001, 1.0\], got 2'),
    (dict(learning_rate='0.1'), r'got \'0.1\''), (dict(learning_rate=True), 'got True'), (dict(learning_rate=float('nan')), 'got nan'),
    (dict(num_channels=24), 'num_channels must be one of 16, 32, 64, got 24'), (dict(num_channels=True), 'got True'),
    (dict(num_channels=[16]), r'got \[16\]'), (dict(optimizer='sgd'), 'momentum is missing'),
    (dict(optimizer='rms'), 'optimizer must be one of sgd, adam, adamw'), (dict(momentum=0.5), 'momentum only exists when optimizer is sgd'),
    (dict(lr=1), "unknown hyper-parameter 'lr'")])
def test_wrong_configs_are_named(change, message):
    good = dict(batch_size=64, dropout=0.1, learning_rate=0.1, num_channels=16, optimizer='adam', weight_decay=1e-4)
    space = default_space()
    assert space.validate(good) == good
    with pytest.raises(InputError, match=message): space.validate(good | change)
    with pytest.raises(InputError, match=message): space.encode([good, good | change])


@pytest.mark.parametrize('text, message', [
    ('a: [1', 'cannot be parsed'), ('\x00', 'cannot be parsed'), ('', 'a space has architecture and hyperparameters'), ('- a', 'a space has architecture and hyperparameters'),
    ('architecture: mlp', r"got \['architecture'\]"), ('architecture: mlp\nhyperparameters: {a: 1}\nextra: 2', "'extra'"),
    ('architecture: mlp\nhyperparameters: [a]', 'must map names'), ('architecture: mlp\nhyperparameters: {}', 'must map names'),
    ('architecture: 3\nhyperparameters: {a: 1}', 'architecture must be a name'), ('architecture: mlp\nhyperparameters: {1: 2}', 'must map names')])
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path/'broken.yaml'
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error: load_space(path)
    assert str(error.value).startswith(str(path)) and '\n' not in str(error.value)


@pytest.mark.parametrize('entry, message', [
    ('{low: 1}', 'needs numbers for low and high'), ('{high: 1}', 'needs low and high'), ('{low: 2, high: 1}', 'low must be below high'),
    ('{low: 1, high: 1}', 'low must be below high'), ('{low: 0, high: 1.0, log: true}', 'must start above 0'),
    ('{low: 1e-14, high: 1, log: true}', 'start at 1e-13 or above'), ('{low: .nan, high: 1}', 'finite'), ('{low: 0, high: .inf}', 'finite'),
    ('{low: a, high: b}', 'needs numbers'), ('{low: true, high: 3}', 'needs numbers'), ('{low: 1, high: 2, log: 10}', 'write true or false'),
    ('{low: 1, high: 2, step: 1}', "unknown key 'step'"), ('{values: [a, b], ordered: maybe}', 'write true or false'), ('[]', 'at least one value'),
    ('{}', 'needs low and high'), ('{values: 3}', 'needs a list'), ('[1, 1.0]', 'twice'), ('[[1, 2], [3]]', 'use finite numbers'),
    ('2024-01-01', 'use finite numbers'), ('{value: 1, when: sgd}', 'write another hyper-parameter'), ('{value: 1, when: {}}', 'write another hyper-parameter'),
    ('{value: 1, when: {nope: 1}}', "depends on 'nope'"), ('{value: 1, when: {x: 1}}', "depends on itself"), ('{value: 1, when: {y: c}}', 'y must be one of a, b'),
    ('{value: 1, when: {y: []}}', 'empty list'), ('{value: 1, when: {z: 0.5}}', 'a range of real numbers'), ('{low: 1, low: 2, high: 3}', 'twice')])
def test_wrong_entries_are_named(tmp_path, entry, message):
    path = tmp_path/'space.yaml'
    path.write_text(f"architecture: mlp\nhyperparameters:\n  x: {entry}\n  y: [a, b]\n  z: {{low: 0.0, high: 1.0}}\n")
    with pytest.raises(InputError, match=message) as error: load_space(path)
    assert str(error.value).startswith(str(path)) and '\n' not in str(error.value)


@pytest.mark.parametrize('values', [['sgd', 'rmsprop'], 'rmsprop', dict(low=0, high=2), dict(value='lion'), [1, 2]])
def test_unknown_optimizers_are_refused(values):
    with pytest.raises(InputError, match='unknown optimizer .*choose from sgd, adam, adamw'): SearchSpace('mlp', dict(optimizer=values))


def test_paths(tmp_path):
    with pytest.raises(InputError, match='must end in'): default_space().save(tmp_path/'space.toml')
    with pytest.raises(InputError, match='cannot be read: No such file'): load_space(tmp_path/'none.yaml')
    with pytest.raises(InputError, match='cannot be read: Is a directory'): load_space(tmp_path)
    (tmp_path/'latin.yaml').write_bytes('architecture: größe'.encode('latin-1'))
    with pytest.raises(InputError, match='cannot be parsed'): load_space(tmp_path/'latin.yaml')


@pytest.mark.parametrize('n', [0, -1, 2.5, True, 'all'])
def test_wrong_numbers_are_named(n):
    with pytest.raises(InputError, match='whole number from 1 to a million'): default_space().sample(n)


def test_yaml_reads_exponents_and_python_refuses_tuples(tmp_path):
    (tmp_path/'s.yaml').write_text("architecture: mlp\nhyperparameters: {weight_decay: [0, 1e-4, 5E-3], a: '1e-4', b: {low: 1e-3, high: 1e+1}}")
    assert load_space(tmp_path/'s.yaml').to_dict()['hyperparameters'] == dict(weight_decay=[0, 1e-4, 5e-3], a='1e-4', b=dict(low=1e-3, high=10.0))
    with pytest.raises(InputError, match='tuple'): SearchSpace('mlp', dict(dropout=(0.0, 0.5)))


def test_ten_thousand_configs_are_quick():
    "The meta-model scores that many candidates between two trainings"
    space = default_space()
    configs = space.sample(10_000)
    assert len(configs) == 10_000 and space.encode(configs).shape == (10_000, 10)
