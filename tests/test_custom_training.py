"Other people's models and training code: by name, from a folder on the path, in worker processes, with timm and Lightning."
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from llprobe.charts import config_curves_chart, curves_chart
from llprobe.core import InputError
from llprobe.custom_training import make_subset, run_training
from llprobe.data import cached_file, from_arrays, load_dataset, split_dataset
from llprobe.models import build_model
from llprobe.predictor import load_predictor
from llprobe.probe import ProbeSettings, ProbeTask, run_probe, task_indices
from llprobe.reader import read_study
from llprobe.results import save_figures
from llprobe.sampler import sample_level
from llprobe.space import SearchSpace, default_space
from llprobe.store import open_store
from llprobe.study import StudySettings, run_study
from llprobe.training import TrainSettings

ROOT = Path(__file__).parents[1]
TRAINING = ('optimizer', 'learning_rate', 'momentum', 'weight_decay', 'batch_size')
SPACE = SearchSpace('mlp', dict(width=[8, 32, 64], learning_rate=dict(low=1e-3, high=0.1, log=True)))

USER_CODE = '''
import random
import numpy as np
import torch
from torch import nn

def two_layers(config, input_shape, n_classes):
    n = torch.Size(input_shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(n, 24), nn.ReLU(), nn.Linear(24, n_classes))

class Tree(nn.Module):
    "A classifier of scikit-learn as a module"
    def __init__(self, tree, n_classes):
        super().__init__()
        self.tree, self.n_classes = tree, n_classes
    def forward(self, x):
        return nn.functional.one_hot(torch.from_numpy(self.tree.predict(x.cpu().numpy())), self.n_classes).float()

def tree(config, subset, seed):
    from sklearn.tree import DecisionTreeClassifier
    fitted = DecisionTreeClassifier(max_depth=config['depth'], random_state=seed).fit(subset.x.numpy(), subset.y.numpy())
    return [{}]*subset.n_epochs, Tree(fitted, subset.n_classes)

def fit(config, subset, seed):
    "Forgets to seed anything, and draws from every generator there is"
    width = config.get('width', 16)
    net = nn.Sequential(nn.Flatten(), nn.Linear(subset.x[0].numel(), width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, subset.n_classes))
    net.to(subset.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=config['learning_rate'], momentum=0.9)
    log = []
    for epoch in range(subset.n_epochs):
        net.train()
        order, total = np.random.permutation(len(subset.x)), 0.
        for start in range(0, len(order), 32):
            index = torch.from_numpy(order[start:start+32])
            x = subset.x[index] + 0.1*random.random()
            loss = nn.functional.cross_entropy(net(x), subset.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()*len(index)
        net.eval()
        with torch.no_grad():
            out = net(subset.val_x)
        log.append(dict(epoch=epoch, train_loss=total/len(order), val_accuracy=(out.argmax(1) == subset.val_y).float().mean()))
    return log, net

def sometimes(config, subset, seed):
    if config['width'] == 8: raise MemoryError('no room\\nat all')
    if config['width'] == 32: raise SystemExit(3)
    return fit(config, subset, seed)

def misspelt(config, subset, seed): return [dict(loss=1.)], fit(config, subset, seed)[1]
'''

LIGHTNING_CODE = '''
import math, torch
from torch import nn
from lightning import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from llprobe.custom_training import lightning_training

class Net(LightningModule):
    def __init__(self, config, input_shape, n_classes):
        super().__init__()
        self.config = config
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, n_classes))
    def forward(self, x): return self.net(x)
    def training_step(self, batch, batch_idx): return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), self.config['learning_rate'], momentum=0.9)

class Validated(Net):
    def validation_step(self, batch, batch_idx): self.log('val_loss', torch.tensor(7.0 - self.current_epoch))

fit = lightning_training(Net)
short = lightning_training(Validated, max_epochs=4, callbacks=EarlyStopping('val_loss', mode='max', patience=1))
'''


