"Copies the weights of `make demo` into data/, so that they travel in the wheel: python tools/demo_weights.py [RUN]"
import json, sys
from pathlib import Path
from cwcl.checkpoint import find_weights, load_model, save_model
from cwcl.core import InputError

home = Path(__file__).parents[1]/'data'

def main(run='runs/demo'):
    "Load and write again, so that only tensors, recipe and scores come along"
    metrics = json.loads((Path(run)/'metrics.json').read_text(encoding='utf-8'))
    net = load_model(find_weights(run), 'cpu')
    of_the_demo = metrics['data'] == 'embedded' and net.recipe.name == 'demo'
    if not of_the_demo: raise InputError(f'{run}: not of the demo; run make demo')
    path = save_model(home/'demo.safetensors', net, 'embedded', metrics['test']['class_iou'])
    print(f'{path}: {path.stat().st_size/1e6:.2f} MB, mean IoU {metrics["test"]["mean_iou"]:.3f} on the test videos')

if __name__ == '__main__': main(*sys.argv[1:])
