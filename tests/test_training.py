"Training: closed forms of what a step is wrapped in, stop and go on, stacks, and what can go wrong."
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings as settings_of, strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from llprobe.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from llprobe.core import InputError
from llprobe.data import from_arrays, load_dataset, split_dataset
from llprobe.models import Dropout, build_model
from llprobe.optimization import AVERAGES, DEFAULTS, OPTIMIZERS, SCHEDULES, SHARPNESS_AWARE, ascended, resolve_config
from llprobe.population import train_population
from llprobe.probe import ProbeSettings
from llprobe.sampler import sample_level
from llprobe.stack import Stack, stack_key, train_stack
from llprobe.training import Trainer, TrainSettings, network_samples, train

CPU = TrainSettings(n_epochs=3, device='cpu')


@pytest.fixture(scope='module')
def iris():
    return split_dataset(load_dataset('iris'), 0)


def numbers(curve):
    return [{k: v for k, v in row.items() if k != 'seconds'} for row in curve]


def network(split, config, architecture='mlp', seed=0):
    return build_model(architecture, dict(width=8, depth=1) | config, split.dataset.input_shape, split.dataset.n_outputs, seed=seed)


recipes = st.fixed_dictionaries(dict(
    optimizer=st.sampled_from(OPTIMIZERS), learning_rate=st.floats(1e-4, 0.1), momentum=st.floats(0, 0.95), weight_decay=st.floats(0, 0.1),
    batch_size=st.integers(2, 200), schedule=st.sampled_from(SCHEDULES), warmup=st.sampled_from([None, 0.0, 0.5]),
    mixup=st.sampled_from([0.0, 0.4]), label_smoothing=st.sampled_from([0.0, 0.2]), clip_norm=st.sampled_from([0.0, 0.5]),
    sharpness_aware=st.sampled_from(SHARPNESS_AWARE), averaging=st.sampled_from(AVERAGES), dropout=st.sampled_from([0.0, 0.3])))


@settings_of(max_examples=25, deadline=None)
@given(config=recipes, stop=st.integers(1, 3), precision=st.sampled_from(['float32', 'bfloat16']))
def test_whatever_the_recipe_a_training_that_stopped_goes_on_to_the_same_bits(iris, tmp_path_factory, config, stop, precision):
    path, indices = tmp_path_factory.mktemp('stop')/'c.safetensors', torch.arange(len(iris.train))
    long = TrainSettings(n_epochs=4, device='cpu', precision=precision)
    models = [network(iris, config) for _ in range(3)]
    whole = train(models[0], config, iris, indices, long)
    trainer = Trainer(models[1], config, iris, indices, long)
    for _ in range(stop):
        trainer.curve.append(trainer.run_epoch())
    trainer.save(path)
    continued = train(models[2], config, iris, indices, long, checkpoint=path)
    assert numbers(continued.curve) == numbers(whole.curve)
    assert (continued.val_loss, continued.train_samples, continued.forward_samples) == (whole.val_loss, whole.train_samples, whole.forward_samples)
    for a, b in zip(models[0].state_dict().values(), models[2].state_dict().values()):
        assert torch.equal(a, b)


@settings_of(max_examples=15, deadline=None)
@given(configs=st.lists(st.fixed_dictionaries(dict(
    optimizer=st.sampled_from(OPTIMIZERS), learning_rate=st.floats(1e-4, 0.03), momentum=st.floats(0, 0.9), weight_decay=st.floats(0, 0.01),
    label_smoothing=st.floats(0, 0.3), clip_norm=st.sampled_from([0.0, 0.3]), dropout=st.floats(0, 0.5))), min_size=2, max_size=5))
def test_a_stack_trains_each_member_as_if_alone(iris, configs):
    indices = torch.arange(len(iris.train))
    together, alone = ([network(iris, c) for c in configs] for _ in range(2))
    for a, b, m, n in zip(train_stack(together, configs, iris, indices, CPU), [train(m, c, iris, indices, CPU) for m, c in zip(alone, configs)], together, alone):
        assert a.status == b.status == 'ok'
        assert np.allclose([r['train_loss'] for r in a.curve], [r['train_loss'] for r in b.curve], rtol=1e-3, atol=1e-5)
        for p, q in zip(m.parameters(), n.parameters()):
            assert torch.allclose(p, q, rtol=1e-2, atol=1e-4)


