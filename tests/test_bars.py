"Runs that are stopped and go on with progress bars, as they are by default: on a terminal, in a log file, in a notebook."
import os, pty, re, threading
import nbformat, pytest
from nbclient import NotebookClient
from bars import train_to
from conftest import root
from run_notebooks import forked

def process(out, *args):
    "Exit code"
    p = forked(train_to, str(out), *map(str, args[:1]), *args[1:])
    p.start(), p.join()
    return p.exitcode

def in_log(folder, *args):
    f = folder.with_suffix('.log')
    f.unlink(missing_ok=True)
    return process(f, folder, *args),f.read_text()

def on_terminal(*args):
    main,other = pty.openpty()
    said = []
    def listen():
        try:
            while b := os.read(main, 4096): said.append(b)
        except OSError: pass   # the other end is closed
    t = threading.Thread(target=listen)
    t.start()
    code = process(os.ttyname(other), *args)
    os.close(other)
    t.join()
    os.close(main)
    return code,b''.join(said).decode()

def total(said): return re.search(r'sum (\S+)', said)[1]
def last_line(said): return said.strip().splitlines()[-1]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "What a run says that nobody stopped"
    code,said = in_log(tmp_path_factory.mktemp('bars')/'whole')
    assert code==0, said
    return total(said)

@pytest.mark.parametrize('start,stop', [(on_terminal,3), (in_log,5), (in_log,8), (on_terminal,22)])
def test_ctrl_c_and_on(tmp_path, whole, start, stop):
    "At the second batch of an epoch, at its end, in the second epoch, and in the second phase"
    stopped,told = start(tmp_path/'cut', stop)
    assert stopped!=0 and re.search(rf"run 'a' stopped after {stop} iterations in phase '\w+'; start it again to go on from there$", last_line(told)), told
    again,more = start(tmp_path/'cut')
    assert again==0 and f"goes on after {stop} iterations" in more and total(more)==whole, more
    loaded,rest = start(tmp_path/'cut')
    assert loaded==0 and total(rest)==whole, rest

def said(o): return f'{o.ename}: {o.evalue}' if o.output_type=='error' else o.get('text', '')

@pytest.mark.slow('a Jupyter kernel that imports everything')
def test_in_a_notebook(tmp_path, whole):
    "One cell is stopped, the next goes on"
    paths = [str(root/'tests'), str(root)]
    cells = f'import sys; sys.path[:0] = {paths}; from bars import train; train({str(tmp_path)!r}, 8)',f'train({str(tmp_path)!r})'
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in cells])
    where = dict(metadata=dict(path=str(root)))
    NotebookClient(nb, timeout=300, kernel_name='python3', allow_errors=True, resources=where).execute()
    stopped,again = (''.join(map(said, o.outputs)) for o in nb.cells)
    assert "KeyboardInterrupt: run 'a' stopped after 8 iterations in phase 'pretrain'; start it again" in stopped
    assert 'goes on after 8 iterations' in again and total(again)==whole, again
