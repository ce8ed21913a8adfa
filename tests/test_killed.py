"Processes that are killed while they work, and what the next one finds"
import os, random, signal, pytest
import numpy as np
from dataclasses import replace
from cwcl.data.store import mapped_array
from cwcl.film import probe_video, video_writer
from cwcl.study.grid import Run, method_recipe, run_all
from test_grid import attempt, figures, small_runs
from test_resume import names

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='Windows cannot fork')

def killed(work):
    "Let another process work until it kills itself"
    def dies(): os.kill(os.getpid(), signal.SIGKILL)
    pid = os.fork()
    if not pid:
        try: work(dies)
        finally: os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

def test_a_store_whose_builder_is_killed_is_built_by_the_next(tmp_path):
    def half(dies, out):
        out[:5] = 7
        dies()
    def whole(out): out[:] = 7
    path = tmp_path/'frames.npy'
    killed(lambda dies: mapped_array(path, (10, 4), lambda out: half(dies, out)))
    assert not path.exists() and names(tmp_path)
    assert (mapped_array(path, (10, 4), whole) == 7).all()

def test_a_film_whose_writer_is_killed_does_not_appear(tmp_path):
    frame = np.zeros((48, 64, 3), np.uint8)
    def write(dies):
        with video_writer(tmp_path/'a.mp4', 25) as add:
            for i in range(9):
                add(frame)
                if i == 5: dies()
    killed(write)
    assert not (tmp_path/'a.mp4').exists()
    write(lambda: None)
    assert probe_video(tmp_path/'a.mp4')['frames'] == 9

@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_ends_with_the_same_bits(smoke, scenes, tmp_path):
    "Steps, validations, writes, and the same again while it resumes"
    runs = [Run('table1', method_recipe(smoke, 'dcl+cls', epochs=120))]
    run_all(runs, tmp_path/'whole', scenes, device='cpu')
    rng = random.Random(0)
    after = [rng.randint(1, 25) for _ in range(20)]
    codes,err = attempt(tmp_path/'g', scenes, dict(kind='kill', after=after), runs)
    assert codes == [-9]*20 + [0], err
    assert figures(tmp_path/'g') == figures(tmp_path/'whole')
    assert not list((tmp_path/'g').rglob('*.part.*')) and not list((tmp_path/'g').rglob('checkpoint'))

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(5))
def test_four_processes_of_which_five_are_killed(smoke, scenes, tmp_path_factory, seed):
    runs = [replace(o, recipe=replace(o.recipe, seed=s)) for o in small_runs(smoke) for s in (0, 1)]
    whole = tmp_path_factory.getbasetemp()/'whole'
    run_all(runs, whole, scenes, device='cpu')
    rng = random.Random(seed)
    after = [rng.uniform(.2, 3) for _ in range(5)]
    folder = tmp_path_factory.mktemp('grid')
    codes,err = attempt(folder, scenes, dict(kind='four', after=after), runs)
    assert codes == [0]*4, err
    assert figures(folder) == figures(whole)
    ended = (folder/'ended.txt').read_text().split()
    assert sorted(ended) == sorted(set(ended)) and not list(folder.rglob('*.part.*'))