def test_sam_on_a_quadratic_takes_the_gradient_at_the_worst_point():
    "L = w'Aw/2 has gradient Aw: SAM's is A(w + ρ Aw/|Aw|)"
    A, w = torch.diag(torch.tensor([1., 10.])), nn.Parameter(torch.tensor([3., -1.]))
    def backward():
        w.grad = None
        (w@A@w/2).backward()
    backward()
    first = w.grad.clone()
    with ascended([w], 'sam', 0.3):
        backward()
    assert torch.allclose(w.grad, A@(w.detach()+0.3*first/first.norm()))
    assert torch.equal(w.detach(), torch.tensor([3., -1.]))


def test_asam_does_not_change_when_a_relu_network_is_rescaled():
    "Two layers scaled by a and 1/a compute the same function; ASAM's rise of the loss is the same too, SAM's is not"
    torch.manual_seed(0)
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    rises = {}
    for kind in ('sam', 'asam'):
        for a in (1., 5.):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
            with torch.no_grad():
                model[0].weight.mul_(a), model[2].weight.div_(a)
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            with ascended(list(model.parameters()), kind, 0.1):
                rises[kind, a] = (nn.functional.cross_entropy(model(x), y)-loss).item()
    assert rises['asam', 1.] == pytest.approx(rises['asam', 5.], rel=1e-3)
    assert abs(rises['sam', 1.]/rises['sam', 5.]-1) > 0.1


def test_weights_come_back_when_the_second_pass_fails():
    w = nn.Parameter(torch.tensor([3., -1.]))
    w.grad = torch.tensor([1., 1.])
    with pytest.raises(RuntimeError, match='second pass'):
        with ascended([w], 'sam', 0.3):
            raise RuntimeError('second pass')
    assert torch.equal(w.detach(), torch.tensor([3., -1.]))


def test_sam_counts_each_batch_once_in_batchnorm():
    split = split_dataset(load_dataset('digits'), 0)
    indices = sample_level(split.train_y, 0.2)
    model = build_model('resnet', dict(num_channels=4, num_blocks=1), (1, 8, 8), 10)
    result = train(model, dict(sharpness_aware='sam', batch_size=64), split, indices, TrainSettings(n_epochs=2, device='cpu'))
    assert int(model[1].num_batches_tracked) == 2*-(-len(indices)//64)
    assert result.train_samples == 2*2*len(indices)


@pytest.mark.parametrize('kind', ['ema', 'swa'])
def test_averages_are_those_of_pytorch(kind, iris):
    config, indices = dict(averaging=kind, ema_decay=0.9, swa_start=0.5, batch_size=32), torch.arange(len(iris.train))
    long = TrainSettings(n_epochs=4, device='cpu')
    trainer = Trainer(network(iris, config), config, iris, indices, long)
    own = AveragedModel(trainer.model, avg_fn=(lambda avg, new, n: avg+(1-min(0.9, (1+n)/(10+n)))*(new-avg)) if kind == 'ema' else None)
    step = trainer.optimizer.step
    if kind == 'ema':
        trainer.optimizer.step = lambda: (step(), own.update_parameters(trainer.model))
    for epoch in range(4):
        trainer.run_epoch()
        if kind == 'swa' and epoch >= 2:
            own.update_parameters(trainer.model)
    trainer.finish()
    for p, q in zip(trainer.model.parameters(), own.module.parameters()):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 0.0, -1.0, '0.1', True])
def test_a_learning_rate_that_is_no_positive_number_is_refused(value):
    with pytest.raises(InputError, match='learning_rate must be a number above 0'):
        resolve_config(dict(learning_rate=value))


def test_every_default_is_checked_and_accepted():
    assert resolve_config({}).keys() == DEFAULTS.keys()
    for name in ('momentum', 'weight_decay', 'label_smoothing', 'batch_size', 'cutout', 'mixup', 'clip_norm', 'rho', 'ema_decay', 'swa_start', 'warmup'):
        with pytest.raises(InputError, match=f'{name} must be'):
            resolve_config({name: -1})


def test_bfloat16_rounds_the_products_and_nothing_else():
    "One step of a linear network: products of rounded factors; the weights, their update and the loss in float32"
    g = torch.Generator().manual_seed(0)
    split = split_dataset(from_arrays(torch.randn(40, 5, generator=g), torch.randn(40, generator=g), task='regression'), 0)
    config, indices = dict(optimizer='sgd', learning_rate=0.1, momentum=0.0, weight_decay=0.0, schedule='constant', batch_size=100), torch.arange(len(split.train))
    model = nn.Sequential(nn.Linear(5, 1))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    trainer = Trainer(model, config, split, indices, TrainSettings(n_epochs=1, device='cpu', precision='bfloat16'))
    x, y = network_samples(split, 'train', None, torch.device('cpu'))
    def rounded(t): return t.bfloat16().float()
    outputs = rounded(rounded(x)@rounded(weight).T+rounded(bias))[:, 0]
    row = trainer.run_epoch()
    assert row['train_loss'] == pytest.approx(float((outputs-y).square().mean()), rel=2e-2)
    gradient = rounded(2*(outputs-y)/len(y))@rounded(x)
    torch.testing.assert_close(model[0].weight.detach()[0], weight[0]-0.1*gradient, rtol=0, atol=2e-3)
    assert model[0].weight.dtype == torch.float32 and not torch.equal(rounded(model[0].weight), model[0].weight)
    exact = Trainer(nn.Sequential(nn.Linear(5, 1)), config, split, indices, TrainSettings(n_epochs=1, device='cpu', precision='float32'))
    exact.model.load_state_dict(dict(zip(('0.weight', '0.bias'), (weight, bias))))
    assert exact.run_epoch()['train_loss'] != row['train_loss']


