"Data sets from anywhere: damaged files, caches, downloads, splits."
import functools, hashlib, os, pickle, re, struct, subprocess, sys, time
from pathlib import Path
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as npst
from PIL import Image
import llprobe.data as data
from llprobe.core import InputError
from llprobe.data import (DATASETS, cache_folder, cached_file, from_arrays, load_dataset, open_dataset, save_dataset,
                          split_dataset, strata, stratified_mask)

ROOT = Path(__file__).parents[1]

@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    "No test reads or fills the user's cache"
    monkeypatch.setenv('LLPROBE_CACHE', str(tmp_path/'default-cache'))
    monkeypatch.delenv('LLPROBE_DATA', raising=False)

@pytest.fixture
def load(tmp_path): return functools.partial(load_dataset, cache=tmp_path/'cache', progress=False)

def write_images(folder, n=3, classes=('a', 'b'), size=(8, 8), mode='RGB', suffix='.png', seed=0):
    "n random images of each class"
    rng, channels = np.random.default_rng(seed), dict(RGB=(3,), RGBA=(4,), L=())[mode]
    for name in classes:
        (folder/name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (*size[::-1], *channels), dtype=np.uint8)).save(folder/name/f'{i:04}{suffix}')
    return folder

def one_sentence(error):
    "What `error` says: one line, no full stop but the last"
    text = str(error.value)
    assert '\n' not in text and not re.search(r'\. [A-Z]', text), text
    return text

def run(code, **env):
    "Python code in a process of its own"
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


# image folders

@pytest.mark.parametrize('suffix, kept', [('.png', 0.5), ('.jpg', 0.7), ('.webp', 0.8), ('.bmp', 0.5), ('.tif', 0.5), ('.gif', 0.5)])
def test_truncated_file_is_named(tmp_path, load, suffix, kept):
    folder = write_images(tmp_path/'set'/'train', size=(64, 64), suffix=suffix).parent
    load(folder)
    victim = folder/'train'/'b'/f'0001{suffix}'
    victim.write_bytes(victim.read_bytes()[:int(victim.stat().st_size*kept)])
    with pytest.raises(InputError) as error: load(folder)
    assert str(victim) in one_sentence(error) and 'cannot be read as an image' in str(error.value)

@pytest.mark.parametrize('content', [b'', b'not an image', bytes(range(256))*8])
def test_file_that_is_no_image(tmp_path, load, content):
    folder = write_images(tmp_path/'set')
    (folder/'a'/'bad.jpg').write_bytes(content)
    with pytest.raises(InputError, match='bad.jpg cannot be read as an image'): load(folder)

@pytest.mark.parametrize('build, message', [
    (lambda f: f.mkdir(), 'has no folders of images'),
    (lambda f: (f/'train').mkdir(parents=True), 'has no images below its class folders'),
    (lambda f: (f/'train'/'a').mkdir(parents=True), 'has no images below its class folders'),
    (lambda f: (write_images(f/'train'), write_images(f/'test', classes=('a', 'c'))), "class 'c' is in"),
    (lambda f: write_images(f/'train', classes=('a',)), 'one class only'),
    (lambda f: (write_images(f), write_images(f, n=1, classes=('rare',))), r"class 'rare' of .* has too few training samples \(1\)"),
    (lambda f: (write_images(f/'train'), (f/'train'/'hollow').mkdir()), r"class 'hollow' of .* has too few training samples \(0\)"),
    (lambda f: (write_images(f/'train'), (f/'test'/'a').mkdir(parents=True)), 'test has no images'),
])
def test_folder_that_cannot_be_used(tmp_path, load, build, message):
    build(tmp_path/'set')
    with pytest.raises(InputError, match=message) as error: load(tmp_path/'set')
    assert str(tmp_path/'set') in one_sentence(error)

def test_unreadable_file_is_named(tmp_path, load):
    folder = write_images(tmp_path/'set')
    (folder/'a'/'gone.png').symlink_to(tmp_path/'nowhere.png')
    with pytest.raises(InputError, match='gone.png cannot be read'): load(folder)

def test_layouts(tmp_path, load):
    parts = tmp_path/'parts'
    write_images(parts/'train', n=3); write_images(parts/'test', n=2, seed=1); write_images(parts/'val', classes=('unused',))
    d = load(parts)
    assert (len(d.train_y), len(d.test_y), d.classes, d.name) == (6, 4, ('a', 'b'), 'parts')
    flat = load(parts/'train')
    assert flat.test_x is None and torch.equal(flat.train_x, d.train_x)
    vehicles = write_images(tmp_path/'vehicles', classes=('boat', 'train'))
    assert load(vehicles).classes == ('boat', 'train'), 'a class may be called train'

def test_hidden_nested_and_other_files(tmp_path, load):
    folder = write_images(tmp_path/'set')
    write_images(folder/'a'/'deep', classes=('er',), n=1)
    (folder/'a'/'._0000.png').write_bytes(b'resource fork'); (folder/'notes.txt').write_text('x'); (folder/'a'/'Thumbs.db').write_text('x')
    write_images(folder/'.ipynb_checkpoints', classes=('a',))
    d = load(folder)
    assert d.classes == ('a', 'b') and torch.bincount(d.train_y).tolist() == [4, 3]

