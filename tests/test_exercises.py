"The student's edition: a blank fails with one friendly line, exactly where it is, and the solution passes."
import json, re, subprocess, sys
import numpy as np, pytest
from cwcl.check import NotYet, check, is_blank, is_solution, same, student_edition, write_exercises
from pages import cells, root, source

book = root/'nbs'
lessons = sorted(o for o in book.glob('[0-9]*.ipynb') if int(o.name[:2]) not in (56, 63))

def lesson(path, *code):
    "Write a notebook of these cells"
    fold = dict(jupyter=dict(source_hidden=True))
    empty = dict(cell_type='code', metadata=fold, execution_count=None, outputs=[])
    made = [dict(empty, id=f'c{i}', source=o) for i,o in enumerate(code)]
    path.write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')

def test_the_book_is_run_and_every_blank_is_tried(tmp_path):
    "What `make test` runs finds a fault in a cell, a blank that passes, and a solution that does not"
    head = 'from cwcl.check import check'
    solution = '#| code-fold: true\n#| code-summary: "Solution"\nx = 2'
    lesson(tmp_path/'a_good.ipynb', head, solution, "check(x, 2, 'One more than one.')")
    lesson(tmp_path/'b_wrong.ipynb', head, solution, "check(x, 3, 'One more than one.')")
    lesson(tmp_path/'c_lenient.ipynb', head, solution, 'x')
    lesson(tmp_path/'d_broken.ipynb', '1/0')
    p = subprocess.run([sys.executable, 'tools/book.py', '--book', tmp_path], cwd=root, capture_output=True, text=True)
    said = dict(o.split(': ', 1) for o in re.split(r'\n(?=\w+\.ipynb)', p.stdout.strip()))
    assert p.returncode == 1
    assert p.stdout.strip().endswith('4 lessons, 3 failed')
    assert 'FAILED' not in said['a_good.ipynb']
    assert 'One more than one' in said['b_wrong.ipynb'] and 'a blank gives None' in said['c_lenient.ipynb']
    assert 'ZeroDivisionError' in said['d_broken.ipynb']

@pytest.mark.parametrize('nb', lessons, ids=lambda o: o.stem)
def test_a_lesson_has_two_exercises_each_with_its_check(nb):
    own = cells(nb)
    where = [i for i,c in enumerate(own) if is_solution(c)]
    assert len(where) >= 2
    text = ''.join(source(c) for c in own if c['cell_type'] == 'markdown')
    assert '**Exercise 1.**' in text and '**Exercise 2.**' in text
    for i in where:
        assert own[i-1]['cell_type'] == 'markdown', source(own[i])
        assert own[i]['metadata'] == dict(jupyter=dict(source_hidden=True)), source(own[i])
        assert '\ncheck(' in '\n' + source(own[i+1]), source(own[i])

@pytest.mark.parametrize('nb', lessons, ids=lambda o: o.stem)
def test_the_students_edition_holds_no_answer(nb):
    before = cells(nb)
    after = student_edition(dict(cells=before))['cells']
    first = next(i for i,c in enumerate(before) if is_solution(c))
    blanks = [a for a,b in zip(after, before) if is_solution(b)]
    assert [a for a,b in zip(after, before) if source(a) != source(b)] == blanks
    assert not any(c.get('outputs') for c in after[first:]) and after[:first] == before[:first]

def test_files_of_the_students_edition(tmp_path):
    files = write_exercises(book, tmp_path/'student')
    assert {o.name for o in files} >= {o.name for o in lessons}
    assert all('..."' in o.read_text(encoding='utf-8') for o in files)
    links = {(o, k) for o in files for k in re.findall(r'\]\(([\w./]*\.ipynb)', o.read_text(encoding='utf-8'))}
    assert links and not [(o.name, k) for o,k in links if not (o.parent/k).exists()]

def test_answers_are_never_written_over(tmp_path):
    to = tmp_path/'student'
    said = []
    file = write_exercises(book, to)[0]
    text = file.read_text(encoding='utf-8').replace('= ...', '= 42', 1)
    file.write_text(text, encoding='utf-8')
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
    assert same(1.0005, 1.)
    assert not same(1.002, 1.)
    assert not same(2, 3)
    assert same([1, 2.], (1, 2.))
    assert not same([1], [[1]])
    assert not same('1', 1)