def test_a_batch_larger_than_the_subset_is_one_batch(iris):
    config = dict(batch_size=10_000, learning_rate=0.01)
    trainer = Trainer(network(iris, config), config, iris, torch.arange(20), CPU)
    assert trainer.steps_per_epoch == 1 and np.isfinite(trainer.run_epoch()['train_loss'])


def batchnorm_mlp(config, input_shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, n_classes))


def test_batchnorm_survives_a_last_batch_of_one(iris):
    "21 samples in batches of 10 leave one over, and BatchNorm has no variance for one sample"
    config = dict(batch_size=10, learning_rate=0.01)
    result = train(build_model(batchnorm_mlp, config, (4,), 3), config, iris, torch.arange(21), CPU)
    assert result.status == 'ok'


class Sinking(nn.Linear):
    "Outside of training it answers up to five samples like a linear layer, and more with infinity"
    def forward(self, x):
        return super().forward(x) if self.training or len(x) <= 5 else torch.full((len(x), 3), torch.inf)


def test_a_loss_that_is_finite_but_at_the_end_has_diverged(iris):
    settings = TrainSettings(n_epochs=2, device='cpu', n_curve_samples=5)
    result = train(Sinking(4, 3), dict(batch_size=8), iris, torch.arange(len(iris.train)), settings)
    assert (result.status, len(result.curve), result.val_score) == ('diverged', 2, iris.dataset.chance_score) and np.isnan(result.val_loss)


def test_populations_are_of_llprobes_own_training():
    with pytest.raises(InputError, match='leave training out'):
        train_population([dict(width=8)], 'iris', settings=ProbeSettings(training='user_code:fit'))


def test_memory_that_is_too_small_for_a_stack_halves_it_and_says_so(iris, monkeypatch):
    "Stands in for a GPU's memory: more than two networks at once do not fit"
    configs, indices, forward = [dict(learning_rate=0.01*i) for i in range(1, 6)], torch.arange(len(iris.train)), Stack.forward

    def small(self, x):
        if len(self.configs) > 2:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return forward(self, x)
    whole = train_stack([network(iris, c) for c in configs], configs, iris, indices, CPU)
    monkeypatch.setattr(Stack, 'forward', small)
    with pytest.warns(UserWarning, match='5 networks at once do not fit the memory of cpu: training 3 at once'):
        parts = train_stack([network(iris, c) for c in configs], configs, iris, indices, CPU)
    assert [r.val_loss for r in parts] == pytest.approx([r.val_loss for r in whole], rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_stack_on_a_gpu_learns_what_one_by_one_learns():
    split = split_dataset(load_dataset('digits'), 0)
    configs, indices = [dict(num_channels=16, learning_rate=r) for r in (0.02, 0.05, 0.1)], torch.arange(len(split.train))
    gpu = TrainSettings(n_epochs=5, device='cuda')
    build = lambda: [build_model('simple_cnn', c, (1, 8, 8), 10) for c in configs]
    together = train_stack(build(), configs, split, indices, gpu)
    alone = [train(m, c, split, indices, gpu) for m, c in zip(build(), configs)]
    assert [r.val_score for r in together] == pytest.approx([r.val_score for r in alone], abs=0.05)


def test_a_population_is_the_same_however_it_is_trained():
    configs = [dict(width=8, depth=1, learning_rate=0.01*i, dropout=0.1*i) for i in range(1, 6)]
    settings, iris = ProbeSettings(architecture='mlp', train=CPU), load_dataset('iris')
    stacked, pool, serial = (train_population(configs, iris, settings=settings, n_workers=n, method=m) for n, m in ((1, 'stack'), (2, 'alone'), (1, 'alone')))
    assert list(stacked.plan.method) == ['stack'] and set(pool.plan.method) == {'alone'} and '5 stacked (as asked)' in repr(stacked)
    assert [numbers(r.curve) for r in pool.results] == [numbers(r.curve) for r in serial.results]
    assert [r.val_loss for r in stacked.results] == pytest.approx([r.val_loss for r in serial.results], rel=1e-3)
    for a, b, c in zip(stacked.models, pool.models, serial.models):
        for p, q, r in zip(a.parameters(), b.parameters(), c.parameters()):
            assert torch.equal(q, r) and torch.allclose(p, q, atol=1e-4)


def test_auto_says_why():
    iris, settings = load_dataset('iris'), ProbeSettings(architecture='mlp', train=CPU)
    small = train_population([dict(width=8, depth=1, learning_rate=0.01*i) for i in range(1, 5)], iris, settings=settings, n_workers=1)
    assert list(small.plan.method) == ['stack'] and 'leaves a CPU idle' in small.plan.reason[0]
    with pytest.raises(InputError, match='method must be one of auto, stack, alone'):
        train_population([{}], iris, settings=settings, method='magic')
    with pytest.raises(InputError, match='at least one config'):
        train_population([], iris, settings=settings)


def test_a_layer_that_could_hide_a_difference_is_never_stacked():
    class Own(nn.Linear):
        "Looks like a linear layer"
    config = resolve_config({})
    assert stack_key(nn.Sequential(nn.Linear(4, 3)), config) is not None
    assert stack_key(nn.Sequential(Own(4, 3)), config) is None
    assert stack_key(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)), config) is None
    assert stack_key(nn.Sequential(nn.Linear(4, 3), Dropout(0.1)), config) is not None


