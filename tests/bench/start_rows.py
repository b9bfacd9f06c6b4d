"Start-up: fresh Python processes."
import subprocess, sys
from pathlib import Path
from common import alternate

def run(*args): subprocess.run([sys.executable, '-W', 'ignore', *args], check=True, stdout=subprocess.DEVNULL)

def rows(repeats=3):
    cli = Path(sys.executable).with_name('feature_erosion')
    fs = {'ours': lambda: run('-c', 'import feature_erosion.all'), 'fastai': lambda: run('-c', 'import fastai.vision.all'), 'help': lambda: run(str(cli), '--help'), 'python': lambda: run('-c', 'pass')}
    for f in fs.values(): f()   # the disk's cache
    t = alternate(fs, repeats)
    yield dict(name='import feature_erosion.all', peer='import fastai.vision.all', ours_s=t['ours'], peer_s=t['fastai'], target=round(1/1.1, 2), check='at most 10% more')
    yield dict(name='feature_erosion --help', peer='import fastai.vision.all', ours_s=t['help'], peer_s=t['fastai'], target=None, check=f"{'under' if max(t['help'])<1 else 'NOT under'} a second each time; Python alone {min(t['python']):.2f} s")
