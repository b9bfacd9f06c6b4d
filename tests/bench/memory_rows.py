"Memory and time of a run of 100 epochs: quarter-width VGG-19 on 500 images of CIFAR-10, each run a process of its own."
import os, subprocess, sys, tempfile
from pathlib import Path
from common import real
from memory import growth

def long_run(folder, *args):
    "Seconds, and megabytes after epoch 10 and at the end"
    out = Path(folder)/'memory.csv'
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    n = '500' if real else '256'
    subprocess.run([sys.executable, str(Path(__file__).with_name('memory.py')), str(out), '--n', n, '--n-valid', '100', '--data',
                    'cifar10' if real else 'digits', *args],
                   check=True, stdout=subprocess.DEVNULL, env=env)
    return float(out.read_text().splitlines()[-1].split(',')[1]),*growth(out)[:2]

def rows(repeats=3):
    with tempfile.TemporaryDirectory() as tmp: (s,early,end),(peer,*_) = long_run(tmp),long_run(tmp, '--no-run')
    yield dict(name='a run of 100 epochs of VGG-19, width 1/4, 500 images', peer='the same without keeping a run', ours_s=[s],
               peer_s=[peer], target=None,
               check=f'{early:.0f} MB after epoch 10, {end:.0f} MB after epoch 100: {end/early-1:+.1%}')