def test_checkpoints_of_another_training_are_refused(iris, tmp_path):
    path, indices, config = tmp_path/'c.safetensors', torch.arange(len(iris.train)), dict(learning_rate=0.01)
    train(network(iris, config), config, iris, indices, CPU, checkpoint=path)
    for wrong, seed in ((dict(learning_rate=0.02), 0), (config, 1)):
        with pytest.raises(InputError, match='is of a training with another (config|seed)'):
            train(network(iris, wrong), wrong, iris, indices, CPU, seed, checkpoint=path)
    other = from_arrays(np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 3)
    with pytest.raises(InputError, match='another data'):
        split = split_dataset(other, 0)
        train(network(split, config), config, split, torch.arange(len(split.train)), CPU, checkpoint=path)


WRITER = '''
import sys, torch
from llprobe.checkpoint import save_checkpoint
print("ready", flush=True)
for i in range(10**6): save_checkpoint(sys.argv[1], dict(weight=torch.full((300_000,), float(i))), dict(i=i, score=i))
'''


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path/'c.safetensors'
    writer = subprocess.Popen([sys.executable, '-c', WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == 'ready\n'
    for wait in (0.05, 0.11, 0.23):
        time.sleep(wait)
        if path.exists():
            tensors, facts = load_checkpoint(path)  # also while it is being replaced
            assert torch.equal(tensors['weight'], torch.full((300_000,), float(facts['i'])))
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    tensors, facts = load_checkpoint(path)
    assert torch.equal(tensors['weight'], torch.full((300_000,), float(facts['i'])))


def test_only_the_best_checkpoints_stay(tmp_path):
    for i, score in enumerate([0.2, float('nan'), 0.9, 0.5]):
        save_checkpoint(tmp_path/f'{i}.safetensors', dict(w=torch.zeros(1)), dict(score=score))
    (tmp_path/'broken.safetensors').write_bytes(b'x')
    assert [p.stem for p in prune_checkpoints(tmp_path, 2)] == ['2', '3']
    assert sorted(p.stem for p in tmp_path.glob('*.safetensors')) == ['2', '3']
    with pytest.raises(InputError, match='keep must be at least 0'):
        prune_checkpoints(tmp_path, -1)


class Tutorial(nn.Module):
    "As in PyTorch's tutorial: it flattens by `view`, which needs pixels in the usual order"
    def __init__(self, n_classes):
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8*4*4, n_classes)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.out(x.view(-1, 8*4*4))


@pytest.mark.parametrize('averaging', ['none', 'ema'])
def test_a_network_that_flattens_by_view_trains(averaging, tmp_path):
    rng = np.random.default_rng(0)
    pictures = from_arrays(rng.integers(0, 256, (120, 8, 8, 3), dtype=np.uint8), np.arange(120) % 3)
    split, config = split_dataset(pictures, 0), dict(learning_rate=0.01, batch_size=16, averaging=averaging)
    model = build_model(lambda c, shape, n: Tutorial(n), config, (3, 8, 8), 3)
    result = train(model, config, split, torch.arange(len(split.train)), CPU, checkpoint=tmp_path/'c.safetensors')
    assert result.status == 'ok' and len(result.curve) == 3
