"Every result that is published, walked through"
import json, math, pytest, torch
from cwcl.core import Recipe, data_file
from cwcl.metrics import class_iou, mean_iou
from cwcl.study.grid import Run
from cwcl.study.records import VERSION, read_result
from cwcl.train import steps_per_epoch

try: files = sorted(data_file('results').glob('*.json'))
except ValueError: files = []

@pytest.fixture(params=files, ids=lambda o: o.stem)
def result(request): return read_result(request.param)

def test_key_recipe_and_size(result):
    r = Recipe(**result['recipe'])
    table,_,_,_,_,*reading = result['key'].split('-', 5)
    assert Run(table, r, *reading).key == result['key']
    assert len(json.dumps(result)) < 40_000 and result['version'] == VERSION
    assert result['threads'] == r.threads and result['seconds'] >= result['train_seconds'] > 0

@pytest.mark.parametrize('part', ['valid', 'test'])
def test_scores_follow_from_the_confusion_matrix(result, part):
    "The means run over the classes that occur in the truth; the stored scores of a class have six digits"
    o = result[part]
    cm = torch.tensor(o['confusion'])
    for have,want in zip(o['class_iou'].values(), class_iou(cm).tolist(), strict=True):
        assert math.isnan(want) if have is None else have == pytest.approx(want, abs=1e-5)
    assert o['mean_iou'] == pytest.approx(float(mean_iou(cm, truth=True)), abs=1e-6)
    for k in ('image_iou', 'surface_dice'):
        counted = [v for v,n in zip(o[k].values(), cm.sum(1).tolist(), strict=True) if n and v is not None]
        assert o[f'mean_{k}'] == pytest.approx(sum(counted)/len(counted), abs=2e-6)

def test_clips_add_up(result):
    test = result['test']
    assert torch.equal(sum(map(torch.tensor, test['clips'].values())), torch.tensor(test['confusion']))

def test_steps_are_those_of_the_recipe(result):
    r = Recipe(**result['recipe'])
    f = result['frames']
    steps = r.epochs*steps_per_epoch(r, (f['train'], f['valid']))
    assert result['steps'] == steps and len(result['log']) == r.epochs
    if r.stage == 'frozen': assert result['pretrain']['steps'] == steps and result['pretrain']['method'] == r.method
    if r.budget_unit == 'frame': assert result['labelled'] == round(r.budget*f['train'])