def test_pixels_are_exact_and_in_order(tmp_path, load):
    folder = write_images(tmp_path/'set', n=5)
    expected = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.rglob('*.png'))]).transpose(0, 3, 1, 2)
    assert np.array_equal(load(folder).train_x, expected)

@pytest.mark.parametrize('modes, channels', [(('L', 'L'), 1), (('L', 'RGB'), 3), (('RGBA', 'L'), 3)])
def test_channels(tmp_path, load, modes, channels):
    for name, mode in zip('ab', modes): write_images(tmp_path/'set', classes=(name,), mode=mode)
    assert load(tmp_path/'set').input_shape == (channels, 8, 8)

@pytest.mark.parametrize('sizes, image_size, expected', [
    ([(20, 12)], None, (12, 20)), ([(20, 12)], 10, (10, 10)), ([(20, 12), (30, 30), (14, 40)], None, (14, 14)),
    ([(200, 300), (300, 200)], None, (64, 64)), ([(7, 90), (3, 5)], 6, (6, 6))])
def test_sizes(tmp_path, load, sizes, image_size, expected):
    for i, size in enumerate(sizes): write_images(tmp_path/'set', classes=(f'{i}a', f'{i}b'), n=2, size=size)
    assert load(tmp_path/'set', image_size=image_size).input_shape[1:] == expected

def test_rotation_tag_is_applied(tmp_path, load):
    image = Image.new('RGB', (20, 10)); image.paste((255, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif(); exif[0x0112] = 6 # turn right
    for name in 'ab':
        (tmp_path/'set'/name).mkdir(parents=True)
        for i in range(2): image.save(tmp_path/'set'/name/f'{i}.png', exif=exif)
    x = load(tmp_path/'set').train_x
    assert x.shape[1:] == (3, 20, 10) and (x[:, 0, :10] == 255).all() and (x[:, 0, 10:] == 0).all()

def test_processes_give_the_same_pixels_without_a_main_guard(tmp_path, load):
    folder = write_images(tmp_path/'set', n=1100)
    code = f'''
from llprobe.data import load_dataset
print(load_dataset({str(folder)!r}, cache={str(tmp_path/"other")!r}, n_workers=2, progress=False).fingerprint)'''
    script = tmp_path/'script.py'
    script.write_text(code)
    assert run(f'import runpy; runpy.run_path({str(script)!r}, run_name="__main__")').split() == [load(folder, n_workers=1).fingerprint]
    victim = folder/'b'/'1099.png'
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(InputError, match='1099.png cannot be read as an image'): load(folder, n_workers=2)


# the cache

def test_decoded_once(tmp_path, load, monkeypatch):
    folder = write_images(tmp_path/'set')
    first = load(folder)
    monkeypatch.setattr(data, 'decode_images', lambda *_: pytest.fail('decoded again'))
    for path in folder.rglob('*.png'): os.utime(path, (0, 0))
    folder = folder.rename(tmp_path/'moved')
    again = load(folder)
    assert (again.fingerprint, again.name) == (first.fingerprint, 'moved')
    with pytest.raises(pytest.fail.Exception): load(folder, image_size=4)

def test_changed_image_is_noticed(tmp_path, load):
    folder = write_images(tmp_path/'set')
    first, stamp = load(folder), (folder/'a'/'0000.png').stat().st_mtime_ns
    Image.new('RGB', (8, 8)).save(folder/'a'/'0000.png')
    os.utime(folder/'a'/'0000.png', ns=(stamp, stamp))
    second = load(folder)
    assert first.fingerprint != second.fingerprint and (second.train_x[0] == 0).all()

@pytest.mark.parametrize('damage', [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-10]), lambda p: p.write_bytes(b'')])
@pytest.mark.parametrize('pattern', ['*.safetensors', '*.json'])
def test_damaged_cache_is_rebuilt(tmp_path, load, damage, pattern):
    folder = write_images(tmp_path/'set')
    first = load(folder)
    pixels = first.train_x.clone()
    del first
    for path in (tmp_path/'cache').glob(pattern): damage(path)
    assert torch.equal(load(folder).train_x, pixels)

def test_cache_folder_that_cannot_be_used(tmp_path, monkeypatch):
    folder = write_images(tmp_path/'set')
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='cache folder .* cannot be written') as error:
        load_dataset(folder, cache=tmp_path/'file'/'cache', progress=False)
    one_sentence(error)
    monkeypatch.setenv('LLPROBE_CACHE', str(tmp_path/'file'/'cache'))
    with pytest.warns(UserWarning, match='set LLPROBE_CACHE'): d = load_dataset(folder, progress=False)
    with pytest.warns(UserWarning): path = cached_file(d)
    assert path.is_file() and len(d.train_y) == 6

