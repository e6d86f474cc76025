"Landscapes and paths against closed forms; orientation, holes, memory, files"
import subprocess
import sys
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from llprobe.batches import evaluate
from llprobe.directions import Plane, adversarial_plane, eigenvector_plane, random_plane, three_solutions_plane, trajectory_plane
from llprobe.landscape import Landscape, axis_points, load_landscape, loss_landscape, progressive_landscape, trajectory_losses
from llprobe.paths import along_curve, barrier, bezier_curve, interpolate, swa_gap
from llprobe.points import evaluate_points
from test_curvature import ONE, Quadratic, form, random_symmetric
from test_perturbation import ZOO, prepare, same, snapshot

warnings.filterwarnings('ignore')


@pytest.mark.parametrize('name', ZOO)
@pytest.mark.parametrize('n_directions', [1, 2])
def test_fast_routes_agree_with_the_plain_one(name, n_directions):
    model, x, y = prepare(name)
    plane = random_plane(model, n_directions=n_directions, ignore_bias_norm=False)
    points = [(0., 0.), (1., 0.), (0., -1.), (0.5, 2.), (-1., 0.3)] if n_directions == 2 else [0., -1., 0.7]
    plain, cost = evaluate_points(model, plane.directions, points, x, y, 'all', 'plain', batch_size=5)
    fast, same_cost = evaluate_points(model, plane.directions, points, x, y, 'all', batch_size=5)
    assert cost == same_cost == len(points)*12
    for quantity in plain: assert np.allclose(plain[quantity], fast[quantity], rtol=1e-4, atol=1e-5)
    stacked, _ = evaluate_points(model, plane.directions, points, x, y, 'all', 'stacked', batch_size=5)
    for quantity in plain: assert np.allclose(plain[quantity], stacked[quantity], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('layer', [nn.Conv1d(3, 4, 2), nn.Conv1d(3, 4, 2, padding='same', padding_mode='circular'), nn.Conv1d(3, 6, 1, groups=3, bias=False),
    nn.Linear(7, 4), nn.ConvTranspose1d(3, 4, 2)])
def test_first_layers_of_every_kind(layer):
    model = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    x, y = torch.randn(20, 3, 7), torch.arange(20) % 3
    directions = random_plane(model, ignore_bias_norm=False).directions
    points = [(a, b) for a in (-1., 0., 1.) for b in (0., 2.)]
    plain, fast = (evaluate_points(model, directions, points, x, y, route=r)[0]['loss'] for r in ('plain', 'sequential'))
    assert np.allclose(plain, fast, rtol=1e-5)
    assert 'forward' not in layer.__dict__


def test_a_layer_that_the_model_also_reads_directly_is_not_replaced_wrongly():
    class Reads(nn.Module):
        "Uses the first layer's weight a second time, past the layer"
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x): return self.first(x)@self.first.weight
    model, x, y = Reads(), torch.randn(20, 3), torch.arange(20) % 3
    directions = random_plane(model).directions
    plain, fast = (evaluate_points(model, directions, [(1., 0.), (0.5, 2.)], x, y, route=r)[0]['loss'] for r in ('plain', 'sequential'))
    assert np.allclose(plain, fast, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 9), st.integers(3, 9), st.floats(0.1, 3), st.floats(0.1, 3), st.integers(1, 3))
def test_axes_of_planes_that_are_not_square(n_x, n_y, left, right, n_levels):
    unit = [dict(w=e) for e in torch.eye(2, dtype=torch.double)]
    model = Quadratic([0.3, -0.2])
    options = dict(plane=Plane(unit, 'unit'), radius=((-left, right), 0.5), n=(n_x, n_y), loss_fn=form([[2., 0.], [0., 20.]]))
    found = loss_landscape(model, ONE, ONE, **options)
    X, Y = np.meshgrid(found.coords['x'], found.coords['y'], indexing='ij')
    assert found.shape == (n_x, n_y) and np.allclose(found.values['loss'], (0.3+X)**2+10*(Y-0.2)**2)
    assert found.centre == dict(x=0., y=0., loss=pytest.approx(0.3**2+10*0.2**2))
    assert found.sel(x=right, y=-0.5)['loss'] == pytest.approx((0.3+right)**2+10*0.7**2)
    last = list(progressive_landscape(model, ONE, ONE, n_levels=n_levels, **options))[-1]
    assert np.array_equal(last.values['loss'], found.values['loss']) and last.facts['cost'] == found.facts['cost'] == n_x*n_y


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 10), st.floats(0.01, 10), st.integers(3, 60))
def test_zero_is_on_every_axis(low, high, n):
    axis = axis_points(-low, high, n)
    assert len(axis) == n and axis[0] == -low and axis[-1] == high and (axis == 0).sum() == 1 and (np.diff(axis) > 0).all()