@pytest.fixture
def user_folder(tmp_path, monkeypatch) -> Path:
    "A folder on the path with a module of the user's"
    folder = tmp_path/'code'
    folder.mkdir()
    (folder/'user_code.py').write_text(USER_CODE)
    (folder/'user_lightning.py').write_text(LIGHTNING_CODE)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ('user_code', 'user_lightning'):
        sys.modules.pop(name, None)


@pytest.fixture(scope='module')
def digits():
    return split_dataset(load_dataset('digits'))


@pytest.fixture(scope='module')
def digits_path() -> str:
    return str(cached_file(load_dataset('digits')))


def settings(training=None, n_configs=4, levels=(0.1, 0.2), n_epochs=3, seed=0, **probe) -> StudySettings:
    return StudySettings(levels, n_configs, seed=seed, probe=ProbeSettings(training=training, train=TrainSettings(n_epochs=n_epochs), **probe))


def records(out: Path) -> list[dict]:
    "What the study holds, but for the time it took"
    def timeless(value):
        if isinstance(value, dict): return {k: timeless(v) for k, v in value.items() if k != 'seconds'}
        if isinstance(value, list): return [timeless(v) for v in value]
        return 'nan' if isinstance(value, float) and math.isnan(value) else value
    with open_store(out/'study.db', read_only=True) as store:
        return timeless(store.probes('digits'))


# --- a training function -----------------------------------------------------------------------------------------

def test_a_study_of_own_training_code_is_the_same_with_two_workers(user_folder, tmp_path):
    one = run_study('digits', tmp_path/'one', SPACE, settings('user_code:fit'), n_workers=1, progress=False)
    two = run_study('digits', tmp_path/'two', SPACE, settings('user_code:fit'), n_workers=2, progress=False)
    assert records(tmp_path/'one') == records(tmp_path/'two') and one['reached'] == two['reached']
    probes = [r for r in records(tmp_path/'one') if r['purpose'] == 'probe']
    assert len(probes) == 4+2
    assert one['best_config'] == two['best_config'] and one['predictions'] == two['predictions']
    assert one['architecture'] == one['settings']['probe']['training'] == 'user_code:fit'
    assert one['reached']['test_accuracy'] > 0.7
    for r in probes:
        assert r['train_samples'] == 3*r['n_samples'] and len(r['curve']) == 3
        assert r['curve'][-1]['val_score'] == pytest.approx(r['val_score'])  # the last epoch's, scored by the user and by llprobe
        assert r['curve'][0]['val_loss'] == 'nan' and r['curve'][0]['epoch'] == 1
        assert {row['kind'] for row in r['responses']} >= {'gaussian'}
    weights = safetensors.torch.load_file(tmp_path/'one'/'best.safetensors')
    assert weights['1.weight'].shape == (one['best_config']['width'], 64)
    kept = (tmp_path/'one'/'best.safetensors').read_bytes()
    read_study(tmp_path/'one').model(one['best_config_id'], 1.0, 'final')  # trained again
    assert (tmp_path/'one'/'best.safetensors').read_bytes() == kept
    with pytest.raises(InputError, match='trained by a function of your own'):
        load_predictor(tmp_path/'one')


def test_a_model_without_weights_has_no_responses(user_folder, tmp_path):
    out = run_study('iris', tmp_path/'out', SearchSpace('mlp', dict(depth=[1, 2, 3])), settings('user_code:tree', n_configs=3), n_workers=1, progress=False)
    with open_store(tmp_path/'out'/'study.db', read_only=True) as store:
        probes = store.probes('iris')
    assert all(r['status'] == 'ok' and r['responses'] == [] for r in probes) and out['reached']['test_accuracy'] > 0.8
    save_figures(tmp_path/'out', tmp_path/'figures')
    assert {path.stem for path in (tmp_path/'figures').iterdir()} == {'levels', 'predictions', 'cost'}
    study = read_study(tmp_path/'out')
    assert all(chart.layout.meta['message'] for chart in (curves_chart(study), config_curves_chart(study, out['best_config_id'])))


