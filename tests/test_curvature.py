"The Hessian's measures against dense matrices, curvlinops and closed forms"
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from llprobe.batches import _PlainWeightNorm
from llprobe.curvature import Krylov, extreme_eigenvalues, hessian
from llprobe.spectrum import by_layer, gradient_noise_scale, hessian_trace, relative_flatness, spectral_density
from test_perturbation import ZOO, prepare

warnings.filterwarnings('ignore')


class Quadratic(nn.Module):
    "Outputs its weights, so that the loss can be a quadratic form of them"
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w, dtype=torch.double))

    def forward(self, x): return self.w.expand(len(x), -1)


def form(matrix):
    matrix = torch.as_tensor(matrix, dtype=torch.double)
    return lambda outputs, targets: torch.einsum('ni,ij,nj->n', outputs, matrix, outputs).mean()/2


ONE = torch.zeros(1, 1)


def random_symmetric(eigenvalues, seed=0):
    values = torch.as_tensor(eigenvalues, dtype=torch.double)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.double, generator=torch.Generator().manual_seed(seed)))
    return basis@torch.diag(values)@basis.T


def test_indefinite_quadratic():
    values = [-4., -1., 0., 0.5, 2., 7.]
    A = random_symmetric(values)
    model, loss_fn = Quadratic(torch.randn(6)), form(A)
    with hessian(model, ONE, ONE, loss_fn=loss_fn) as H: assert torch.allclose(H.dense(), A, atol=1e-12)
    found = extreme_eigenvalues(model, ONE, ONE, 2, 2, loss_fn=loss_fn)
    assert found.top == pytest.approx([7, 2], abs=1e-6) and found.bottom == pytest.approx([-4, -1], abs=1e-6)
    vector = found.vectors[2]['w']
    assert float((A@vector+4*vector).norm()) <= found.residuals[2]+1e-6
    plain = hessian_trace(model, ONE, ONE, tolerance=1e-9, max_products=2000, loss_fn=loss_fn)
    spread = math.sqrt(2*float(A.square().sum()-A.diag().square().sum()))
    assert plain.standard_error*math.sqrt(2000) == pytest.approx(spread, rel=0.1)
    assert abs(plain.value-sum(values)) < 4*plain.standard_error


def test_hutchinson_is_exact_on_a_diagonal_and_stops_early():
    model = Quadratic(torch.randn(5))
    found = hessian_trace(model, ONE, ONE, loss_fn=form(torch.diag(torch.tensor([3., -1., 2., 0., 1.]))))
    assert found.value == pytest.approx(5, abs=1e-12) and found.standard_error < 1e-12 and found.n_draws == 8 and found.converged


def test_hutchpp_on_low_rank_is_exact():
    values = [10., -5.]+[0.]*10
    found = hessian_trace(Quadratic(torch.randn(12)), ONE, ONE, 'hutch++', rank=4, loss_fn=form(random_symmetric(values)))
    assert found.value == pytest.approx(5, abs=1e-8)


def test_a_trace_of_zero_runs_out_of_draws_and_says_so():
    found = hessian_trace(Quadratic(torch.randn(6)), ONE, ONE, max_products=12, loss_fn=form(random_symmetric([1., -1., 2., -2., 3., -3.])))
    assert not found.converged and found.n_draws == 12


@pytest.mark.parametrize('name', [n for n in ZOO])
def test_products_on_every_kind_of_model(name):
    "Against torch.func's dense Hessian, or that of double backward where `func` fails"
    model, x, y = prepare(name)
    model.double().eval()
    x = tuple(t.double() for t in x) if isinstance(x, tuple) else x.double() if x.is_floating_point() else x
    free = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if name in ('untracked_batchnorm',): batch_size = None
    else: batch_size = 5
    def loss(flat):
        parts, tree = flat.split([p.numel() for p in free.values()]), {}
        for (n, p), part in zip(free.items(), parts): tree[n] = part.view_as(p)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.cross_entropy(torch.func.functional_call(model, tree, x), y)
    flat = torch.cat([p.reshape(-1) for p in free.values()])
    with torch.backends.mkldnn.flags(enabled=False), _PlainWeightNorm(): exact = torch.autograd.functional.hessian(loss, flat)
    for memory in (2**31, 0):
        with hessian(model, x, y, batch_size=batch_size, memory=memory) as H:
            for seed in range(3):
                v = torch.randn(H.size, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
                assert torch.allclose(H.product(v), exact@v, atol=1e-9)


def test_against_curvlinops_with_ragged_batches():
    curvlinops = pytest.importorskip('curvlinops')
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    x, y = torch.randn(50, 5).double(), torch.arange(50) % 4
    data = list(zip(x.split(16), y.split(16))) # 16, 16, 16, 2
    theirs = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data, check_deterministic=False)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.double)
    with hessian(model, x, y, batch_size=16) as H: assert torch.allclose(H.product(v), theirs@v, atol=1e-12)
    dense = theirs@torch.eye(len(v), dtype=torch.double)
    exact = torch.linalg.eigvalsh(dense)
    found = extreme_eigenvalues(model, data, n_top=3, n_bottom=1)
    assert found.top == pytest.approx(exact[-3:].flip(0).tolist(), rel=1e-3) and found.risk <= 0.01
    trace = hessian_trace(model, data, method='hutch++', rank=20, tolerance=0.02, max_products=400)
    assert abs(trace.value-float(exact.sum())) < 4*trace.standard_error+1e-9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=25), st.integers(1, 4), st.integers(0, 2), st.integers(0, 1000))
