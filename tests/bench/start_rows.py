"Start-up: fresh Python processes."
import subprocess, sys
from pathlib import Path
from common import alternate

def run(*args, code=0):
    done = subprocess.run([sys.executable, '-W', 'ignore', *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if done.returncode!=code: raise RuntimeError(f'{args}: ended with {done.returncode}')

def rows(repeats=3):
    cli = Path(sys.executable).with_name('feature_erosion')
    fs = {'ours': lambda: run('-c', 'import feature_erosion.all'), 'fastai': lambda: run('-c', 'import fastai.vision.all'), 
          'help': lambda: run(str(cli), '--help'), 'wrong': lambda: run(str(cli), 'run', 'fig1', '--lr', 'high', code=2),
          'python': lambda: run('-c', 'pass')}
    for f in fs.values(): f()   # the disk's cache
    t = alternate(fs, repeats)
    yield dict(name='import feature_erosion.all', peer='import fastai.vision.all', ours_s=t['ours'], peer_s=t['fastai'],
               target=round(1/1.1, 2), check='at most 10% more')
    for what,k in ('feature_erosion --help','help'),('feature_erosion run fig1 --lr high, which is refused','wrong'):
        yield dict(name=what, peer='import fastai.vision.all', ours_s=t[k], peer_s=t['fastai'], target=None,
                   check=f"{'under' if max(t[k])<1 else 'NOT under'} a second each time; Python alone {min(t['python']):.2f} s")