def test_another_seed_is_another_training(user_folder, digits_path):
    def probe(seed):
        task = ProbeTask(digits_path, dict(width=8, learning_rate=0.05), 0.2, seed, settings=settings('user_code:fit').probe)
        return run_probe(task)['curve'][0]['train_loss']
    assert probe(3) == probe(3) != probe(4)


def test_it_resumes_and_refuses_another_training(user_folder, tmp_path):
    arguments = ('digits', tmp_path/'out', SPACE)
    first = run_study(*arguments, settings('user_code:fit'), n_workers=1, progress=False)
    again = run_study(*arguments, settings('user_code:fit'), n_workers=1, progress=False)
    assert first['cost']['seconds']['probe'] == again['cost']['seconds']['probe']
    with pytest.raises(InputError, match="probe.training 'user_code:fit', now 'user_code:sometimes'"):
        run_study(*arguments, settings('user_code:sometimes'), n_workers=1, progress=False)
    with pytest.raises(InputError, match="probe.training 'user_code:fit', now unset"):
        run_study(*arguments, settings(), n_workers=1, progress=False)


def test_settings_of_studies_without_one_are_as_before():
    assert 'training' not in StudySettings().to_dict()['probe']


@pytest.mark.parametrize('n_workers', [1, 2])
def test_exceptions_and_exits_are_recorded_as_crashes_with_their_place(user_folder, tmp_path, n_workers):
    result = run_study('digits', tmp_path/'out', SPACE, settings('user_code:sometimes', n_configs=6), n_workers=n_workers, progress=False)
    assert result['best_config']['width'] == 64
    errors = {r['config']['width']: r['error'] for r in records(tmp_path/'out')}
    assert re.fullmatch(r'MemoryError: no room at all \(.*user_code.py, line \d+\)', errors[8]) and errors[64] is None
    assert re.fullmatch(r'RuntimeError: the training function left Python with exit code 3 \(.*user_code.py, line \d+\)', errors[32])


@pytest.mark.parametrize('training, message', [
    ('user_code:misspelt', "row 1 of the curve has 'loss': it may have any of train_loss"), ('user_code:nothing', 'cannot be imported'),
    ('nowhere:fit', 'cannot be imported'), ('user_code', 'cannot be imported'), ('user_code:random', 'is a module, not a function'),
    ('torch.nn:Flatten', r'must take \(config, subset, seed\)'), (lambda config, subset, seed: None, 'has no name to import it by')])
def test_what_cannot_be_used_ends_the_study_in_one_sentence(user_folder, tmp_path, training, message):
    with pytest.raises(InputError, match=message) as error:
        run_study('digits', tmp_path/'out', SPACE, settings(training), n_workers=1, progress=False)
    assert '\n' not in str(error.value)


def test_an_architecture_or_settings_beside_it_are_refused(user_folder, tmp_path):
    for given, message in ((settings('user_code:fit', architecture='mlp'), "no place for the architecture 'mlp'"),
                           (StudySettings(probe=ProbeSettings(training='user_code:fit', train=TrainSettings(augment='flip'))), "augment is of llprobe's own")):
        with pytest.raises(InputError, match=message):
            run_study('digits', tmp_path/'out', SPACE, given, n_workers=1, progress=False)
    assert not (tmp_path/'out'/'study.db').exists()


def test_ctrl_c_stays_ctrl_c(digits):
    def stopped(config, subset, seed):
        try: raise KeyboardInterrupt
        except KeyboardInterrupt: sys.exit(1)  # as Lightning does
    with pytest.raises(KeyboardInterrupt):
        run_training(stopped, {}, digits, torch.arange(100), 0.1)


def linear(subset, **options):
    return nn.Sequential(nn.Flatten(), nn.Linear(subset.x[0].numel(), subset.n_classes, **options))


@pytest.mark.parametrize('last, weight, status', [(dict(train_loss=1.), 1., 'ok'), (dict(train_loss=math.nan), 1., 'diverged'), (dict(val_loss=math.inf), 1., 'diverged'),
                                                  ({}, math.nan, 'diverged'), ({}, math.inf, 'diverged'), (dict(gradient_norm=None), 1., 'ok')])