@example([0, 0, 3, -1, 0, 0, 3, 0, 1], 2, 0, 0)  # the second 3 was hidden by a direction that rounding had made
def test_repeated_eigenvalues_are_found(values, n_top, n_bottom, seed):
    "Small integers: most are repeated"
    n_top, n_bottom = min(n_top, len(values)-1), min(n_bottom, len(values)-min(n_top, len(values)-1))
    model = Quadratic(torch.randn(len(values), generator=torch.Generator().manual_seed(seed)))
    found = extreme_eigenvalues(model, ONE, ONE, n_top, n_bottom, loss_fn=form(random_symmetric([float(v) for v in values], seed)), seed=seed)
    ordered = sorted(map(float, values))
    scale = max(map(abs, ordered)) or 1.
    assert found.top == pytest.approx(ordered[::-1][:n_top], abs=2e-3*scale)
    assert found.bottom == pytest.approx(ordered[:n_bottom], abs=2e-3*scale)


@pytest.mark.parametrize('outputs', [1, 2, 5])
def test_linear_regression_with_several_outputs(outputs):
    torch.manual_seed(outputs)
    x, model = torch.randn(80, 12), nn.Linear(12, outputs, bias=False)
    exact = torch.linalg.eigvalsh(2/(80*outputs)*x.T@x).repeat_interleave(outputs).flip(0)
    found = extreme_eigenvalues(model, x, torch.randn(80, outputs), n_top=4, loss_fn=nn.MSELoss())
    assert found.top == pytest.approx(exact[:4].tolist(), rel=2e-3)


def test_at_an_exact_minimum_the_gradient_is_no_start():
    model = Quadratic(torch.zeros(6))
    found = extreme_eigenvalues(model, ONE, ONE, 2, loss_fn=form(random_symmetric([5., 3., 1., 0., 0., -1.])))
    assert found.top == pytest.approx([5, 3], abs=1e-3)


def test_products_run_out():
    torch.manual_seed(0)
    model = Quadratic(torch.randn(200))
    found = extreme_eigenvalues(model, ONE, ONE, 3, tolerance=1e-12, max_products=5, loss_fn=form(random_symmetric(np.linspace(0, 1, 200))))
    assert not found.converged and found.n_products == 5 and found.risk == 1


def test_top_three_of_a_trained_network_need_few_products():
    from sklearn.datasets import load_digits
    digits = load_digits()
    x, y = torch.tensor(digits.data[:512]/16-0.3, dtype=torch.float32), torch.tensor(digits.target[:512])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(60):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    quick, exact = (extreme_eigenvalues(model, x, y, n_top=3, tolerance=t, verify=t < 1e-6) for t in (1e-3, 1e-7))
    assert quick.n_products <= 15 and quick.top == pytest.approx(exact.top, rel=1e-3) and exact.risk < 0.01


def test_layers_add_up_and_names_restrict():
    model, x, y = prepare('mlp')
    model.double()
    x = x.double()
    whole = hessian_trace(model, x, y, 'hutch++', rank=52, max_products=120)
    parts = by_layer(hessian_trace, model, x, y, method='hutch++', rank=52, max_products=120)
    assert list(parts) == ['0', '3'] and sum(p.value for p in parts.values()) == pytest.approx(whole.value, rel=1e-6)
    tops = by_layer(extreme_eigenvalues, model, x, y)
    assert max(t.top[0] for t in tops.values()) <= extreme_eigenvalues(model, x, y).top[0]*(1+1e-3)


def test_density_integrates_functions_of_the_spectrum():
    values = torch.linspace(-1, 3, 40)
    model = Quadratic(torch.randn(40))
    found = spectral_density(model, ONE, ONE, n_vectors=30, n_steps=20, loss_fn=form(random_symmetric(values)))
    for function in (lambda t: t, np.square, lambda t: np.exp(-t)):
        mean, error = found.moment(function)
        assert abs(mean-function(values.numpy()).mean()) < 4*error+1e-9
    grid = np.linspace(-3, 5, 2000)
    assert np.trapezoid(found.density(grid), grid) == pytest.approx(1, abs=1e-2)
    zero = spectral_density(model, ONE, ONE, n_vectors=1, n_steps=3, loss_fn=form(torch.zeros(40, 40)))
    assert zero.moment(np.abs)[0] == 0


