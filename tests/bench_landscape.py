"""Times llprobe's landscape and curvature against its peers, each in its own environment, in alternation.

`python tests/bench_landscape.py` serves timings: it reads {"task": ..., "library": ..., **sizes} as JSON lines and answers with seconds.
The experiment notebook starts one server per environment and asks them in turn through `compare`. Both sides use one thread, the same
PyTorch, the same models and the same data."""
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time

os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
import torch
from torch import nn
from torch.nn import functional as F


def network(kind, n):
    "The model and its n samples: an image network of 32 and 64 channels on 32 x 32 x 3, or a dense one of 64-128-10"
    torch.manual_seed(0)
    y = torch.randint(10, (n,))
    if kind == 'mlp': return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval(), torch.randn(n, 64), y
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4096, 10)).eval(), torch.randn(n, 3, 32, 32), y


def plane_llprobe(model, x, y, grid):
    from llprobe.landscape import loss_landscape
    return lambda: loss_landscape(model, x, y, n=grid)


def plane_loss_landscapes(model, x, y, grid):
    import loss_landscapes
    metric = loss_landscapes.metrics.Loss(F.cross_entropy, x, y)
    return lambda: loss_landscapes.random_plane(model, metric, distance=1, steps=grid, normalization='filter', deepcopy_model=True)


def plane_landscaper(model, x, y, grid):
    from landscaper.compute import compute_loss_landscape
    directions = [[torch.randn_like(p) for p in model.parameters()] for _ in range(2)]
    def loss(model, data):
        with torch.no_grad(): return F.cross_entropy(model(data[0]), data[1]).item()
    return lambda: compute_loss_landscape(model, (x, y), directions, loss, steps=grid, distance=1, dim=2, device='cpu')


def product_llprobe(model, x, y):
    from llprobe.curvature import hessian, random_vector
    H = contextlib.ExitStack().enter_context(hessian(model, x, y))
    v = random_vector(H, 0)
    return lambda: H.product(v)


def product_pyhessian(model, x, y):
    "With the graph of the whole batch kept, its faster mode"
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product
    H = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    v = [torch.randn_like(p) for p in H.params]
    return lambda: hessian_vector_product(H.gradsH, H.params, v)


def product_pyhessian_loader(model, x, y):
    "With a loader, whose graphs it builds anew for every product"
    from pyhessian import hessian
    H = hessian(model, nn.CrossEntropyLoss(), dataloader=list(zip(x.split(128), y.split(128))), cuda=False)
    v = [torch.randn_like(p) for p in H.params]
    return lambda: H.dataloader_hv_product(v)


def product_curvlinops(model, x, y):
    from curvlinops import HessianLinearOperator
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), list(zip(x.split(32), y.split(32))), check_deterministic=False)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    return lambda: H@v


def top_three(kind, n, epochs):
    "Products that the three largest eigenvalues of a network trained on digits take, to 1e-3, and their largest error"
    from llprobe.curvature import extreme_eigenvalues
    from sklearn.datasets import load_digits
    digits = load_digits()
    x, y = torch.tensor(digits.images[:n]/16-0.3, dtype=torch.float32), torch.tensor(digits.target[:n])
    x = x.flatten(1) if kind == 'mlp' else F.interpolate(x[:, None], scale_factor=4).expand(-1, 3, -1, -1).contiguous()
    model = network(kind, 1)[0]
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for epoch in range(epochs):
        for xb, yb in zip(x.split(64), y.split(64)):
            optimiser.zero_grad()
            F.cross_entropy(model(xb), yb).backward()
            optimiser.step()
    x, y = (x, y) if kind == 'mlp' else (x[:128], y[:128])
    quick, checked, exact = (extreme_eigenvalues(model, x, y, n_top=3, tolerance=t, verify=v) for t, v in ((1e-3, False), (1e-3, True), (1e-6, False)))
    errors = [abs(a-b)/b for a, b in zip(quick.top, exact.top)]
    return dict(network=kind, epochs=epochs, products=quick.n_products, with_verification=checked.n_products, largest_error=max(errors), risk=checked.risk, top=exact.top)


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter()-start


def versions():
    "Of the libraries that are installed here"
    found = {}
    for name in ('torch', 'numpy', 'llprobe', 'loss-landscapes', 'landscaper', 'pyhessian', 'curvlinops-for-pytorch'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError): found[name] = importlib.metadata.version(name)
    return found


def serve():
    "Answer timing requests; a job is prepared and run once before its first timing"
    torch.set_num_threads(1)
    out, sys.stdout, jobs = sys.stdout, sys.stderr, {}
    for line in sys.stdin:
        ask = json.loads(line)
        if ask['task'] == 'versions': answer = versions()
        elif ask['task'] == 'top_three': answer = top_three(ask['kind'], ask['n'], ask['epochs'])
        else:
            if line not in jobs:
                extra = (ask['grid'],) if ask['task'] == 'plane' else ()
                jobs[line] = globals()[f"{ask['task']}_{ask['library']}"](*network(ask['kind'], ask['n']), *extra)
                if ask['task'] != 'plane' or ask['kind'] == 'mlp': jobs[line]()
            answer = seconds(jobs[line])
        print(json.dumps(answer), file=out, flush=True)


class Server:
    "A server in an environment of its own"
    def __init__(self, python):
        environment = os.environ | dict(MPLBACKEND='agg') # A notebook's own backend is not installed there
        self.process = subprocess.Popen([python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request)+'\n')
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer: raise RuntimeError(f'the server of {self.process.args[0]} died on {request}')
        return json.loads(answer)

    def close(self): self.process.communicate()


def compare(ours, theirs, task, library, repeats, theirs_grid=None, **sizes):
    "Seconds of both sides, in alternation, and the ratio of their medians; a grid smaller than ours is scaled by its points"
    found = dict(llprobe=[], **{library: []})
    scale = (sizes['grid']/theirs_grid)**2 if theirs_grid else 1
    for _ in range(repeats):
        found['llprobe'].append(ours.ask(task=task, library='llprobe', **sizes))
        found[library].append(scale*theirs.ask(task=task, library=library, **sizes | (dict(grid=theirs_grid) if theirs_grid else {})))
    medians = {k: statistics.median(v) for k, v in found.items()}
    return dict(task=task, **sizes, seconds=found, medians=medians, ratio=medians[library]/medians['llprobe'], scaled_from_grid=theirs_grid)


def machine():
    "What the timings depend on"
    with contextlib.suppress(OSError):
        model = next((line.split(':', 1)[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), platform.processor())
    return dict(cpu=model, cores=os.cpu_count(), threads=1, system=platform.platform(), python=platform.python_version(), load=list(os.getloadavg()))


if __name__ == '__main__': serve()
