"""Jobs whose times the training benchmark compares: llprobe's loop and the loop people write, many configs in several ways."""
import statistics
import time

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import VisionDataset

from llprobe.data import from_arrays, split_dataset
from llprobe.models import build_model
from llprobe.probe import ProbeSettings
from llprobe.training import TrainSettings, train

CONFIG = dict(num_channels=32, dropout=0.2, optimizer='sgd', learning_rate=0.05, momentum=0.9, weight_decay=5e-4, batch_size=128, augment='flip_crop')


def pictures(n, side=32):
    "Random colour pictures in ten classes: a loop's speed does not depend on what they show"
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8), np.arange(n) % 10


class Pictures(VisionDataset):
    "Pictures in memory, each made a PIL image when it is asked for, as torchvision's CIFAR10 does"
    def __init__(self, n, transform):
        super().__init__('.', transform=transform)
        self.data, self.targets = pictures(n)

    def __len__(self): return len(self.data)
    def __getitem__(self, i): return self.transform(Image.fromarray(self.data[i])), int(self.targets[i])


def textbook_network(c=32):
    "What `simple_cnn` computes, in the usual order of layers"
    blocks = [layer for a, b in ((3, c), (c, 2*c), (2*c, 4*c)) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4*c*16, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 10))


def plain_loop(n, workers=2):
    "The usual loop for one epoch: torchvision transforms, a DataLoader with workers, one optimiser step a batch"
    transform = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                    transforms.Normalize((0.5,)*3, (0.25,)*3)])
    loader = DataLoader(Pictures(n, transform), batch_size=128, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    model, loss_fn = textbook_network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def epoch():
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
    return epoch


def llprobe_loop(n, threads, precision='float32'):
    "llprobe's loop for one epoch of as many pictures, its validation on 100 more included"
    x, y = pictures(n+100)
    split = split_dataset(from_arrays(x, y, *pictures(100)), 0, val_fraction=100/(n+100))
    indices, settings = torch.arange(len(split.train_y)), TrainSettings(n_epochs=1, device='cpu', n_threads=threads, precision=precision)

    def epoch():
        train(build_model('simple_cnn', CONFIG, (3, 32, 32), 10), CONFIG, split, indices, settings)
    return epoch


def matrix_product(n=1024):
    "One square matrix product of 2 n³ floating-point operations"
    a, b = torch.randn(n, n), torch.randn(n, n)
    return lambda: a@b


def population_settings(architecture, n_epochs):
    return ProbeSettings(architecture=architecture, train=TrainSettings(n_epochs=n_epochs, device='cpu'))


def seconds(job):
    start = time.perf_counter()
    job()
    return time.perf_counter()-start


def alternate(jobs, repeats):
    "Seconds of each job by name, one after the other in turn after one run that is not counted"
    for job in jobs.values(): job()
    found = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items(): found[name].append(seconds(job))
    return found, {name: statistics.median(times) for name, times in found.items()}