def test_progressive_grids_are_nested_and_the_model_is_free_in_between():
    model, x, y = prepare('cnn_batchnorm')
    before, seen = snapshot(model), []
    for grid in progressive_landscape(model, x, y, n=(13, 8), n_levels=3):
        assert same(before, snapshot(model)) and grid.centre['loss'] == pytest.approx(evaluate(model, x, y)['loss'], rel=1e-5)
        frame = grid.to_frame().set_index(['x', 'y']).loss
        if seen: assert frame.loc[seen[-1].index].equals(seen[-1])
        seen.append(frame)
    generator = progressive_landscape(model, x, y)
    next(generator)
    generator.close()
    assert same(before, snapshot(model))


def test_the_centre_is_exact():
    for name in ('mlp', 'cnn_batchnorm', 'sequence'):
        model, x, y = prepare(name)
        assert loss_landscape(model, x, y, n=3).centre['loss'] == pytest.approx(evaluate(model, x, y)['loss'], rel=1e-6)


def test_holes_stay_holes():
    unit = [dict(w=e) for e in torch.eye(2, dtype=torch.double)]
    found = loss_landscape(Quadratic([1., 1.]), ONE, ONE, Plane(unit, 'unit'), 2, (9, 5), quantities='all', loss_fn=lambda o, t: o[:, 0].log().mean())
    X = np.repeat(found.coords['x'][:, None], 5, 1)
    assert np.array_equal(np.isnan(found.values['loss']), X < -1) and np.isneginf(found.values['loss'][X == -1]).all()


def test_files_keep_everything(tmp_path):
    values = np.array([[1., np.nan], [np.inf, -2.], [0.1, 1e-300]])
    made = Landscape(('x', 'y'), dict(x=np.array([0., 1., 2.]), y=np.array([-1., 1.])), dict(loss=values), np.array([[0.5, 0.5]]), dict(kind='test', n=np.int64(3)))
    made.save(tmp_path/'a.npz')
    again = load_landscape(tmp_path/'a.npz')
    assert np.array_equal(again.values['loss'], values, equal_nan=True) and np.array_equal(again.marks, made.marks) and again.facts == dict(kind='test', n=3)
    made.to_vts(tmp_path/'a.vts', height='loss', factor=2.)
    root = ElementTree.parse(tmp_path/'a.vts').getroot()
    points = np.array(root.find('.//Points/DataArray').text.split(), float).reshape(-1, 3)
    losses = np.array(root.find('.//PointData/DataArray').text.split(), float)
    for point, loss in zip(points, losses):
        exact = made.sel(x=point[0], y=point[1])['loss']
        assert loss == exact or np.isnan(loss) and np.isnan(exact)
        assert point[2] == (2*exact if np.isfinite(exact) else 0)
    line = Landscape(('t',), dict(t=np.array([0., 1.])), dict(loss=np.array([3., 4.])))
    line.to_vts(tmp_path/'b.vts')
    assert ElementTree.parse(tmp_path/'b.vts').getroot().find('.//Piece').get('Extent') == '0 1 0 0 0 0'
    for call in (lambda: made.save(tmp_path/'a.txt'), lambda: load_landscape(tmp_path/'none.npz'), lambda: made.to_vts(tmp_path/'c.vts', 'gain')):
        with pytest.raises(ValueError): call()
    np.savez(tmp_path/'other.npz', a=np.ones(2))
    with pytest.raises(ValueError, match='no landscape'): load_landscape(tmp_path/'other.npz')


def test_a_plane_holds_three_copies_of_the_weights():
    "Peak memory of a plane on a model of 100 MB, over what was in use before, in copies of the weights"
    code = '''
import torch
from torch import nn
from llprobe.landscape import loss_landscape
torch.set_num_threads(1)
model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(2000, 2000), nn.ReLU())], nn.Linear(2000, 10))
x, y = torch.randn(32, 2000), torch.arange(32) % 10
loss_landscape(nn.Linear(4, 3), torch.randn(9, 4), torch.arange(9) % 3, n=3)
model(x)
status = lambda key: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(key))
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
loss_landscape(model, x, y, n=3)
print((status('VmHWM')-before)*1024/sum(p.numel()*4 for p in model.parameters()))
'''
    if not sys.platform.startswith('linux'): pytest.skip('reads /proc')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if 'clear_refs' in run.stderr: pytest.skip('the peak cannot be reset here')
    assert float(run.stdout) < 3.2, run.stderr


