"The committed package, notebooks and README are exactly what the tools make of the notebooks."
import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def remade(tmp_path_factory) -> Path:
    "A copy of the sources, exported and cleaned from scratch"
    copy = tmp_path_factory.mktemp('remade')/'llprobe'
    shutil.copytree(ROOT/'nbs', copy/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for name in ('settings.ini', 'README.md'):
        shutil.copy(ROOT/name, copy)
    environment = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}  # nbdev exports nothing inside a test
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([Path(sys.executable).parent/command], cwd=copy, env=environment, check=True, capture_output=True)
    return copy


def differing(one: Path, other: Path, suffix: str) -> list[str]:
    "Files that only one folder has, or that differ"
    def files(root):
        return {p.relative_to(root) for p in root.rglob(f'*{suffix}') if not {'.ipynb_checkpoints', '__pycache__'} & set(p.parts)}
    common = files(one) & files(other)
    return sorted(map(str, (files(one) ^ files(other)) | {p for p in common if not filecmp.cmp(one/p, other/p, shallow=False)}))


def test_package_is_what_the_notebooks_export(remade):
    assert differing(remade/'llprobe', ROOT/'llprobe', '.py') == [], 'run make export'


def test_notebooks_are_clean(remade):
    assert differing(remade/'nbs', ROOT/'nbs', '.ipynb') == [], 'run make clean-notebooks'


def test_readme_is_what_the_index_notebook_says():
    subprocess.run([sys.executable, ROOT/'tests'/'readme.py', '--check'], check=True)


def test_a_module_imports_earlier_ones_only():
    order = {re.sub(r'^\d+[a-z]?_', '', path.stem): i for i, path in enumerate(sorted((ROOT/'nbs').glob('[0-9]*.ipynb')))}
    imports = {(name, used) for name in order for used in re.findall(r'^from \.(\w+) import', (ROOT/'llprobe'/f'{name}.py').read_text(), re.MULTILINE)}
    assert len(imports) > 100 and not [pair for pair in imports if order[pair[1]] >= order[pair[0]]]
