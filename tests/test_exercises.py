"The student's edition: a blank fails with one friendly line, exactly where it is, and the solution passes."
import json, os, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pytest
from cwcl.check import NotYet, blank, check, is_blank, is_solution, same, student_edition, write_exercises
from pages import cells, root, source

book = root/'nbs'
lessons = sorted(o for o in book.glob('[0-9]*.ipynb') if int(o.name[:2]) not in (56, 63))

def try_both(file):
    "Run a lesson once; each solution first as a blank. What went wrong, or nothing"
    os.environ.update(IN_TEST='1', MPLBACKEND='agg', OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    from execnb.shell import CaptureShell
    from nbdev.test import nb_test_cells
    os.chdir(book)
    shell,found = CaptureShell(file),[]
    def run(code):
        shell.run(code)
        return shell.exc
    todo = list(nb_test_cells(file, skip_flags=['slow', 'cuda']))
    for c,after in zip(todo, todo[1:] + [None]):
        if is_solution(c):
            if run(blank(c.source)) is not None: return found + [f'{file.name}: the blank does not run: {shell.exc!r}']
            e = run(after.source)
            if type(e).__name__ != 'NotYet' or 'still blank' not in str(e): found.append(f'{file.name}: a blank gives {e!r:.200}; cell: {c.source[:200]}')
        if (e := run(c.source)) is not None: return found + [f'{file.name}: {e!r:.300}; cell: {c.source[:200]}']
    return found

def in_own_process(file):
    "What went wrong in a lesson, which has Python to itself"
    p = subprocess.run([sys.executable, __file__, str(file)], capture_output=True, text=True)
    return json.loads(p.stdout.splitlines()[-1]) if not p.returncode else [f'{file.name}: {p.stderr[-500:]}']

def test_every_blank_says_so_and_every_solution_passes():
    with ThreadPoolExecutor(2) as pool: found = [o for file in pool.map(in_own_process, lessons) for o in file]
    assert not found, '\n'.join(found)

@pytest.mark.parametrize('nb', lessons, ids=lambda o: o.stem)
def test_a_lesson_has_two_exercises_each_with_its_check(nb):
    own = cells(nb)
    where = [i for i,c in enumerate(own) if is_solution(c)]
    assert len(where) >= 2
    assert '**Exercise 1.**' in (text := ''.join(source(c) for c in own if c['cell_type'] == 'markdown')) and '**Exercise 2.**' in text
    for i in where: assert own[i-1]['cell_type'] == 'markdown' and '\ncheck(' in '\n' + source(own[i+1]) and own[i]['metadata'] == dict(jupyter=dict(source_hidden=True)), source(own[i])

@pytest.mark.parametrize('nb', lessons, ids=lambda o: o.stem)
def test_the_students_edition_holds_no_answer(nb):
    before = cells(nb)
    after = student_edition(dict(cells=before))['cells']
    first = next(i for i,c in enumerate(before) if is_solution(c))
    assert [a for a,b in zip(after, before) if source(a) != source(b)] == [a for a,b in zip(after, before) if is_solution(b)]
    assert not any(c.get('outputs') for c in after[first:]) and after[:first] == before[:first]

def test_files_of_the_students_edition(tmp_path):
    files = write_exercises(book, tmp_path/'student')
    assert {o.name for o in files} >= {o.name for o in lessons} and all('..."' in o.read_text(encoding='utf-8') for o in files)
    links = {(o, k) for o in files for k in re.findall(r'\]\(([\w./]*\.ipynb)', o.read_text(encoding='utf-8'))}
    assert links and not [(o.name, k) for o,k in links if not (o.parent/k).exists()]

def test_answers_are_never_written_over(tmp_path):
    to,said = tmp_path/'student',[]
    file = write_exercises(book, to)[0]
    file.write_text(text := file.read_text(encoding='utf-8').replace('= ...', '= 42', 1), encoding='utf-8')
    assert len(write_exercises(book, to, said.append)) == len(lessons) - 1 and file.read_text(encoding='utf-8') == text
    assert len(said) == 1 and file.name in said[0]

def test_blanks_are_told_from_answers():
    def late(x): return x[..., 0]
    assert is_blank(...) and not any(map(is_blank, (late, 0, None, [], len, '')))
    assert check(late, lambda f: True, '') == 'Right.'
    with pytest.raises(NotYet, match='still blank'): check(..., ..., '')

def test_a_check_ends_in_one_line():
    with pytest.raises(NotYet) as e: check(1, 2, 'Look again.')
    assert e.value._render_traceback_() == ['Not yet. Look again. (Your answer: 1)']

def test_a_question_without_one_answer_is_a_wrong_answer():
    with pytest.raises(NotYet, match='Look again. .*ValueError'): check(np.ones(3), lambda o: o == 1, 'Look again.')

def test_equal_within_a_tenth_of_a_percent():
    assert same(1.0005, 1.) and not same(1.002, 1.) and not same(2, 3) and same([1, 2.], (1, 2.)) and not same([1], [[1]]) and not same('1', 1)

if __name__ == '__main__': print(json.dumps(try_both(Path(sys.argv[1]))))