def test_trajectories_and_their_shadow():
    torch.manual_seed(0)
    model = Quadratic(torch.zeros(5))
    path = [dict(w=torch.tensor([3.*0.5**t, 2.*0.8**t, 0.01*t, 0, 0], dtype=torch.double)) for t in range(8)]
    plane = trajectory_plane(model, path)
    table = trajectory_losses(model, plane, path, ONE, ONE, loss_fn=form(torch.eye(5)))
    assert table.loss.tolist() == pytest.approx([float(p['w'].square().sum())/2 for p in path])
    assert sum(plane.facts['explained']) == pytest.approx(1, abs=1e-3) and plane.facts['explained'][0] > plane.facts['explained'][1]
    assert np.allclose(table.plane_loss, table.loss, atol=0.05) and table.distance.iloc[-1] == pytest.approx(0, abs=1e-9)
    assert np.allclose(plane.marks[-1], 0) and (plane.marks[0] >= 0).all()


def test_three_solutions_are_on_their_marks():
    solutions = [Quadratic([1., 0., 2.]), Quadratic([0., 3., 1.]), Quadratic([2., 2., 2.])]
    plane = three_solutions_plane(solutions[2], solutions)
    found, _ = evaluate_points(solutions[2], plane.directions, plane.marks, ONE, ONE, origin=plane.origin, loss_fn=form(torch.eye(3)))
    assert found['loss'].tolist() == pytest.approx([2.5, 5, 6])
    grid = loss_landscape(solutions[2], ONE, ONE, plane, n=9, loss_fn=form(torch.eye(3)))
    assert grid.centre['loss'] == pytest.approx(2.5)
    for mark in plane.marks: assert grid.coords['x'][0] < mark[0] < grid.coords['x'][-1] and grid.coords['y'][0] < mark[1]+1e-9 < grid.coords['y'][-1]


def test_eigenvector_and_adversarial_planes_of_a_quadratic():
    A = random_symmetric([9., 4., 1., -2.])
    model = Quadratic(torch.zeros(4))
    plane = eigenvector_plane(model, ONE, ONE, 1, 1, loss_fn=form(A))
    grid = loss_landscape(model, ONE, ONE, plane, 1., 5, loss_fn=form(A))
    X, Y = np.meshgrid(grid.coords['x'], grid.coords['y'], indexing='ij')
    assert np.allclose(grid.values['loss'], (9*X**2-2*Y**2)/2, atol=1e-2)
    worst = adversarial_plane(model, ONE, ONE, 0.5, n_steps=60, loss_fn=form(A))
    along = evaluate_points(model, worst.directions, worst.marks, ONE, ONE, loss_fn=form(A))[0]['loss'][0]
    assert along == pytest.approx(9*0.25/2, rel=1e-3)


def test_double_well_and_barriers():
    well = lambda o, t: (o[:, 0]**2-1).square().mean()
    line = interpolate(Quadratic([0.]), Quadratic([-1.]), Quadratic([1.]), ONE, ONE, n=101, loss_fn=well)
    assert line.facts['barrier'] == pytest.approx(1) and line.facts['height'] == pytest.approx(1)
    downhill = interpolate(Quadratic([0.]), Quadratic([2.]), Quadratic([1.]), ONE, ONE, n=101, loss_fn=lambda o, t: o[:, 0].square().mean())
    assert downhill.facts['barrier'] == 0 and downhill.facts['height'] == 0
    assert np.isnan(barrier(np.linspace(0, 1, 3), np.array([np.nan, 1, 2]))['height'])


def test_paths_between_networks_with_batchnorm():
    model, x, y = prepare('cnn_batchnorm')
    other, *_ = prepare('cnn_batchnorm')
    with torch.no_grad():
        for t in [*other.parameters(), other[1].running_mean]: t.add_(0.3*torch.randn_like(t))
    before = snapshot(model), snapshot(other)
    stale = interpolate(model, model, other, x, y, n=3, batchnorm='stale', quantities='all')
    for end, net in ((0, model), (-1, other)):
        for name, value in evaluate(net, x, y).items(): assert stale.values[name][end] == pytest.approx(value, rel=1e-5)
    control, _ = bezier_curve(model, model, other, x, y, n_steps=5, seed=1)
    assert all(torch.equal(control[n], t) for n, t in bezier_curve(model, model, other, x, y, n_steps=5, seed=1)[0].items())
    assert not all(torch.equal(control[n], t) for n, t in bezier_curve(model, model, other, x, y, n_steps=5, seed=2)[0].items())
    curved = along_curve(model, model, control, other, x, y, n=3, batchnorm='stale')
    assert curved.values['loss'][[0, -1]] == pytest.approx(stale.values['loss'][[0, -1]], rel=1e-5)
    assert same(before, (snapshot(model), snapshot(other)))


