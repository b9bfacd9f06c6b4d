"""How much mini-batch CKA depends on the order in which test images are read

`python batches.py OUT` trains a VGG-19 of a quarter of its width (40 epochs on clean images, 20 with squares) in OUT, and writes
OUT/cka.csv: CKA of each layer with itself, before and after the squares. It takes about 20 minutes on one core."""
import sys
from pathlib import Path
from feature_erosion.all import *

def network(out):
    "A Learner before and after the squares, trained once"
    set_seed(0)
    dls = cifar10_dls(n=5000, n_valid=2000)
    easy = dls.inject(ColorSquare(4))
    learn = erosion_learner(dls, 'vgg19', width=.25)
    with learn.no_bar():
        learn.fit_phases([Phase('pretrain', 40, dls), Phase('erode', 20, easy)],
                         cbs=EvalSets(pattern_sets(easy), at=[], n=500), run=RunStore(out/'runs').run('vgg'))
    return learn

def diagonal(models, data, **kwargs):
    "CKA of each layer with itself"
    c = layer_cka(models, data, progress=False, **kwargs).between()
    return pd.Series(c.to_numpy().diagonal(), c.index.rename('layer'))

def main(out):
    learn = network(out)
    models = learn.models_at('pretrain', 'erode')
    x,y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in learn.dls.valid]) for i in (0,1))
    def batches(order, bs): return [(x[i],y[i]) for i in order.split(bs)]
    by_class,mixed = y.argsort(stable=True),torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    res = {'all at once': diagonal(models, batches(mixed, 500), estimator='full')}
    for bs in 1000,128:
        res |= {f'mixed, {bs}': diagonal(models, batches(mixed, bs)), f'by class, {bs}': diagonal(models, batches(by_class, bs))}
    pd.DataFrame(res).to_csv(out/'cka.csv')
    print(phase_table(learn).round(3))

if __name__=='__main__': main(Path(sys.argv[1]))
