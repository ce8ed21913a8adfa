"""Package metadata and requirements, read from settings.ini, the one place they are written."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

root = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(root/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'], keywords=cfg['keywords'],
    license='Apache-2.0', long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require=dict(dev=cfg['dev_requirements'].split(), export=cfg['export_requirements'].split()),
    packages=find_packages(include=['cwcl', 'cwcl.*']) + ['cwcl._data'],
    package_dir={'cwcl._data': 'data'}, package_data={'cwcl._data': ['*.csv', '*.json', 'results/*.json', 'results/figure3/*', 'demo.*']},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]))
