"""Package metadata and requirements, read from settings.ini, the one place they are written."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

root = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(root/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

# `video_requirements` is the extra `video`, and so on; `all` is every extra for users, and `dev` that, the peers that
# `make bench` measures, and the tools
extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}
extras['all'] = sorted({o for k,v in extras.items() if k not in ('dev', 'peers') for o in v})
extras['dev'] += extras['peers'] + extras['all']

classifiers = ['Development Status :: 4 - Beta', 'Intended Audience :: Education',
    'Intended Audience :: Science/Research', 'Operating System :: OS Independent', 'Typing :: Typed',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Topic :: Scientific/Engineering :: Medical Science Apps.']
classifiers += [f'Programming Language :: Python :: {o}' for o in cfg['pythons'].split()]
url = cfg.get('git_url', '').removesuffix('.git').rstrip('/')
pages = dict(Source=url, Issues=f'{url}/issues', Changelog=f'{url}/blob/main/CHANGELOG.md') if url else {}

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    keywords=cfg['keywords'], license='Apache-2.0', long_description_content_type='text/markdown',
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(), extras_require=extras,
    classifiers=classifiers, project_urls=pages, packages=find_packages(include=['cwcl', 'cwcl.*']) + ['cwcl._data'],
    package_dir={'cwcl._data': 'data'},
    package_data={'cwcl': ['py.typed'], 'cwcl.widgets': ['*.js', '*.css'],
        'cwcl._data': ['*.csv', '*.json', 'results/*.json', 'results/trial/*.json', 'results/figure3/*', 'results/bench/*',
            'demo.*']},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(),
        nbdev=[f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]))