def test_what_counts_as_diverged(digits, last, weight, status):
    def training(config, subset, seed):
        model = linear(subset)
        with torch.no_grad(): model[1].weight[0, 0] = weight
        return [dict(train_loss=2.), last], model
    model, result = run_training(training, {}, digits, torch.arange(100), 0.1)
    assert result.status == status
    assert math.isfinite(result.val_loss) == (status == 'ok') and (status == 'ok' or result.val_score == 0.1)
    assert all(math.isnan(row['val_score']) for row in result.curve)


def test_the_users_own_copies_and_settings_stay_theirs(digits):
    "A function that spoils its tensors and PyTorch's state spoils no score and nothing after it"
    def spoil(config, subset, seed):
        subset.val_x.zero_()
        torch.set_grad_enabled(False)
        torch.set_num_threads(1)
        return [dict(samples=5)], linear(subset)
    before, threads = [t.clone() for t in digits.inputs('val')], torch.get_num_threads()
    model, result = run_training(spoil, {}, digits, torch.arange(100), 0.1)
    assert torch.is_grad_enabled() and torch.get_num_threads() == threads and result.train_samples == 5
    assert all(torch.equal(a, b) for a, b in zip(before, digits.inputs('val')))
    x = make_subset(digits, torch.arange(100), 0.1).val_x
    assert result.val_score == pytest.approx((model(x).argmax(1) == digits.val_y).float().mean().item())


class Viewing(nn.Module):
    "Reads the pixels of colour images by their place in memory, has tied weights and a frozen layer"
    def __init__(self, n_classes):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6*64, 6*64, bias=False), nn.Linear(6*64, 6*64, bias=False)
        self.second.weight, self.out = self.first.weight, nn.Linear(6*64, n_classes)
        self.conv.requires_grad_(False)

    def forward(self, x):
        return self.out(self.second(torch.relu(self.first(self.conv(x).view(len(x), -1)))))


def fit_viewing(config, subset, seed):
    model = Viewing(subset.n_classes)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    nn.functional.cross_entropy(model(subset.x), subset.y).backward()
    optimizer.step()
    return [{}], model


def test_a_model_that_views_pixels_and_ties_weights_is_probed_and_saved(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    dataset = from_arrays((rng.random((120, 3, 8, 8))*0.5 + y[:, None, None, None]*0.2).clip(0, 1), y)
    task = ProbeTask(str(cached_file(dataset, tmp_path)), {}, 0.5, settings=ProbeSettings(training=fit_viewing))
    record = run_probe(task)
    assert record['status'] == 'ok' and all(math.isfinite(row['loss']) for row in record['responses'])
    assert {row['kind'] for row in record['responses']} == {row['kind'] for row in run_probe(ProbeTask(task.data_path, {}, 0.5))['responses']}
    final = run_probe(ProbeTask(task.data_path, {}, 1.0, purpose='final', settings=task.settings))
    model = Viewing(3)
    model.load_state_dict(safetensors.torch.load(final['weights']))
    assert model.first.weight is model.second.weight and 0 <= final['test_score'] <= 1


# --- the command -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('option, name', [('--training', 'user_code:fit'), ('--architecture', 'user_code:two_layers')])
def test_the_command_finds_code_in_the_current_folder(user_folder, tmp_path, option, name):
    command = [sys.executable, '-m', 'llprobe.cli', 'run', option, name, '--configs', '3', '--levels', '0.2', '--epochs', '3', '--jobs', '1', '--quiet']
    done = subprocess.run([*command, '--out', tmp_path/'out'], cwd=user_folder, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path/'out'/'result.json').read_text())
    assert result['architecture'] == name and set(result['best_config']) <= set(TRAINING)  # not the space of simple_cnn
    assert (tmp_path/'out'/'report'/'index.html').exists()


