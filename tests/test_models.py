"Guards of the models: closed forms of size and cost, shapes, seeds, gradients, users' architectures"
import importlib, itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from llprobe.core import InputError
from llprobe.models import ARCHITECTURES, architecture_name, build_model, count_parameters, forward_flops
from llprobe.space import default_space

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)]
SMALL = dict(simple_cnn=dict(num_channels=4, dropout=0.3), mlp=dict(width=16, depth=2, dropout=0.3), resnet=dict(num_channels=4, num_blocks=2))
each = pytest.mark.parametrize('architecture, shape', list(itertools.product(ARCHITECTURES, SHAPES)))


def cnn_sides(h, w):
    "Sides before each of the three pools, and after the last"
    sides = [(h, w)]
    for _ in range(3): sides.append((sides[-1][0]//2, sides[-1][1]//2) if min(sides[-1]) > 1 else sides[-1])
    return sides

def resnet_layers(c, k, n, h, w):
    "(channels in, channels out, output area) of each 3×3 convolution"
    layers, c_in = [(k, c, h*w)], c
    for stage in range(3):
        if stage: h, w = -(-h//2), -(-w//2)
        for _ in range(n):
            layers += [(c_in, c*2**stage, h*w), (c*2**stage, c*2**stage, h*w)]
            c_in = c*2**stage
    return layers

def size_and_cost(architecture, config, shape, q):
    "Parameters and multiply-adds in closed form"
    c, k = config.get('num_channels'), shape[0]
    if architecture == 'mlp':
        widths = [torch.Size(shape).numel()] + [config['width']]*config['depth'] + [q]
        return sum((a+1)*b for a, b in zip(widths, widths[1:])), sum(a*b for a, b in zip(widths, widths[1:]))
    if architecture == 'simple_cnn':
        sides, channels = cnn_sides(*shape[1:]), [k, c, 2*c, 4*c]
        pairs = list(zip(channels, channels[1:], sides))
        flat = 4*c*sides[3][0]*sides[3][1]
        size = sum((9*a+1)*b for a, b, _ in pairs) + (flat+1)*512 + 513*q
        return size, sum(9*a*b*s[0]*s[1] for a, b, s in pairs) + flat*512 + 512*q
    layers = resnet_layers(c, k, config['num_blocks'], *shape[1:])
    return sum(9*a*b + 2*b for a, b, _ in layers) + (4*c+1)*q, sum(9*a*b*area for a, b, area in layers) + 4*c*q


@each
def test_size_cost_and_shape(architecture, shape):
    model = build_model(architecture, SMALL[architecture], shape, 7)
    assert (count_parameters(model), forward_flops(model, shape)) == size_and_cost(architecture, SMALL[architecture], shape, 7)
    assert model.training and model(torch.rand(3, *shape)).shape == (3, 7)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(ARCHITECTURES)), st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)), st.integers(1, 5), st.integers(1, 4), st.integers(1, 12))
def test_any_shape_and_size(architecture, shape, channels, depth, n_classes):
    config = dict(num_channels=channels, num_blocks=depth, width=channels, depth=depth-1)
    model = build_model(architecture, config, shape, n_classes).eval()
    assert model(torch.rand(2, *shape)).shape == (2, n_classes)
    assert (count_parameters(model), forward_flops(model, shape)) == size_and_cost(architecture, config, shape, n_classes)


def test_known_sizes():
    "He et al. 2016, table 6: 0.27M, 0.46M, 0.66M and 0.85M parameters; ResNet-20 costs 41M multiply-adds"
    sizes = [count_parameters(build_model('resnet', dict(num_channels=16, num_blocks=n), (3, 32, 32), 10)) for n in (3, 5, 7, 9)]
    assert [round(size/1e6, 2) for size in sizes] == [0.27, 0.46, 0.66, 0.85]
    assert round(forward_flops(build_model('resnet', {}, (3, 32, 32), 10), (3, 32, 32))/1e6) == 41


@each
def test_gradients_reach_every_parameter(architecture, shape):
    model = build_model(architecture, SMALL[architecture] | dict(dropout=0.0), shape, 5)
    nn.functional.cross_entropy(model(torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))), torch.arange(8) % 5).backward()
    for name, p in model.named_parameters(): assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@each
def test_channels_last_computes_the_same(architecture, shape):
    model, x = build_model(architecture, SMALL[architecture], shape, 5).eval(), torch.rand(4, *shape)
    with torch.no_grad():
        plain = model(x)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert torch.allclose(plain, last, atol=1e-5)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_seeds(architecture):
    def weights(seed): return build_model(architecture, {}, (1, 8, 8), 10, seed=seed).state_dict()
    torch.manual_seed(11)
    before, first, second = torch.get_rng_state(), weights(3), weights(3)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(12)
    again, other = weights(3), weights(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if name.endswith('weight') and first[name].ndim > 1)


