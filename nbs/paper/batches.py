"""How much depends on which images share a batch: mini-batch CKA, and the running statistics of batch norms

`python batches.py OUT` trains a VGG-19 of a quarter of its width (40 epochs on clean images, then 20 or 6 with squares) in OUT.
It writes OUT/cka.csv, CKA of each layer with itself before and after the squares, for test images in several orders;
and OUT/norms.csv, accuracies with statistics of other images. It takes about 25 minutes on one core."""
import sys
from pathlib import Path
from feature_erosion.all import *
from feature_erosion.mitigations import wise_ft

def network(store, name, epochs, weights=None):
    "A Learner before and after so many epochs of squares, trained once; from `weights` if they are given"
    set_seed(0)
    dls = cifar10_dls(n=5000, n_valid=2000)
    easy = dls.inject(ColorSquare(4))
    learn = erosion_learner(dls, 'vgg19', width=.25)
    phases = [Phase('pretrain', 40, dls), Phase('erode', epochs, easy)]
    if weights: learn.model.load_state_dict(weights)
    with learn.no_bar():
        learn.fit_phases(phases[1:] if weights else phases, cbs=EvalSets(pattern_sets(easy), at=[], n=500), run=store.run(name))
    return learn,dls,easy

def diagonal(models, data, **kwargs):
    "CKA of each layer with itself"
    c = layer_cka(models, data, progress=False, **kwargs).between()
    return pd.Series(c.to_numpy().diagonal(), c.index.rename('layer'))

def orders(learn):
    "CKA in batches of several sizes, of all classes or class by class"
    models = learn.models_at('pretrain', 'erode')
    x,y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in learn.dls.valid]) for i in (0,1))
    def batches(order, bs): return [(x[i],y[i]) for i in order.split(bs)]
    by_class,mixed = y.argsort(stable=True),torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    res = {'all at once': diagonal(models, batches(mixed, 500), estimator='full')}
    for bs in 1000,128:
        res |= {f'mixed, {bs}': diagonal(models, batches(mixed, bs)), f'by class, {bs}': diagonal(models, batches(by_class, bs))}
    return pd.DataFrame(res)

def statistics(learn, dls, easy, before='pretrain'):
    "Accuracies before the squares, after them, and half way, with statistics of several kinds"
    old,new = learn.models_at(before, 'erode').values()
    half = partial(wise_ft, learn, before)
    nets = {('before','own'):old, ('after','own'):new, ('after','clean images'):wise_ft(learn, before, alpha=1., dl=dls.train),
            ('half way','averaged'):half(), ('half way','clean images'):half(dl=dls.train),
            ('half way','with squares'):half(dl=easy.train)}
    sets = pattern_sets(easy)
    return pd.DataFrame([dict(zip(('weights','statistics'), k), **{o:evaluate(m, dl)['accuracy'] for o,dl in sets.items()})
                         for k,m in nets.items()])

def main(out):
    store = RunStore(out/'runs')
    long = network(store, 'vgg', 20)
    orders(long[0]).to_csv(out/'cka.csv')
    short = network(store, 'short', 6, store['vgg'].weights('pretrain'))
    tables = {6:statistics(*short, 'start'), 20:statistics(*long)}
    pd.concat(tables, names=['epochs']).droplevel(1).to_csv(out/'norms.csv')

if __name__=='__main__': main(Path(sys.argv[1]))
