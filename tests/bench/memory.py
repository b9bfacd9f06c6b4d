"""How the memory of a long run grows: one line of a CSV after each epoch, written as the run goes.

    make sure that the package is the one to measure, e.g. PYTHONPATH=$PWD, and then
    OMP_NUM_THREADS=1 python tests/bench/memory.py memory.csv --epochs 100
    python tests/bench/memory.py memory.csv --tell      # what the file says, also while the run goes on

The default is a quarter-width VGG-19 on 5,000 images of CIFAR-10, with a run and the three evaluation sets. Where a small tensor is
kept for each batch, glibc's heap grows by tens of megabytes an epoch there: the kept ones break up the room that large ones leave."""
import argparse, csv, ctypes, sys, tempfile, time
from pathlib import Path

def args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add('out', help='CSV file')
    add('--epochs', type=int, nargs='+', default=[100], metavar='N', help='of the first phases (default: 100)')
    add('--n', type=int, default=5000, help='training images (default: 5000)')
    add('--n-valid', type=int, default=1000, help='test images (default: 1000)')
    add('--data', default='cifar10', help='as in `Net` (default: cifar10)')
    add('--width', type=float, default=.25, help='of VGG-19 (default: .25)')
    add('--bs', type=int, default=64, help='batch size (default: 64)')
    add('--seed', type=int, default=0, help='of everything random (default: 0)')
    add('--no-run', action='store_true', help='keep no run')
    add('--tell', action='store_true', help='train nothing, read the file')
    return p.parse_args()

_fields = 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'   # of malloc.h's `struct mallinfo2`
class _Info(ctypes.Structure): _fields_ = [(k,ctypes.c_size_t) for k in _fields.split()]

def heap():
    "Megabytes of glibc's main heap, `used` and `free`, and of blocks `mapped` one by one; nothing where there is no `mallinfo2`"
    try: f = ctypes.CDLL(None).mallinfo2
    except (AttributeError,OSError,TypeError): return {}
    f.restype = _Info
    i = f()
    return {k:v/2**20 for k,v in dict(used=i.uordblks, free=i.fordblks, mapped=i.hblkhd).items()}

def status(key):
    "Megabytes of resident memory: 'VmRSS' now, 'VmHWM' at most so far; Linux only"
    return int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(key)).split()[1])/1024

def log(out):
    "A callback that writes a line after each epoch, when its checkpoint is written"
    from fastai.callback.core import Callback
    class MemoryLog(Callback):
        order,run_valid,passive = 2000,False,True
        def before_fit(self): self.file,self.table,self.start = open(out, 'w', buffering=1),None,time.perf_counter()
        def after_epoch(self):
            row = dict(seconds=time.perf_counter()-self.start, cpu=time.process_time())
            row.update(rss=status('VmRSS'), peak=status('VmHWM'), **heap())
            if not self.table:
                self.table = csv.DictWriter(self.file, ['epoch',*row])
                self.table.writeheader()
            self.table.writerow(dict(epoch=self.learn.epoch+1, **{k:f'{v:.3f}' for k,v in row.items()}))
        def after_fit(self): self.file.close()
    return MemoryLog()

def train(a):
    from feature_erosion import __file__ as package
    from feature_erosion.paper.nets import Net, fit_net
    from feature_erosion.runs.resume import KeepRun
    from feature_erosion.runs.store import RunStore
    print(package, flush=True)
    lengths = (*a.epochs,0,0)[:3]
    net = Net('VGG-19', 'vgg19', a.data, width=a.width, n=a.n, n_valid=a.n_valid, bs=a.bs, lr=.05, lengths=lengths)
    with tempfile.TemporaryDirectory() as d:
        fit_net(net, a.seed, cbs=[log(a.out), *([] if a.no_run else [KeepRun(RunStore(d).run('memory'))])])

def growth(f, after=10):
    "Megabytes after epoch `after` and at the end, and which epoch that is"
    rows = list(csv.DictReader(open(f)))
    if len(rows)<=after: sys.exit(f'{f}: {len(rows)} epochs; growth is told after epoch {after}')
    return float(rows[after-1]['rss']),float(rows[-1]['rss']),int(rows[-1]['epoch'])

if __name__=='__main__':
    a = args()
    if not a.tell: train(a)
    mb,end,n = growth(a.out)
    print(f'{a.out}: {mb:.0f} MB after epoch 10, {end:.0f} MB after epoch {n}: {end/mb-1:+.1%}, {(end-mb)/(n-10):+.2f} an epoch')
