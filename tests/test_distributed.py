"One run in two processes over gloo, and the same in one."
import json, os, socket, subprocess, sys
from pathlib import Path
import pytest
from conftest import root
from run_notebooks import forked
from feature_erosion.runs.store import RunStore, unpack

def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]

def launch(folder, bs):
    cmd = ['torch.distributed.run','--nproc_per_node',2,'--master_port',free_port(),root/'tests'/'two_processes.py',folder,bs]
    r = subprocess.run([sys.executable, '-m', *map(str, cmd)], capture_output=True, text=True, cwd=root)
    assert not r.returncode, r.stderr[-3000:]

def by_hand(folder, *args, n=2):
    "The same without torchrun, whose processes import everything; exit codes"
    from two_processes import main, one_of
    port,folder = free_port(),str(folder)
    ps = [forked(one_of, i, n, port, folder, *args) if n>1 else forked(main, folder, *args) for i in range(n)]
    for p in ps: p.start()
    for p in ps: p.join()
    return [p.exitcode for p in ps]

def results(folder, n): return [json.loads((folder/f'result{i}.json').read_text()) for i in range(n)]

@pytest.mark.slow('torchrun, with two processes that import everything')
def test_two_processes_are_as_good_as_one(tmp_path):
    pytest.importorskip('accelerate')
    for o in ('two','one','killed'): (tmp_path/o).mkdir()
    launch(tmp_path/'two', 32)
    assert by_hand(tmp_path/'one', 64, n=1)==[0]
    (a,b),(one,) = results(tmp_path/'two', 2),results(tmp_path/'one', 1)
    assert a['weights']==b['weights'] and a['history']['clean']==b['history']['clean']
    # 360 images, each counted once: by us, by fastai, by one process
    assert a['history']['clean'][-1]==pytest.approx(a['again'])
    assert a['history']['clean'][5]==pytest.approx(a['history']['accuracy'][5])
    for c in ('clean','pattern'):   # other batches: the shuffle is cut in halves
        for e in (5,13): assert a['history'][c][e]==pytest.approx(one['history'][c][e], abs=.12), (c,e)
    assert one['history']['clean'][5]-one['history']['clean'][13]>.2
    assert a['samples']==b['samples'] and abs(a['samples']+b['samples']-one['samples'])<=14*64
    assert by_hand(tmp_path/'killed', 32, 165)==[9,9]   # in the second epoch of erode
    assert by_hand(tmp_path/'killed', 32)==[0,0]
    two,killed = (unpack(RunStore(tmp_path/o)['digits'].path/'phases'/'erode')[0] for o in ('two','killed'))
    # gloo's would abort a process that ends
    assert [json.loads((tmp_path/'two'/f'threads{i}.json').read_text()) for i in (0,1)]==[[]]*2
    assert all((two[k]==killed[k]).all() for k in two)   # resumed, bit by bit
    assert RunStore(tmp_path/'killed')['digits'].history.equals(RunStore(tmp_path/'two')['digits'].history)

one_fails = """import sys, torch
from torch import distributed as dist
from feature_erosion.distributed import agree
dist.init_process_group('gloo')
agree(1)
if dist.get_rank(): sys.stdin.read()
else:
    work = dist.all_reduce(torch.ones(9), async_op=True)
    raise RuntimeError('one fails')"""

@pytest.mark.slow('two processes that import everything')
def test_one_that_fails_does_not_wait_for_the_others():
    env = dict(os.environ, WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(free_port()))
    bad,other = (subprocess.Popen([sys.executable, '-c', one_fails], env=dict(env, RANK=str(i)), cwd=root, stdin=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for i in (0,1))
    try: assert 'one fails' in bad.communicate(timeout=300)[1] and bad.returncode==1   # gloo's own patience is 30 minutes
    finally:
        for p in (bad,other): p.kill(); p.wait()