def test_a_trained_curve_is_lower_than_the_line_between_two_trained_networks():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(150) % 3
    x = torch.stack([(y*2.1).cos(), (y*2.1).sin()], 1)+0.5*torch.randn(150, 2, generator=generator)
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 3))
        optimiser = torch.optim.Adam(net.parameters(), 0.02)
        for step in range(150):
            optimiser.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimiser.step()
        nets.append(net)
    line = interpolate(nets[0], *nets, x, y)
    control, _ = bezier_curve(nets[0], *nets, x, y, n_steps=300, learning_rate=0.02)
    curve = along_curve(nets[0], nets[0], control, nets[1], x, y)
    assert curve.facts['barrier'] < 0.5*line.facts['barrier']


def test_swa_of_a_circling_optimiser():
    path = [Quadratic([np.cos(a), np.sin(a)]) for a in np.linspace(0, 2*np.pi, 8, endpoint=False)]
    found = swa_gap(path[0], path, ONE, ONE, loss_fn=form(torch.eye(2)))
    assert found['loss'] == pytest.approx(0.5) and found['swa_loss'] == pytest.approx(0, abs=1e-12) and found['gap'] == pytest.approx(0.5)


def test_regression_and_wrong_planes():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randn(20, 2)
    found = loss_landscape(model, x, y, n=3, quantities='all', loss_fn=nn.MSELoss())
    assert list(found.values) == ['loss'] and found.centre['loss'] == pytest.approx(F.mse_loss(model(x), y).item())
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for plane in (Plane([], 'none'), Plane([direction]*3, 'three'), Plane([dict(weight=torch.full((2, 3), np.nan))], 'nan'), Plane([dict(gain=torch.ones(2))], 'other')):
        with pytest.raises(ValueError): loss_landscape(model, x, y, plane, loss_fn=nn.MSELoss())
    for options in (dict(n=2), dict(n=(3, 3, 3)), dict(radius=0), dict(radius=(1, 2, 3)), dict(radius=((1, -1), 1)), dict(quantities='some'), dict(route='fast')):
        with pytest.raises(ValueError): loss_landscape(model, x, y, **options, loss_fn=nn.MSELoss())


def small(n_features=5, n_classes=3, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n_features, 7), nn.Tanh(), nn.Linear(7, n_classes))
    return model, torch.randn(64, n_features), torch.randint(n_classes, (64,))


def elsewhere(model, seed=1):
    "A state dict away from the model's"
    torch.manual_seed(seed)
    return {k: v+0.5*torch.randn_like(v) for k, v in model.state_dict().items()}


def test_a_path_from_or_to_the_model_itself_does_not_move_with_it():
    model, x, y = small()
    init, own = elsewhere(model), {k: v.clone() for k, v in model.state_dict().items()}
    expected = interpolate(model, init, own, x, y, n=5).values['loss']
    assert len(set(expected.round(6))) > 1
    for end in (model, model.state_dict(), dict(model.named_parameters())):
        assert np.array_equal(interpolate(model, init, end, x, y, n=5).values['loss'], expected)
        assert np.array_equal(interpolate(model, end, init, x, y, n=5).values['loss'], expected[::-1])
    one, two = (bezier_curve(model, init, end, x, y, n_steps=5)[0] for end in (model, own))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_points_on_the_axes_of_directions_that_share_no_weight():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.o = nn.Embedding(6, 4), nn.Linear(4, 3)
        def forward(self, x): return self.o(self.e(x).mean(1))
    torch.manual_seed(0)
    model, x, y = Embedded(), torch.randint(6, (32, 5)), torch.randint(3, (32,))
    directions = [{'o.weight': torch.randn(3, 4)}, {'e.weight': torch.randn(6, 4)}]
    points = [(0, 0), (1, 0), (0, .5), (0, -.5)]
    plain, fast = (evaluate_points(model, directions, points, x, y, route=r)[0]['loss'] for r in ('plain', 'sequential'))
    assert np.allclose(plain, fast, rtol=1e-5) and len(set(plain.round(5))) == 4


