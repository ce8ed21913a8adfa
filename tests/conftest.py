"What the tests share."
import os
from pathlib import Path
import pytest

@pytest.fixture(scope='session')
def real():
    "Folder with a few real frames and tables; licensed, so never part of the project"
    path = os.environ.get('CWCL_REAL')
    if not path or not Path(path).is_dir(): pytest.skip('CWCL_REAL does not name the folder of real frames')
    return Path(path)