def test_noise_scale_is_unbiased_for_ragged_batches():
    "Averaged over orders of the samples, batches of any size give the single samples' covariance"
    torch.manual_seed(0)
    x, y, model = torch.randn(30, 3).double(), torch.randn(30, 1).double(), nn.Linear(3, 1, bias=False).double()
    singles = 2*(model(x)-y).detach()*x
    variance = float(singles.var(0).sum())
    for batch_size in (1, 4, 7):
        found = []
        for seed in range(300):
            order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
            found.append(gradient_noise_scale(model, x[order], y[order], batch_size, loss_fn=nn.MSELoss())['gradient_variance'])
        assert np.mean(found) == pytest.approx(variance, abs=4*np.std(found)/math.sqrt(300)+1e-9)


def test_relative_flatness_of_a_hidden_layer_is_its_definition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(20, 3).double(), torch.arange(20) % 3
    with hessian(model, x, y, names='0.weight') as H: blocks = H.dense().view(4, 3, 4, 3)
    W = model[0].weight.detach()
    exact = float(((W@W.T)*torch.einsum('ajbj->ab', blocks)).sum())
    assert relative_flatness(model, x, y, '0.weight').value == pytest.approx(exact, rel=1e-9)
    guess = relative_flatness(model, x, y, '0.weight', tolerance=0.02, max_products=8)
    assert guess.n_draws == 8


def test_krylov_stays_orthonormal():
    A = random_symmetric(np.geomspace(1e-8, 1e4, 60)).float()
    krylov = Krylov(lambda v: A@v, torch.zeros(60))
    krylov.add(torch.randn(60, generator=torch.Generator().manual_seed(0)))
    for _ in range(40):
        if not krylov.step(): break
    basis = krylov.basis[:krylov.size].double()
    assert float((basis@basis.T-torch.eye(len(basis))).abs().max()) < 1e-5


def digits_like(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, torch.randn(64, 5), torch.randint(3, (64,))


def exact_spectrum(model, x, y):
    names, values = zip(*[(n, p.detach()) for n, p in model.named_parameters()])
    sizes = [v.numel() for v in values]
    def loss(flat):
        parts = {n: t.view_as(v) for n, t, v in zip(names, flat.split(sizes), values)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, parts, x), y)
    return torch.linalg.eigvalsh(torch.func.hessian(loss)(torch.cat([v.reshape(-1) for v in values])))


@pytest.mark.parametrize('n_top, n_bottom', [(1, 0), (0, 1), (1, 1), (2, 0)])
def test_no_eigenvalue_is_believed_after_as_many_products_as_are_wanted(n_top, n_bottom):
    model, x, y = digits_like()
    exact = exact_spectrum(model, x, y)
    found = extreme_eigenvalues(model, x, y, n_top, n_bottom, verify=False)
    assert found.n_products > n_top+n_bottom
    assert found.top == pytest.approx(exact.flip(0)[:n_top].tolist(), rel=2e-3)
    assert found.bottom == pytest.approx(exact[:n_bottom].tolist(), abs=2e-3*float(exact.abs().max()))


def test_eigenvectors_are_right_whatever_the_order_of_the_names():
    model, x, y = digits_like()
    one, two = (extreme_eigenvalues(model, x, y, 1, names=names) for names in (['0.weight', '2.weight'], ['2.weight', '0.weight']))
    assert two.top == pytest.approx(one.top, rel=1e-3)
    with hessian(model, x, y, names=['2.weight', '0.weight']):
        v = two.vectors[0]
        assert set(v) == {'0.weight', '2.weight'} and v['0.weight'].shape == (7, 5)
    def rise(step): # the second difference of the loss along v is its eigenvalue
        moved = {n: p.detach()+step*v.get(n, 0) for n, p in model.double().named_parameters()}
        return nn.functional.cross_entropy(torch.func.functional_call(model, moved, x.double()), y)
    v = {n: t.double() for n, t in v.items()}
    second = (rise(1e-2)-2*rise(0.)+rise(-1e-2))/1e-4
    assert second.item() == pytest.approx(two.top[0], rel=1e-2)


def test_a_model_that_fits_to_rounding_is_not_called_asymmetric():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(32, 20), torch.randint(10, (32,))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(4000):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 5e-6
    single = extreme_eigenvalues(model, x, y, 1).top[0]
    double = extreme_eigenvalues(model.double(), x.double(), y, 1).top[0]
    assert single == pytest.approx(double, rel=0.2)  # the loss itself has 2 % of rounding


def test_targets_to_ignore_have_no_weight_in_the_default_loss():
    from llprobe.batches import evaluate
    model, x, y = digits_like()
    y[:20] = -100
    expected = nn.functional.cross_entropy(model(x[20:]), y[20:]).item()
    for batch_size in (1, 16, None): assert evaluate(model, x, y, batch_size=batch_size)['loss'] == pytest.approx(expected, rel=1e-5)
