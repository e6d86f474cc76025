"Everything configurable lives in `settings.ini`; edit there, not here."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

extras = {key.removesuffix('_extra'): shlex.split(cfg[key]) for key in cfg if key.endswith('_extra')}
extras['dev'] = shlex.split(cfg['dev_requirements'])

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license='GPL-3.0-or-later', keywords=cfg['keywords'],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    include_package_data=True, zip_safe=False,
    python_requires='>='+cfg['min_python'],
    install_requires=shlex.split(cfg['requirements']), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
)
