"Recipes, splits, budgets, the order of frames and the places of crops are the same on every machine; weights are not"
import hashlib, json
import numpy as np, pandas as pd, pytest, torch
from itertools import islice, product
from cwcl.core import PRESETS, Recipe, data_file, recipe
from cwcl.data.augment import draw_factors
from cwcl.data.labels import class_set
from cwcl.data.order import label_groups, two_streams
from cwcl.data.scene import draw_labels
from cwcl.data.splits import label_budget, split_frames, video_folds
from cwcl.pairs import label_set_ids

def digest(o):
    "Sixteen digits that change with any of the integers, truths and texts in a nest"
    return hashlib.sha256(json.dumps(o).encode()).hexdigest()[:16]

@pytest.fixture(scope='module')
def table():
    "The 8080 frames of CholecSeg8k, without pictures"
    clips = pd.read_csv(data_file('clips.csv'))
    t = clips.loc[clips.index.repeat(clips.frames), ['video', 'clip', 'start']].reset_index(drop=True)
    return t.assign(frame=t.start + t.groupby('clip').cumcount(), image='there', mask='there').drop(columns='start')

def masks(table):
    frames = ('video01', 'video01_00080', 90), ('video12', 'video12_15750', 15780), ('video52', 'video52_00080', 159)
    return [draw_labels(*o, (107, 60)).mask.tolist() for o in frames]

def folds(table): return [video_folds(table, 3, o, s) for o in ('pinned', 'partition', 'seeds') for s in (0, 7)]

def budgets(table):
    draws = product((.01, .1), ('frame', 'clip', 'video'), (0, 7))
    return [np.flatnonzero(label_budget(table, *o)).tolist() for o in draws]

def split(table):
    t = split_frames(table, recipe('paper', fold=1, seed=3))
    return t.part.tolist(), t.labelled.tolist()

def sets(table): return torch.from_numpy(np.arange(60)[:,None]%9 >> np.arange(8) & 1), torch.arange(60)%4 - 1

def order(table):
    groups = label_groups(*sets(table))
    ways = product((0, 7), ('uniform', 'pk'))
    return [list(islice(two_streams(range(0, 60, 3), groups, 4, 16, *o), 20)) for o in ways]

def positives(table): return label_set_ids(*sets(table)).tolist()

def crops(table):
    d = draw_factors(200, (240, 427), 256, rng=torch.Generator().manual_seed(5))
    return [d[k].long().tolist() for k in ('top', 'left', 'flip', 'blur')]

FROZEN = dict(masks='17f3051f495ae649', folds='d6824dbe880d2039', budgets='baf09d9b782e36e2', split='9a6f81c67b648c09',
    order='b5e06c9cc9526a84', positives='44bff7fe9d32bc76', crops='d57742281cffcf74')

@pytest.mark.parametrize('name', FROZEN)
def test_it_is_what_it_was_on_another_machine(table, name): assert digest(globals()[name](table)) == FROZEN[name]

@pytest.mark.parametrize('preset', PRESETS)
def test_a_recipe_comes_back_from_its_text(preset):
    text = recipe(preset, temp=.1 + .2, lr=1/3).to_json()
    assert Recipe.from_json(text) == recipe(preset, temp=.1 + .2, lr=1/3) and Recipe.from_json(text).to_json() == text

def test_class_sets_have_their_ids(): assert digest([class_set(n).ids for n in (8, 10, 13)]) == 'fa9e566942f90518'
