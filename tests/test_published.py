"Every result that is published, walked through"
import json, pytest, torch
from cwcl.core import Recipe, data_file
from cwcl.metrics import class_iou, mean_iou
from cwcl.study.grid import Run, VERSION, read_result
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

def test_scores_follow_from_the_confusion_matrix(result):
    t = result['test']
    cm = torch.tensor(t['confusion'])
    assert abs(float(mean_iou(cm)) - t['mean_iou']) < 1e-6
    for a,b in zip(class_iou(cm).tolist(), t['class_iou'].values()): assert b is None and a != a or abs(a - b) < 1e-5
    assert torch.equal(sum(map(torch.tensor, t['clips'].values())), cm)

def test_steps_are_those_of_the_recipe(result):
    r = Recipe(**result['recipe'])
    f = result['frames']
    steps = r.epochs*steps_per_epoch(r, (f['train'], f['valid']))
    assert result['steps'] == steps and len(result['log']) == r.epochs
    if r.stage == 'frozen': assert result['pretrain']['steps'] == steps and result['pretrain']['method'] == r.method
    if r.budget_unit == 'frame': assert result['labelled'] == round(r.budget*f['train'])