def test_the_command_says_that_a_full_training_crashed_and_tries_it_again(tmp_path):
    (tmp_path/'fragile.py').write_text("""
import pathlib
from torch import nn
def fit(config, subset, seed):
    if subset.level == 1 and not pathlib.Path('mended').exists(): raise RuntimeError('no room')
    return [dict(train_loss=1.0)]*subset.n_epochs, nn.Sequential(nn.Flatten(), nn.Linear(subset.x[0].numel(), subset.n_classes))
""")
    command = [sys.executable, '-m', 'llprobe.cli', 'run', '--dataset', 'iris', '--training', 'fragile:fit', '--configs', '2', '--levels', '0.3', '--epochs', '2', '--jobs', '1', '--out', 'out']
    def run(): return subprocess.run(command, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    crashed = run()
    assert crashed.returncode == 2 and 'the full training crashed with RuntimeError: no room' in crashed.stderr and 'Traceback' not in crashed.stderr, crashed.stderr
    assert 'reached test accuracy' in crashed.stdout and 'best.safetensors' not in crashed.stdout
    (tmp_path/'mended').touch()
    mended = run()
    assert mended.returncode == 0, mended.stderr
    assert 'best.safetensors' in mended.stdout and 'finished before' not in mended.stdout
    assert 'finished before' in run().stdout


def test_without_a_space_an_architecture_has_its_own_default(user_folder, tmp_path):
    result = run_study('digits', tmp_path/'named', settings=settings(architecture='mlp', n_configs=2, levels=(0.1,), n_epochs=1), n_workers=1, progress=False)
    assert {'width', 'depth'} <= set(result['best_config'])
    assert default_space('user_code:two_layers').declared == TRAINING


# --- timm --------------------------------------------------------------------------------------------------------

def test_without_timm_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)  # what Python itself does to forbid an import
    with pytest.raises(InputError, match=r"pip install 'llprobe\[timm\]'"):
        build_model('timm:resnet18', {}, (1, 8, 8), 10)


def test_timm_models_are_seeded_and_fit_the_data():
    pytest.importorskip('timm')
    def weights(seed): return build_model('timm:test_resnet', dict(dropout=0.25), (1, 8, 8), 7, seed=seed).state_dict()
    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    model = build_model('timm:test_resnet', dict(dropout=0.25), (1, 8, 8), 7)
    assert model.drop_rate == 0.25 and model.training and model(torch.zeros(3, 1, 8, 8)).shape == (3, 7)
    assert build_model('timm:test_vit', {}, (3, 32, 48), 5)(torch.zeros(2, 3, 32, 48)).shape == (2, 5)  # made for this image size


@pytest.mark.parametrize('name, shape, message', [
    ('resnet18x', (3, 32, 32), 'choose resnet18,.* from timm.list_models'), ('create_model', (3, 32, 32), "timm has no model 'create_model'"),
    ('hf-hub:timm/resnet18', (3, 32, 32), 'timm has no model'), ('resnet18.no_such_tag', (3, 32, 32), 'Invalid pretrained tag'),
    ('resnet18', (30,), 'needs images .*: use mlp'), ('test_vit', (1, 8, 8), 'cannot be built for images of shape 1x8x8')])
def test_what_timm_cannot_do_is_one_sentence(name, shape, message):
    pytest.importorskip('timm')
    with pytest.raises(InputError, match=message) as error:
        build_model(f'timm:{name}', {}, shape, 10)
    assert '\n' not in str(error.value)


def test_a_timm_study_from_the_command(tmp_path):
    pytest.importorskip('timm')
    from llprobe.cli import main
    arguments = ['--architecture', 'timm:test_resnet', '--configs', '2', '--levels', '0.2', '--epochs', '2', '--jobs', '1', '--quiet', '--out', str(tmp_path/'out')]
    assert main(['run', *arguments]) == 0
    result = json.loads((tmp_path/'out'/'result.json').read_text())
    assert result['architecture'] == 'timm:test_resnet' and {'dropout', 'optimizer'} <= set(result['best_config']) <= {'dropout', *TRAINING}
    with open_store(tmp_path/'out'/'study.db', read_only=True) as store:
        probes = store.probes('digits')
    assert any(r['responses'] for r in probes) and all(r['status'] in ('ok', 'diverged') for r in probes)