def test_the_random_state_survives_an_error_and_a_foreign_default_device():
    def failing(config, input_shape, n_classes): raise RuntimeError(f'after a draw of {torch.rand(1)}')
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError): build_model(failing, {}, (4,), 2)
    assert torch.equal(before, torch.get_rng_state())
    reference = build_model('mlp', {}, (4,), 2)
    torch.set_default_device('meta')
    try: model = build_model('mlp', {}, (4,), 2)
    finally: torch.set_default_device(None)
    assert torch.equal(model[1].weight, reference[1].weight)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_every_default_config_builds_and_depends_on_each_of_its_sizes(architecture):
    space = default_space(architecture)
    training = {'optimizer', 'learning_rate', 'momentum', 'weight_decay', 'batch_size'}
    for config in space.sample(5): assert count_parameters(build_model(architecture, config, (1, 8, 8), 10)) > 0
    config = space.sample(1)[0]
    for name in set(space.names) - training:
        hp = space.configspace[name]
        low, high = (config | {name: value} for value in ((hp.lower, hp.upper) if hasattr(hp, 'lower') else (hp.sequence[0], hp.sequence[-1])))
        assert repr(build_model(architecture, low, (1, 8, 8), 10)) != repr(build_model(architecture, high, (1, 8, 8), 10))


def test_dropout_is_where_it_says():
    model = build_model('simple_cnn', dict(dropout=0.25), (1, 8, 8), 10)
    assert [type(m).__name__ for m in model][-4:] == ['Linear', 'ReLU', 'Dropout', 'Linear'] and model[-2].p == 0.25
    assert sum(isinstance(m, nn.Dropout) for m in build_model('mlp', dict(depth=3), (4,), 2)) == 3


def test_measuring_leaves_the_model_as_it_was():
    model = build_model('resnet', SMALL['resnet'], (3, 16, 16), 4)
    model[1].eval()
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    before = torch.get_rng_state()
    forward_flops(model, (3, 16, 16))
    assert [m.training for m in model.modules()] == modes and torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_flops_count_matrix_products_of_any_kind():
    class Attention(nn.Module):
        def forward(self, x): return (x @ x.transpose(1, 2)) @ x
    assert forward_flops(Attention(), (5, 3)) == 2*5*5*3
    assert forward_flops(nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 6, 6)) == 6*6*9*8
    assert count_parameters(nn.Linear(3, 2).requires_grad_(False)) == 0


def test_users_architectures(tmp_path, monkeypatch):
    (tmp_path/'user_networks.py').write_text('''
from torch import nn
def wide(config, input_shape, n_classes):
    config['changed'] = True
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(config['width']), nn.BatchNorm1d(config['width']), nn.LazyLinear(n_classes))
def wrong(config, input_shape, n_classes): return nn.Flatten()
def nothing(config, input_shape, n_classes): return None
value = 3
''')
    monkeypatch.syspath_prepend(tmp_path)
    config = dict(width=6)
    model = build_model('user_networks:wide', config, [2, 3], 4)
    assert config == dict(width=6) and count_parameters(model) == 7*6 + 12 + 7*4 and model[2].training
    wide = importlib.import_module('user_networks').wide
    assert architecture_name(wide) == 'user_networks:wide' == architecture_name('user_networks:wide')
    for a, b in zip(model.parameters(), build_model(wide, config, (2, 3), 4).parameters()): assert torch.equal(a, b)
    assert model[2].num_batches_tracked == 0
    for name, message in dict(wrong=r'into outputs \(2, 4\), got \(2, 6\)', nothing='must return a torch.nn.Module, got NoneType', value='is a int, not a function',
            missing='cannot be imported').items():
        with pytest.raises(InputError, match=message) as error: build_model(f'user_networks:{name}', {}, (2, 3), 4)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('architecture', ['vgg', '', 'no_such_package:f', 'torch:', ':f', '.relative:f', 3, None])
def test_unknown_architectures_are_refused(architecture):
    with pytest.raises(InputError, match='simple_cnn, mlp, resnet|cannot be imported'): build_model(architecture, {}, (1, 8, 8), 10)


@pytest.mark.parametrize('architecture, config, message', [
    ('simple_cnn', dict(num_channels=0), 'num_channels must be a whole number of at least 1, got 0'),
    ('simple_cnn', dict(num_channels='many'), "got 'many'"), ('simple_cnn', dict(num_channels=2.5), 'got 2.5'), ('simple_cnn', dict(num_channels=True), 'got True'),
    ('mlp', dict(width=float('nan')), 'got nan'), ('mlp', dict(depth=-1), 'depth must be'), ('mlp', dict(dropout=1.0), r'dropout must be a number in \[0, 1\)'),
    ('mlp', dict(width=float('inf')), 'got inf'), ('resnet', dict(num_blocks=0), 'num_blocks must be')])
def test_wrong_configs_are_named(architecture, config, message):
    with pytest.raises(InputError, match=message): build_model(architecture, config, (1, 8, 8), 10)


@pytest.mark.parametrize('architecture', ['simple_cnn', 'resnet'])
def test_tables_are_for_the_perceptron(architecture):
    with pytest.raises(InputError, match=rf'{architecture} needs images .*\(30,\): use mlp'): build_model(architecture, {}, (30,), 2)
    assert build_model('mlp', {}, (30,), 2)(torch.zeros(1, 30)).shape == (1, 2)