@pytest.mark.skipif(os.geteuid() == 0, reason='root may read and write everything')
def test_cache_folder_without_permission(tmp_path):
    folder, cache = write_images(tmp_path/'set'), tmp_path/'cache'
    cache.mkdir(mode=0o000)
    with pytest.raises(InputError, match='Permission denied'): load_dataset(folder, cache=cache, progress=False)
    cache.chmod(0o700)

def test_two_processes_fill_one_cache(tmp_path):
    folder, cache, go = write_images(tmp_path/'set', n=300), tmp_path/'cache', tmp_path/'go'
    code = f'''
import pathlib, time
from llprobe.data import load_dataset
pathlib.Path({str(tmp_path)!r}, "ready"+__import__("sys").argv[1]).touch()
while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.001)
d = load_dataset({str(folder)!r}, cache={str(cache)!r}, progress=False)
print(d.fingerprint, int(d.train_x.sum()))'''
    children = [subprocess.Popen([sys.executable, '-c', code, str(i)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for i in range(2)]
    until = time.time()+60
    while len(list(tmp_path.glob('ready*'))) < 2 and time.time() < until: time.sleep(0.01)
    go.touch()
    first, second = [child.communicate(timeout=60)[0] for child in children]
    assert first == second and first
    assert sorted(p.suffix for p in cache.iterdir()) == ['.json', '.safetensors'] and not list(cache.glob('.*'))

def test_saved_file(tmp_path):
    rng = np.random.default_rng(0)
    d = from_arrays(rng.random((8, 3)), [0, 1]*4, rng.random((2, 3)), [0, 1], classes=['nö', 'yes "sir"'], name='x')
    save_dataset(d, tmp_path/'x.safetensors')
    for e in (open_dataset(tmp_path/'x.safetensors'), load_dataset(tmp_path/'x.safetensors')):
        assert repr(e) == repr(d) and e.classes == d.classes
        assert all(torch.equal(getattr(e, k), getattr(d, k)) for k in ('train_x', 'train_y', 'test_x', 'test_y'))
    (tmp_path/'mine.json').write_text('[1, 2]')
    with pytest.raises(InputError, match='mine.json is not a readable llprobe data set') as error: load_dataset(tmp_path/'mine.json')
    one_sentence(error)

@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='Linux tells what is mapped')
def test_file_is_mapped_and_safe_from_writes(tmp_path):
    d = load_dataset('digits')
    path = cached_file(d, tmp_path)
    mapped = open_dataset(path)
    assert str(path) in Path('/proc/self/maps').read_text()
    mapped.train_x.zero_()
    assert torch.equal(open_dataset(path).train_x, d.train_x)

def test_cached_file_is_named_by_content(tmp_path):
    d = load_dataset('iris')
    assert cached_file(d) == cache_folder()/f'{d.fingerprint}.safetensors'
    renamed = from_arrays(d.train_x, d.train_y, classes=d.classes, name='other')
    assert renamed.fingerprint == d.fingerprint
    assert from_arrays(d.train_x, d.train_y).fingerprint != d.fingerprint, 'class names are content'


# names

@pytest.mark.parametrize('name, shape, k', [('digits', (1, 8, 8), 10), ('iris', (4,), 3), ('wine', (13,), 3), ('breast_cancer', (30,), 2), ('diabetes', (10,), 0)])
def test_embedded(name, shape, k):
    d = load_dataset(name)
    assert (d.input_shape, d.n_classes, d.test_x) == (shape, k, None)
    assert d.train_x.dtype == (torch.uint8 if d.is_image else torch.float32) and d.train_y.dtype == (torch.int64 if k else torch.float32)
    assert (d.task, d.metric) == (('classification', 'accuracy') if k else ('regression', 'r2'))

def test_fingerprint_stays():
    "A study on digits must still match it after an update"
    assert load_dataset('digits').fingerprint == '6ad77284cb749ac1'
    assert load_dataset('diabetes').fingerprint == 'a43ec2233662c9f0'

@pytest.mark.parametrize('name', ['nope', '', 'no/such/folder', 'Digits'])
def test_unknown_name(name):
    with pytest.raises(InputError, match='neither a data set llprobe knows') as error: load_dataset(name)
    assert all(known in one_sentence(error) for known in DATASETS)

@pytest.mark.parametrize('size', [0, -3, 2.5, '8'])
def test_bad_image_size(tmp_path, load, size):
    with pytest.raises(InputError, match='image_size must be'): load(write_images(tmp_path/'set'), image_size=size)

def test_image_size_of_a_named_set():
    with pytest.raises(InputError, match='image_size is for folders'): load_dataset('digits', image_size=4)

def test_data_folder_wins(tmp_path, monkeypatch, load):
    write_images(tmp_path/'sets'/'cifar10'/'train'); write_images(tmp_path/'sets'/'mine')
    monkeypatch.setenv('LLPROBE_DATA', str(tmp_path/'sets'))
    assert load('cifar10').classes == ('a', 'b') and load('mine').name == 'mine'
    assert load('digits').n_classes == 10
    assert load('cifar10', root=tmp_path/'sets').name == 'cifar10'

def test_works_without_torchvision():
    run('import sys; sys.modules["torchvision"] = None; import llprobe.sampler; from llprobe.data import load_dataset; load_dataset("digits")')

def test_broken_torchvision_is_a_sentence(monkeypatch, load):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(InputError, match='mnist needs torchvision') as error: load('mnist')
    one_sentence(error)


# torchvision's formats, written here so that its own readers run without a download

def idx(array): return struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.tobytes()

@pytest.mark.parametrize('name, folder', [('mnist', 'MNIST'), ('fashion_mnist', 'FashionMNIST')])
def test_mnist_format(tmp_path, load, name, folder):
    rng, raw = np.random.default_rng(0), tmp_path/'root'/folder/'raw'
    raw.mkdir(parents=True)
    written = {}
    for part, n in dict(train=40, t10k=20).items():
        written[part] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (raw/f'{part}-images-idx3-ubyte').write_bytes(idx(written[part]))
        (raw/f'{part}-labels-idx1-ubyte').write_bytes(idx((np.arange(n) % 10).astype(np.uint8)))
    d = load(name, root=tmp_path/'root')
    assert (d.input_shape, len(d.classes), d.name) == ((1, 28, 28), 10, name)
    assert np.array_equal(d.train_x[:, 0], written['train']) and np.array_equal(d.test_x[:, 0], written['t10k'])
    assert d.test_y.tolist() == [*range(10)]*2

@pytest.mark.parametrize('name, kind, k', [('cifar10', 'CIFAR10', 10), ('cifar100', 'CIFAR100', 100)])
def test_cifar_format(tmp_path, load, monkeypatch, name, kind, k):
    kind = getattr(pytest.importorskip('torchvision').datasets, kind)
    folder, rng = tmp_path/'root'/kind.base_folder, np.random.default_rng(0)
    folder.mkdir(parents=True)
    label, written = ('labels' if k == 10 else 'fine_labels'), {}
    def write(filename, content):
        (folder/filename).write_bytes(pickle.dumps(content))
        return [filename, hashlib.md5((folder/filename).read_bytes()).hexdigest()]
    for part in ('train_list', 'test_list'):
        pixels = [rng.integers(0, 256, (2*k, 3072), dtype=np.uint8) for _ in getattr(kind, part)]
        written[part] = np.concatenate(pixels).reshape(-1, 3, 32, 32)
        monkeypatch.setattr(kind, part, [write(f, {'data': p, label: [*range(k)]*2}) for (f, _), p in zip(getattr(kind, part), pixels)])
    filename, md5 = write(kind.meta['filename'], {kind.meta['key']: [f'class {i}' for i in range(k)]})
    monkeypatch.setattr(kind, 'meta', {**kind.meta, 'md5': md5})
    d = load(name, root=tmp_path/'root')
    assert (d.input_shape, d.classes[3]) == ((3, 32, 32), 'class 3')
    assert np.array_equal(d.train_x, written['train_list']) and np.array_equal(d.test_x, written['test_list'])

def test_svhn_format(tmp_path, load, monkeypatch):
    from scipy.io import savemat
    kind = pytest.importorskip('torchvision').datasets.SVHN
    written, lists = {}, {}
    for part in ('train', 'test'):
        path = tmp_path/f'{part}_32x32.mat'
        written[part] = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        savemat(path, dict(X=written[part], y=(np.arange(20) % 10 + 1).astype(np.uint8)[:, None]))
        lists[part] = ['http://127.0.0.1:9/', path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(kind, 'split_list', lists)
    d = load('svhn', root=tmp_path)
    assert np.array_equal(d.train_x, written['train'].transpose(3, 2, 0, 1))
    assert (d.train_y[9], d.classes[0], d.n_classes) == (0, '0', 10), 'SVHN writes the digit 0 as 10'

def test_no_network(tmp_path, load, monkeypatch):
    datasets, closed = pytest.importorskip('torchvision').datasets, 'http://127.0.0.1:9/'
    for kind in (datasets.MNIST, datasets.FashionMNIST): monkeypatch.setattr(kind, 'mirrors', [closed])
    for kind in (datasets.CIFAR10, datasets.CIFAR100): monkeypatch.setattr(kind, 'url', closed+'cifar.tar.gz')
    monkeypatch.setattr(datasets.SVHN, 'split_list', {part: [closed+part, f'{part}.mat', '0'*32] for part in ('train', 'test')})
    started = time.time()
    for name in ('mnist', 'fashion_mnist', 'cifar10', 'cifar100', 'svhn'):
        with pytest.raises(InputError, match=f'{name} is not in .* and cannot be downloaded') as error: load(name, root=tmp_path/'root')
        assert f'LLPROBE_DATA/{name}' in one_sentence(error)
    assert time.time()-started < 20

@pytest.fixture
def housing(tmp_path, monkeypatch):
    "Makes scikit-learn download a small archive of its format from a folder, or from nowhere"
    import io, tarfile
    module = __import__('sklearn.datasets._california_housing', fromlist=['ARCHIVE'])
    table = np.random.default_rng(0).uniform(1, 2, (60, 9))
    text = '\n'.join(','.join(map(str, row)) for row in table).encode()
    with tarfile.open(tmp_path/'housing.tgz', 'w:gz') as tar:
        info = tarfile.TarInfo('CaliforniaHousing/cal_housing.data')
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    def serve(url=None):
        checksum = hashlib.sha256((tmp_path/'housing.tgz').read_bytes()).hexdigest()
        monkeypatch.setattr(module, 'ARCHIVE', module.ARCHIVE._replace(url=url or (tmp_path/'housing.tgz').as_uri(), checksum=checksum))
        return table
    return serve

def test_california_housing_format(tmp_path, load, housing):
    table = housing()
    d = load('california_housing')
    assert (d.task, d.input_shape, len(d.train_y)) == ('regression', (8,), 60) and np.allclose(d.train_y, table[:, 8]/1e5)
    housing('http://127.0.0.1:9/')
    assert load('california_housing').fingerprint == d.fingerprint # kept in the cache

def test_california_housing_without_network(tmp_path, load, housing):
    housing('http://127.0.0.1:9/')
    with pytest.raises(InputError, match=f'california_housing is not in {tmp_path/"root"} and cannot be downloaded') as error: load('california_housing', root=tmp_path/'root')
    assert 'cal_housing' in one_sentence(error)


# arrays

@pytest.mark.parametrize('shape, expected', [((6, 8, 9), (1, 8, 9)), ((6, 1, 8, 9), (1, 8, 9)), ((6, 3, 8, 9), (3, 8, 9)), ((6, 8, 9, 3), (3, 8, 9)),
                                             ((6, 8, 9, 1), (1, 8, 9)), ((6, 3, 8, 3), (3, 8, 3)), ((6, 5), (5,))])
@pytest.mark.parametrize('kind', ['uint8', 'int64', 'float32', 'torch', 'bfloat16'])
def test_array_layouts(shape, expected, kind):
    x = np.random.default_rng(0).integers(0, 256, shape)
    x = dict(uint8=lambda: x.astype(np.uint8), int64=lambda: x, float32=lambda: (x/255).astype(np.float32), torch=lambda: torch.tensor(x),
             bfloat16=lambda: torch.tensor(x/255).bfloat16())[kind]()
    d = from_arrays(x, [0, 1]*3)
    assert d.input_shape == expected and d.train_x.is_contiguous()

@given(npst.arrays(np.uint8, (4, 3, 5, 2)))
def test_channel_order_and_scale_do_not_matter(x):
    "The same pixels in any layout are the same data set"
    layouts = [x, x.transpose(0, 2, 3, 1), torch.tensor(x), (x/255), (x/255).astype(np.float32), x.astype(np.int16)]
    assert {from_arrays(layout, [0, 1]*2).fingerprint for layout in layouts} == {from_arrays(x, [0, 1]*2).fingerprint}

@pytest.mark.parametrize('y, classes, expected, names', [
    ([5, 9]*3, None, [0, 1]*3, ('5', '9')), (['b', 'a']*3, None, [1, 0]*3, ('a', 'b')), ([1., 0.]*3, None, [1, 0]*3, ('0', '1')),
    ([True, False]*3, None, [1, 0]*3, ('False', 'True')), ([1, 0]*3, ['x', 'y'], [1, 0]*3, ('x', 'y')),
    (['y', 'x']*3, ['y', 'x'], [0, 1]*3, ('y', 'x')), (np.array(['b', 'a']*3, dtype=object), None, [1, 0]*3, ('a', 'b')),
    (torch.tensor([1, 0]*3), None, [1, 0]*3, ('0', '1'))])
def test_labels(y, classes, expected, names):
    d = from_arrays(np.zeros((6, 2)), y, np.zeros((6, 2)), y, classes)
    assert d.train_y.tolist() == d.test_y.tolist() == expected and d.classes == names

@pytest.mark.parametrize('change, message', [
    (dict(x=np.full((6, 2), np.inf)), 'x holds inf in row 0, column 0'), (dict(x=np.full((6, 2), 1e300)), 'x holds inf'),
    (dict(x=[['a', 'b']]*6), 'give numbers'), (dict(x=np.zeros(6)), 'give images'), (dict(x=np.zeros((6, 5, 5, 5))), 'give images'),
    (dict(x=np.zeros((0, 2)), y=[]), 'is empty'), (dict(x=np.full((6, 4, 4), 300)), 'whole numbers in 0'),
    (dict(x=np.full((6, 4, 4), -1.)), 'floats in'), (dict(x=np.full((6, 4, 4), np.nan)), 'pixels from nan'),
    (dict(y=[0.5, 1]*3), 'whole numbers or strings'), (dict(y=np.zeros((6, 2))), 'one label for each'), (dict(y=[0]*6), 'one class only'),
    (dict(y=[0, 1, 2, 3, 4, 5]), 'at least 2'), (dict(y=[0, 3]*3, classes=['a', 'b']), 'holds 3'), (dict(y=['a', 'c']*3, classes=['a', 'b']), "holds 'c'"),
    (dict(classes=['a', 'b', 'c']), "class 'c' of arrays has too few"), (dict(test_x=np.zeros((1, 2))), 'give both or neither'),
    (dict(test_x=np.zeros((1, 3)), test_y=[0]), r'samples of shape \(3,\)'), (dict(y=np.array(['a', None]*3, dtype=object)), 'y holds None in row 1'), (dict(y=[np.nan, 1.]*3), 'y holds nan in row 0')])
def test_bad_arrays(change, message):
    with pytest.raises(InputError, match=message) as error: from_arrays(**{**dict(x=np.zeros((6, 2)), y=[0, 1]*3), **change})
    one_sentence(error)

def test_arrays_are_copied():
    x = np.zeros((4, 3, 3), np.uint8)
    d = from_arrays(x, [0, 1]*2)
    x[:] = 9
    assert (d.train_x == 0).all()


# splits

labels = st.lists(st.integers(2, 30), min_size=2, max_size=8).flatmap(lambda counts: st.permutations(np.repeat(np.arange(len(counts)), counts).tolist()))

@settings(deadline=None)
@given(labels, st.integers(0, 5), st.floats(0.02, 0.25), st.floats(0.02, 0.25))
def test_split_partitions_and_stratifies(y, seed, val_fraction, test_fraction):
    d = from_arrays(np.zeros((len(y), 1)), y)
    s, again = (split_dataset(d, seed, val_fraction, test_fraction) for _ in range(2))
    parts = [s.train, s.val, s.test]
    assert torch.cat(parts).sort().values.tolist() == list(range(len(y)))
    assert all(torch.equal(a, b) for a, b in zip(parts, [again.train, again.val, again.test]))
    n, n_class, held = len(y), np.bincount(y), len(s.val)+len(s.test)
    n_train = np.bincount(s.train_y, minlength=d.n_classes)
    assert n_train.min() >= 1
    assert (abs(n_train - n_class*len(s.train)/n) < 1).all()
    n_held = np.bincount(torch.cat([s.val_y, s.test_y]), minlength=d.n_classes)
    assert (abs(np.bincount(s.val_y, minlength=d.n_classes) - n_held*len(s.val)/held) < 1).all()
    assert len(s.val) == max(1, round(val_fraction*n)) and len(s.test) == max(1, round(test_fraction*n))

@given(labels, st.integers(0, 3), st.floats(0, 1))
def test_stratified_mask(y, seed, fraction):
    y = np.array(y)
    m = round(fraction*len(y))
    chosen = stratified_mask(y, m, np.random.default_rng(seed))
    assert chosen.sum() == m and (abs(np.bincount(y[chosen], minlength=y.max()+1) - m*np.bincount(y)/len(y)) < 1).all()

def test_split_of_a_set_with_a_test_part():
    rng = np.random.default_rng(0)
    d = from_arrays(rng.random((50, 2)), [0, 1]*25, rng.random((10, 2)), [0, 1]*5)
    s = split_dataset(d)
    assert (len(s.train), len(s.val), len(s.test)) == (45, 5, 10)
    x, y = s.inputs('test')
    assert torch.equal(x, d.test_x) and torch.equal(y, d.test_y) and torch.equal(s.test_y, y)
    with pytest.raises(InputError, match="got 'dev'"): s.inputs('dev')

def test_moments_are_of_the_training_part():
    d = load_dataset('digits')
    s = split_dataset(d)
    x = s.inputs('train')[0].double()
    assert torch.allclose(s.mean.double(), x.mean((0, 2, 3))) and torch.allclose(s.std.double(), x.std((0, 2, 3), correction=0))
    t = split_dataset(from_arrays(np.c_[np.full(20, 1e6), np.arange(20)], [0, 1]*10))
    assert t.std[0] == 1 and t.std.dtype == torch.float32 and t.mean[0] == 1e6

@pytest.mark.parametrize('options, message', [
    (dict(val_fraction=0), r'val_fraction must be in \(0, 1\)'), (dict(test_fraction=1.), 'test_fraction must be'), (dict(val_fraction=float('nan')), 'val_fraction'),
    (dict(val_fraction=0.6, test_fraction=0.5), 'leave nothing'), (dict(val_fraction=0.45, test_fraction=0.45), 'too few samples')])
def test_bad_split(options, message):
    with pytest.raises(InputError, match=message) as error: split_dataset(from_arrays(np.zeros((40, 1)), [0]*38+[1]*2), **options)
    one_sentence(error)

# regression

finite = st.floats(-1e6, 1e6, width=32)
targets = st.lists(finite, min_size=30, max_size=80).filter(lambda y: len(set(y)) > 1)

def regression(y, **options): return from_arrays(np.arange(len(y))[:, None], y, task='regression', **options)

def test_regression_round_trip(tmp_path):
    d = regression([1, 2, 4, 8], test_x=[[0], [1]], test_y=[3., 5.], name='four')
    assert d.train_y.tolist() == [1, 2, 4, 8] and d.test_y.dtype == torch.float32 and (d.classes, d.n_classes, d.n_outputs) == ((), 0, 1)
    save_dataset(d, tmp_path/'four')
    again = open_dataset(tmp_path/'four')
    assert (again.task, again.fingerprint, repr(again)) == ('regression', d.fingerprint, repr(d)) and torch.equal(again.train_y, d.train_y)
    assert regression([1, 2, 4, 9]).fingerprint != regression([1, 2, 4, 8]).fingerprint

def test_a_file_from_before_tasks_is_a_classification(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file
    d = load_dataset('iris')
    save_dataset(d, tmp_path/'new')
    with safe_open(tmp_path/'new', 'pt') as file: metadata = file.metadata()
    del metadata['task']
    save_file(dict(train_x=d.train_x, train_y=d.train_y), tmp_path/'old', metadata)
    assert open_dataset(tmp_path/'old').task == 'classification' and repr(open_dataset(tmp_path/'old')) == repr(d)

@pytest.mark.parametrize('y, options, message', [
    ([1.5]*4, {}, r'has one target only \(1.5, samples: 4\)'), ([1e9, 1e9+1]*2, {}, 'finer than float32 can tell'), # the same number there
    ([1, 2, float('nan'), 4], {}, 'y holds nan in row 2'), ([1, 2, 3, 1e39], {}, r'y holds 1e\+39 in row 3'), (['a', 'b']*2, {}, 'must be numbers'),
    ([True, False]*2, {}, 'must be numbers'), ([1, 2, 3], {}, 'one number for each of the 4'), ([[1, 1], [2, 2], [3, 3], [4, 4]], {}, 'one number for each of the 4'),
    ([1, 2, 3, 4], dict(classes=['a', 'b']), 'classes are for classification'), ([1, 2, 3, 4], dict(task='rank'), "got 'rank'")])
def test_bad_targets(y, options, message):
    with pytest.raises(InputError, match=message) as error: from_arrays(np.zeros((4, 1)), y, **dict(task='regression') | options)
    one_sentence(error)

def test_real_labels_are_told_about_regression():
    with pytest.raises(InputError, match="task='regression'") as error: from_arrays(np.zeros((4, 1)), [0.5, 1, 2, 3])
    one_sentence(error)

@given(st.lists(finite, max_size=60), st.integers(1, 12))
def test_strata_are_equal_bins_in_rank_order(y, n_bins):
    bins, y = strata(torch.tensor(y), n_bins).numpy(), np.array(y, np.float32)
    if not len(y): return
    counts = np.bincount(bins)
    assert len(counts) == max(1, min(n_bins, len(y)//2)) and counts.max() - counts.min() <= 1 and (counts.min() > 1 or len(y) < 2)
    assert (np.diff(y[np.lexsort((y, bins))]) >= 0).all()

@settings(deadline=None)
@given(targets, st.integers(0, 5))
def test_split_of_a_regression(y, seed):
    d = regression(y)
    try: s, again = (split_dataset(d, seed, 0.2, 0.2) for _ in range(2))
    except InputError as error: assert 'one target only' in str(error); return
    assert torch.cat([s.train, s.val, s.test]).sort().values.tolist() == list(range(len(y)))
    assert all(torch.equal(getattr(s, part), getattr(again, part)) for part in ('train', 'val', 'test'))
    bins = strata(d.train_y).numpy()
    assert (abs(np.bincount(bins[s.train]) - np.bincount(bins)*len(s.train)/len(y)) < 1).all()
    standard = s.samples('train')[1].double()
    assert abs(standard.mean()) < 1e-3 and abs(standard.std(correction=0)-1) < 1e-3
    for part in ('train', 'val', 'test'):
        raw, standard = s.inputs(part)[1].double(), s.samples(part)[1].double()
        assert torch.equal(raw, getattr(s, f'{part}_y').double()) and torch.allclose(standard*s.target_std + s.target_mean, raw, rtol=1e-5, atol=1e-5*(s.target_std+abs(s.target_mean)))
        assert not torch.equal(raw, raw[:1].expand(len(raw)))

def test_samples_of_classes_are_inputs():
    s = split_dataset(load_dataset('iris'))
    assert all(torch.equal(a, b) for a, b in zip(s.samples('val'), s.inputs('val'))) and (s.target_mean, s.target_std) == (0, 1)

@pytest.mark.parametrize('part', ['val', 'test'])
def test_a_part_with_one_target_is_refused(part):
    with pytest.raises(InputError, match=f'the {part} part of arrays has one target only') as error:
        split_dataset(regression(range(20)), **dict(val_fraction=0.2, test_fraction=0.2) | {f'{part}_fraction': 0.05})
    one_sentence(error)

def test_global_random_state_is_untouched():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    split_dataset(load_dataset('digits'))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_a_frame_keeps_its_columns_and_says_which_of_them_cannot_be_used(tmp_path):
    frame = pd.DataFrame(dict(rooms=pd.array([3, 4, None, 5]*5, dtype='Int64'), is_new=[True, False]*10, area=np.linspace(40, 90, 20)))
    filled = frame.fillna(dict(rooms=4))
    dataset = from_arrays(filled, pd.DataFrame(dict(price=np.arange(20.))), task='regression')
    assert dataset.columns == ('rooms', 'is_new', 'area') and dataset.train_x[0].tolist() == [3, 1, 40]
    save_dataset(dataset, tmp_path/'houses')
    assert open_dataset(tmp_path/'houses').columns == dataset.columns
    for x, y, message in [(frame, np.arange(20.), 'x holds nan in row 2, column rooms'), (filled.assign(sold=pd.Timestamp('2024-01-01')), np.arange(20.), 'the columns sold hold neither numbers nor words')]:
        with pytest.raises(InputError, match=message):
            from_arrays(x, y, task='regression')
    cities = filled.assign(city=['Rome', 'Oslo']*10)
    encoded = from_arrays(cities, np.arange(20.), cities[::-1], np.arange(20.), task='regression')
    assert encoded.columns[3:] == ('city=Oslo', 'city=Rome') and encoded.train_x[0].tolist() == [3, 1, 40, 0, 1] and torch.equal(encoded.test_x, encoded.train_x.flip(0))
    with pytest.raises(InputError, match="test_x holds 'Bergen' in column city, where the training had Oslo, Rome"):
        from_arrays(cities, np.arange(20.), cities.replace('Rome', 'Bergen'), np.arange(20.), task='regression')
    with pytest.raises(InputError, match=r'give test_x\[x.columns\]'):
        from_arrays(filled, np.arange(20.), filled[filled.columns[::-1]], np.arange(20.), task='regression')
    with pytest.raises(InputError, match='y holds (None|nan) in row 19'):
        from_arrays(filled, pd.Series(['a', 'b']*9+['a', None]))


def test_features_finer_than_float32_are_told():
    seconds = 1.7e9+np.arange(200.)
    with pytest.warns(UserWarning, match='column time of x varies by 199 about 1.7e.09, finer than float32 can tell'):
        from_arrays(pd.DataFrame(dict(time=seconds)), seconds-seconds[0], task='regression')


def test_a_link_that_leads_in_a_circle_adds_no_images(tmp_path):
    for name in 'ab':
        (tmp_path/name).mkdir()
        for i in range(4):
            Image.fromarray(np.full((8, 8), 30*i, np.uint8)).save(tmp_path/name/f'{i}.png')
    (tmp_path/'a'/'self').symlink_to(tmp_path/'a')
    assert len(load_dataset(tmp_path, progress=False).train_y) == 8


def test_a_folder_beside_train_and_test_is_not_left_out_in_silence(tmp_path):
    for part in ('train', 'val'):
        for name in 'ab':
            (tmp_path/part/name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.full((8, 8), 30*i, np.uint8)).save(tmp_path/part/name/f'{i}.png')
    with pytest.warns(UserWarning, match='only train and test are read, and not val: validation samples are split off from train'):
        assert len(load_dataset(tmp_path, progress=False).train_y) == 8


def test_labels_come_as_pandas_keeps_them():
    x = np.arange(24.).reshape(12, 2)
    for labels in (pd.Series(['a', 'b']*6, dtype='string'), pd.DataFrame(dict(y=['a', 'b']*6)), pd.Series(['a', 'b']*6, dtype='category')):
        assert from_arrays(x, labels).classes == ('a', 'b')
    assert from_arrays(x, pd.Series([0, 1]*6, dtype=object)).n_classes == 2
    assert from_arrays(pd.DataFrame(dict(a=[1, 0.5]*6, b=[True, False]*6), dtype=object), [0, 1]*6).train_x[:2].tolist() == [[1, 1], [0.5, 0]]
    with pytest.raises(InputError, match='y holds (None|nan) in row 1'):
        from_arrays(x, pd.Series(['a', None]*6, dtype='string'))
    with pytest.raises(InputError, match="two columns are called 'a'"):
        from_arrays(pd.DataFrame(x, columns=['a', 'a']), [0, 1]*6)


@pytest.mark.parametrize('values, is_told', [(1_000_000+np.arange(60.), False), (1990+np.arange(60.), False), (20240101+np.arange(60), True), (np.full(60, 1.7e9), False), (1.7e9+np.arange(60.), True),
                                             (np.random.default_rng(0).normal(1000, 1, 60), False)])
def test_only_what_float32_merges_is_told(values, is_told, recwarn):
    from_arrays(pd.DataFrame(dict(v=values)), [0, 1]*30)
    assert ['finer than float32' in str(w.message) for w in recwarn] == [True]*is_told