# --- Lightning ---------------------------------------------------------------------------------------------------

def test_a_lightning_study_is_the_same_with_two_workers(user_folder, tmp_path):
    pytest.importorskip('lightning')
    space = SearchSpace('mlp', dict(learning_rate=dict(low=1e-3, high=0.1, log=True), batch_size=[16, 64]))
    results = [run_study('digits', tmp_path/str(n), space, settings('user_lightning:fit', n_configs=3), n_workers=n, progress=False) for n in (1, 2)]
    assert records(tmp_path/'1') == records(tmp_path/'2') and results[0]['reached']['test_accuracy'] > 0.6
    for r in (r for r in records(tmp_path/'1') if r['purpose'] == 'probe'):
        assert r['curve'][-1]['val_loss'] == pytest.approx(r['val_loss'], rel=1e-4) and r['train_samples'] == 3*r['n_samples']
        assert all(row['gradient_norm'] > 0 and math.isfinite(row['train_loss']) for row in r['curve'])
        assert r['responses']


def test_what_a_lightning_module_logs_is_recorded_and_callbacks_start_afresh(user_folder, digits, capfd):
    pytest.importorskip('lightning')
    from user_lightning import short
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    indices = sample_level(digits.train_y, 0.1, 'stratified', 0)
    for _ in range(2):
        result = run_training(short, dict(learning_rate=0.01), digits, indices, 0.1, TrainSettings(n_epochs=9))[1]
        assert [row['val_loss'] for row in result.curve] == [7., 6.]  # stopped early: it does not rise
        assert result.train_samples == 2*len(indices) and all(0 <= row['val_score'] <= 1 for row in result.curve)
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == flags
    output = capfd.readouterr()
    assert output.out+output.err == ''


def test_a_lightning_module_is_an_architecture_too(user_folder, digits_path):
    pytest.importorskip('lightning')
    task = ProbeTask(digits_path, dict(learning_rate=0.05, batch_size=32), 0.3, settings=ProbeSettings('user_lightning:Net', train=TrainSettings(n_epochs=3)))
    record = run_probe(task)
    assert record['status'] == 'ok' and record['val_score'] > 0.5 and record['responses'] and record['n_samples'] == len(task_indices(task))


def test_modules_of_the_older_package_are_fitted_by_it(digits):
    old = pytest.importorskip('pytorch_lightning')
    from llprobe.custom_training import lightning_training
    class Net(old.LightningModule):
        def __init__(self, config, input_shape, n_classes):
            super().__init__()
            self.layer = nn.Linear(math.prod(input_shape), n_classes)
        def forward(self, x): return self.layer(x.flatten(1))
        def training_step(self, batch, batch_idx): return nn.functional.cross_entropy(self(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
    result = run_training(lightning_training(Net), {}, digits, torch.arange(200), 0.2, TrainSettings(n_epochs=2))[1]
    assert result.status == 'ok' and result.curve[1]['train_loss'] < result.curve[0]['train_loss']


def test_a_training_function_may_regress():
    "Least squares in closed form, scored by R² and stored under the metric's own name"
    from sklearn.linear_model import LinearRegression
    split = split_dataset(load_dataset('diabetes'), 0)

    def least_squares(config, subset, seed):
        fit = LinearRegression().fit(subset.x, subset.y)
        layer = nn.Linear(subset.x.shape[1], subset.n_classes)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(fit.coef_)), layer.bias.fill_(float(fit.intercept_))
        return [dict(train_loss=0.5, val_r2=fit.score(subset.val_x, subset.val_y))], layer
    _, result = run_training(least_squares, {}, split, torch.arange(len(split.train)), 1.0)
    assert result.status == 'ok' and result.val_score > 0.3
    assert result.curve[0]['val_score'] == pytest.approx(result.val_score, abs=1e-4)