@pytest.mark.parametrize('strength', [1e-5, 1e-4, 1e-2])
def test_a_loss_that_reads_the_weights(strength):
    model, x, y = small()
    def loss_fn(outputs, targets): return F.cross_entropy(outputs, targets)+strength*sum(p.square().sum() for p in model.parameters())
    plane = random_plane(model)
    plain, fast = (evaluate_points(model, plane.directions, [(0, 0), (1, 1), (-1, .5)], x, y, route=r, loss_fn=loss_fn)[0]['loss'] for r in ('plain', 'sequential'))
    assert np.allclose(plain, fast, rtol=5e-5)


def test_what_a_frozen_weight_would_have_to_do_is_refused():
    model, x, y = small()
    others = [elsewhere(model, s) for s in (1, 2)]
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="differ in '0.weight', which does not require gradients"): three_solutions_plane(model, [model, *others])
    with pytest.raises(ValueError, match="differ in '0.weight'"): trajectory_plane(model, [*others, model])
    with pytest.raises(ValueError, match="a direction moves '0.weight'"): evaluate_points(model, [{'0.weight': torch.ones(7, 5)}], [1.], x, y)


@pytest.mark.parametrize('shape', [(2, 3), (6,), (1, 2, 1)])
def test_points_of_another_shape_are_refused(shape):
    model, x, y = small()
    with pytest.raises(ValueError, match=r'points must have shape \(p, 2\)'): evaluate_points(model, random_plane(model).directions, np.zeros(shape), x, y)


def test_a_line_that_leaves_out_the_solution_has_no_centre():
    model, x, y = small()
    line = loss_landscape(model, x, y, random_plane(model, n_directions=1), radius=[(0.5, 1)], n=3)
    with pytest.raises(ValueError, match='does not contain the solution'): line.centre


def test_a_mask_of_infinities_is_no_diverged_weight():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer('mask', torch.full((5, 5), -torch.inf).triu(1))
        def forward(self, x): return self.layer(((x@x.transpose(1, 2)+self.mask).softmax(-1)@x).mean(1))
    torch.manual_seed(0)
    model, x, y = Masked(), torch.randn(8, 5, 4), torch.randint(3, (8,))
    others = [{k: v+torch.randn_like(v) if 'layer' in k else v for k, v in model.state_dict().items()} for _ in range(2)]
    assert np.isfinite(interpolate(model, others[0], model, x, y, n=3).values['loss']).all()
    assert np.isfinite(loss_landscape(model, x, y, three_solutions_plane(model, [model, *others]), n=5).values['loss']).all()


@pytest.mark.parametrize('spoil', [lambda m: m[0].bias.requires_grad_(False).fill_(torch.nan), lambda m: m[1].running_mean.fill_(torch.nan)])
def test_weights_that_do_not_move_must_be_finite_too(spoil):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with torch.no_grad(): spoil(model)
    with pytest.raises(ValueError, match='weights must be finite'): loss_landscape(model, torch.randn(16, 5), torch.randint(3, (16,)), n=3)


def test_too_few_weights_for_a_plane():
    model, x = nn.Linear(1, 1, bias=False), torch.randn(8, 1)
    with pytest.raises(ValueError, match='too few weights'): random_plane(model, orthogonal=True)
    with pytest.raises(ValueError, match='too few weights'): adversarial_plane(model, x, x, loss_fn=F.mse_loss)


def test_names_of_quantities_are_escaped_for_paraview(tmp_path):
    odd = Landscape(('x',), dict(x=np.array([0., 1.])), {'a<b & "c"': np.array([1., 2.])})
    odd.to_vts(tmp_path/'odd.vts')
    names = [a.get('Name') for a in ElementTree.parse(tmp_path/'odd.vts').iter('DataArray')]
    assert names == ['a<b & "c"', 'Points']
    with pytest.raises(ValueError, match='must end in .vts'): odd.to_vts(tmp_path/'odd.txt')


@pytest.mark.parametrize('argument', [dict(n_levels=0), dict(n_levels=-1)])
def test_no_level_is_no_landscape(argument):
    model, x, y = small()
    with pytest.raises(ValueError, match='n_levels must be at least 1'): next(progressive_landscape(model, x, y, **argument))


def test_planes_and_trajectories_state_their_cost():
    model, x, y = small()
    assert adversarial_plane(model, x, y, n_steps=2).facts['cost'] >= 2*3*64  # two gradients at least
    path = [elsewhere(model, s) for s in range(3)]
    plane = trajectory_plane(model, path)
    assert trajectory_losses(model, plane, path, x, y).attrs['cost'] == 2*3*64  # three points of the plane, three checkpoints
