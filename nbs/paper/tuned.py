"""What resists, with constants chosen on a seed that no table reports

`python tuned.py OUT [JOBS]` trains in OUT, and goes on where it was stopped. The networks, the squares on all images and the
number of epochs are those of `paper resist --preset cpu`.

Rules, fixed before the first run. Each method with a constant has three tries of it on seed 10, among them the value of its
paper. Chosen is, of the tries that read at least 90% of the squares, the one that keeps most clean accuracy; if none does, the
one that reads most squares. Plain finetuning, replay and the chosen ones are trained with the seeds 0, 1 and 2. Added when EWC's
largest had diverged: a try that does is not chosen. Added later: the last layer alone, which has no constant.

Of averaged weights, the shares .25, .5 and .75 were fixed before the first run; eleven were measured, and .6 was found among
them. Fixed before the runs with new seeds, 3 to 6: .6 is confirmed if in each of the four it saves at least half of what plain
finetuning forgets and reads at least 90% of the squares.

Fixed before the first run of learning again: the chosen ones, plain finetuning, replay and averages with a share of .6 see the
clean images once more, for as many epochs as they saw the squares, with seeds 0 to 2. A network relearns faster than a new one
learns, or more slowly, if the area between their curves says so in each seed. The control saw clean images in place of squares.

Fixed before the first run of it: with squares on nine images in ten, plain finetuning, replay and the chosen ones, whose
constants stay, are trained with the seeds 0 to 2. Added before it was measured: averaged weights, whose share of .6 stays too.

Constants were chosen by accuracies on 500 test images. Fixed before it was measured: methods with the chosen constants are
compared on all 10,000 (columns `_all`), by the rule of `paper resist`.

It writes OUT/plain.csv, tries.csv, tuned.csv and nine.csv. Of plain finetuning it also writes averages.csv and, with the new
seeds, confirmed.csv, weights between those before and after; ensemble.csv; and others.csv, what new layers find with few images
that the network was trained on, and with others. again.csv has what each network learns again."""
import sys
from dataclasses import asdict, replace
from feature_erosion.all import *
from feature_erosion.batches import fixed_random
from feature_erosion.plots import percent
from feature_erosion.loaders import *
from feature_erosion.mitigations import *
from feature_erosion.paper.nets import *
from feature_erosion.paper.recipes import Result, recipes
from feature_erosion.paper.questions import finetune_with, resisting, train_resisting

def mitigation(make):
    "From old data and a constant"
    return lambda value: lambda learn, old, phases: ([make(old, value)], phases)

def head_first(share):
    "Half of the epochs, or another share, for the last layer alone"
    def change(learn, old, phases):
        p, = phases
        n = round(share*p.epochs)
        return [Only('classifier', ['probe'])],[Phase('probe', n, p.dls), Phase('erode', p.epochs-n, p.dls)]
    return change

def at_rate(lr): return lambda learn, old, phases: ([], [Phase('erode', p.epochs, p.dls, lr=lr) for p in phases])

methods = {   # by name: what is tried, its values, and a function of a value
    'DER++': ('α, and β=5α', (.01,.1,1), mitigation(lambda old, v: DERpp(old, 200, v, 5*v))),
    'EWC': ('λ', (10,100,1000), mitigation(EWC)),
    'LwF': ('α', (.3,3,30), mitigation(lambda old, v: LwF(v))),
    'L2-SP': ('α', (.001,.01,.1), mitigation(lambda old, v: L2SP(v))),
    'SAM': ('ρ', (.01,.05,.2), mitigation(lambda old, v: SAM(v))),
    'ASAM': ('ρ', (.5,2,8), mitigation(lambda old, v: SAM(v, adaptive=True))),
    'spectral decoupling': ('λ', (.01,.1,1), mitigation(lambda old, v: SpectralDecoupling(v))),
    'adversarial training': ('ε·255', (2,8,32), mitigation(lambda old, v: Adversarial(v/255))),
    'shrink and perturb': ('a', (.2,.4,.8), mitigation(lambda old, v: ShrinkPerturb(v))),
    'ReDo': ('τ', (.01,.025,.1), mitigation(lambda old, v: ReDo(v))),
    'continual backprop': ('rate', (1e-5,1e-4,1e-3), mitigation(lambda old, v: ContinualBackprop(v))),
    'last layer first (LP-FT)': ('share of the epochs', (.25,.5,.75), head_first),
    'a lower learning rate': ('learning rate', (.003,.01,.03), at_rate)}

def tried(run, net, seed, what):
    "A recipe: finetune with `what`, a method and a value of its constant"
    method,value = what
    return finetune_with(methods[method][2](value), run, Net(**net), seed)[2]

def measured(fn, store, net, seeds, jobs=2, may_diverge=False, **grid):
    "A row for each point; each is trained once"
    d = sweep(fn, dict(net=[asdict(net)], **grid), seeds, store, jobs, threads=1, files=net_files(net), progress=False)
    bad = d[d.status!='finished']
    if may_diverge and len(bad): bad = bad[~bad.error.astype(str).str.contains('loss is (?:nan|inf)|not finite')]
    if len(bad): raise RuntimeError(f'{len(bad)} of {len(d)} points failed: {bad.error.iloc[0]}')
    return d

def named(d):
    "Columns for the method and its constant, and means of what was measured"
    d = d.assign(method=[o[0] for o in d['what']], value=[o[1] for o in d['what']])
    d = d.assign(constant=d.method.map({k:v[0] for k,v in methods.items()}))
    return d[[*columns, *d.filter(like='_all')]].round(dict.fromkeys(d.filter(regex='before|clean|pattern'), 4))

columns = 'method constant value seed before clean pattern'.split()

def choose(tries):
    "The row of each method's chosen try"
    def best(d):
        able = d[d.pattern>=.9]
        return able.clean.idxmax() if len(able) else d.pattern.idxmax()
    return tries.loc[[best(d) for _,d in tries.groupby('method', sort=False)]]

def leaderboard(folder):
    "Accuracies on all test images with the chosen constants and of averaged weights, as the table of `paper resist` has them"
    tuned,plain,w = (pd.read_csv(folder/f'{k}.csv') for k in ('tuned','plain','averages'))
    w = w[w.share.isin((.5,.6))].assign(method=lambda d: d.share.map('averaged weights, {:.1f}'.format))
    d = pd.concat([plain, tuned, w]).query('seed<10')['seed method before_all clean_all pattern_all'.split()]
    return _board(d, 1.)

def nine_in_ten(folder):
    "The same with squares on nine images in ten"
    return _board(pd.read_csv(folder/'nine.csv')['seed method before_all clean_all pattern_all'.split()], .9)

def _board(d, ratio):
    d = d.rename(columns=lambda k: k.removesuffix('_all')).assign(net='VGG-19', ratio=ratio, chance=.1)
    return Result(recipes['resist'], dict(resist=d))

def _axes(ends, ylim=(0,.8)):
    "Axes of clean accuracy against that with squares, with what the rule of `paper resist` asks for"
    fig,ax = plt.subplots(figsize=(7.5,4.8), layout='constrained')
    ax.fill_between([.9,1.01], (ends.before+ends.clean)/2, ylim[1], color='C2', alpha=.12, lw=0, label='saves half, reads 90%')
    ax.axhline(ends.before, color='C0', lw=1, ls='--', label='clean, before')
    percent(ax, 'clean accuracy')
    ax.xaxis.set_major_formatter('{x:.0%}')
    ax.set(xlim=(.7,1.01), ylim=ylim, xlabel='accuracy with squares')
    return ax

def _name(ax, points):
    "Names on the right, with lines to the points"
    y,high = ax.get_ylim()
    apart = .045*(high-y)
    for o in points.sort_values('clean').itertuples():
        y = max(y+apart, o.clean)
        ax.annotate(o.Index, (o.pattern,o.clean), (1.03,y), va='center', fontsize=8, annotation_clip=False,
                    arrowprops=dict(arrowstyle='-', lw=.4, color='C7'))
    ax.legend(loc='lower left', fontsize=8)

def plot_board(t, ylim=(0,.8)):
    "Clean accuracy against that with squares: means by method, and a dot for each seed"
    means = t.groupby('method')[['before','clean','pattern']].mean()
    plain = means.loc['plain finetuning']
    ax = _axes(plain, ylim)
    ax.plot(t.pattern, t.clean, 'o', color='C7', ms=3, alpha=.6, label='each network')
    ax.plot(means.pattern, means.clean, 'o', color='C3', ms=6, label='mean')
    ax.plot(plain.pattern, plain.clean, 'X', color='C4', ms=8, label='plain finetuning')
    _name(ax, means)

def plot_tries(tries, averages, plain):
    "Clean accuracy against that with squares, of each try on one seed, of averaged weights, and of plain finetuning (a row)"
    ax = _axes(plain)
    for _,d in tries.groupby('method'): ax.plot(d.pattern, d.clean, 'o-', color='C7', ms=3, lw=.7, alpha=.6)
    best = choose(tries)
    ax.plot(best.pattern, best.clean, 'o', color='C3', ms=6, label='chosen')
    ax.plot(averages.pattern, averages.clean, 's:', color='C1', ms=4, lw=1, label='averaged weights')
    ax.plot(plain.pattern, plain.clean, 'X', color='C4', ms=8, label='plain finetuning')
    _name(ax, best.set_index(best.method+best.value.map(' ({:g})'.format)))

def at_squares(store, runs, net):
    "For each run of plain finetuning its seed, Learner and painted data"
    for r in runs.itertuples(): yield r.seed,*finetune_with(resisting['plain finetuning'], store[r.run], net, r.seed)[:2]

def accuracies(model, easy): return {k:evaluate(model, dl)['accuracy'] for k,dl in pattern_sets(easy).items() if k!='conflict'}

def on_all(store, runs, net):
    "Adds accuracies on all test images: clean before squares, and after them clean and with squares"
    every = net_dls(replace(net, n_valid=None)).inject(net_pattern(net))
    model = net_learner(net, every).model
    def found(run, phase):
        model.load_state_dict(run.weights(phase))
        return accuracies(model, every)
    before = {s:found(store[r], 'start')['clean'] for s,r in runs.groupby('seed').run.first().items()}
    rows = [dict(before=before[s], **found(store[r], 'erode')) for s,r in zip(runs.seed, runs.run)]
    return runs.join(pd.DataFrame(rows, runs.index).add_suffix('_all').round(4))

def averages(store, runs, net, shares=np.arange(11)/10):
    "Weights between those before and after plain finetuning, with statistics of batch norms of their own"
    def row(a, learn, easy): return dict(share=a, **accuracies(wise_ft(learn, 'start', 'erode', a, dl=easy.train), easy))
    d = pd.DataFrame([dict(ratio=net.ratio, seed=s, **row(a, *o)) for s,*o in at_squares(store, runs, net) for a in shares])
    ends = runs[['seed','before','clean']].rename(columns=dict(clean='plain'))
    return ends.merge(d)['ratio seed share before plain clean pattern'.split()].round(4)

def averages_on_all(store, runs, net, shares=(.5,.6)):
    "Accuracies of averaged weights on all test images, as by `on_all`"
    every,rows = net_dls(replace(net, n_valid=None)).inject(net_pattern(net)),[]
    for s,learn,easy in at_squares(store, runs, net):
        before,plain = (accuracies(m, every)['clean'] for m in learn.models_at('start','erode').values())
        for a in shares:
            found = accuracies(wise_ft(learn, 'start', 'erode', a, dl=easy.train), every)
            rows.append(dict(seed=s, share=a, before_all=before, plain_all=plain, **{f'{k}_all':v for k,v in found.items()}))
    return pd.DataFrame(rows).round(4)

def confirmed(store, net, seeds, jobs=2, shares=(.5,.6)):
    "Averages from networks with seeds that no share was chosen on; also on all test images (`_all`)"
    measured(train_net, store, replace(net, lengths=(net.lengths[0],0,0)), seeds, jobs)
    runs = measured(train_resisting, store, net, seeds, jobs, method=['plain finetuning'])
    store = RunStore(store)
    return averages(store, runs, net, shares).merge(averages_on_all(store, runs, net, shares))

def together(store, runs, net):
    "Networks before and after plain finetuning, alone and as an ensemble, on all test images"
    nets = {s:learn.models_at('start','erode') for s,learn,_ in at_squares(store, runs, net)}
    easy = net_dls(replace(net, n_valid=None)).inject(net_pattern(net))
    def rows(k):
        ms = {str(s):m[k] for s,m in nets.items()}
        return [dict(when=k, network=n, **accuracies(m, easy)) for n,m in (ms | dict(ensemble=Ensemble([*ms.values()]))).items()]
    return pd.DataFrame([*rows('start'), *rows('erode')]).round(4)

def from_others(store, runs, net, few=(10,100), n_test=2000):
    "What a new layer finds with images that the network was trained on, and with others"
    parts = []
    for s,learn,_ in at_squares(store, runs, net):
        every = net_dls(replace(net, n_valid=None), s).valid
        test = subset_dl(every, n_test, s)
        others = sorted({*range(len(every.dataset))}-{*test.chosen.tolist()})
        pools = {'trained on':net_dls(net, s).train, 'others':same_dl(every, idxs=others)}
        for k,dl in pools.items():
            r = recover(learn.models_at('start','erode'), dl, test, few=few, n_test=None, progress=False)
            mean = pd.DataFrame(r).groupby(['model','features','few']).accuracy.mean().reset_index()
            parts.append(mean.assign(images=k, seed=s))
    return pd.concat(parts).round(4)

def relearner(store, net, seed, what):
    "A Learner with the weights after squares, of a method and its constant; after clean images instead; or without any training"
    method,value = what
    dls,point = net_dls(net, seed),dict(files=net_files(net), seed=seed)
    with fixed_random(seed): learn = net_learner(net, dls)
    if method=='a new network': return learn
    if method=='clean images': net,method = replace(net, ratio=0.),'plain finetuning'
    if method in methods: run = store.once(tried, what=what, net=asdict(net), **point)
    else:
        how = 'plain finetuning' if method=='averaged weights' else method
        run = store.once(train_resisting, method=how, net=asdict(net), **point)
    if method=='averaged weights':
        plain,easy,_ = finetune_with(resisting['plain finetuning'], run, net, seed)
        learn.model.load_state_dict(wise_ft(plain, 'start', 'erode', value, dl=easy.train).state_dict())
    else: learn.model.load_state_dict(run.weights('erode'))
    return learn

def again(run, net, seed, what):
    "A recipe: clean images after `what`, as in `relearner`"
    net = Net(**net)
    learn = relearner(run.store, net, seed, what)
    with fixed_random(seed), learn.no_bar(), learn.no_logging():
        phases = net_phases(replace(net, lengths=(0,0,net.lengths[1])), learn.dls, learn.dls)
        cbs = EvalSets(dict(clean=learn.dls.valid)),KeepRun(run, minutes=5, epochs=1000, wait=True)
        learn.fit_phases(phases, cbs=cbs)
    curve = learn.recorder.history.clean
    return dict(first=curve.iloc[0], last=curve.iloc[-1])

def learned_again(store, d):
    "A row for each network: clean accuracy after the first and last epoch, and the area by which it lags behind a new one"
    d = d.assign(method=[o[0] for o in d['what']], value=[o[1] for o in d['what']])
    new = {r.seed:store[r.run].history for r in d[d.method=='a new network'].itertuples()}
    gaps = [relearning_gap(new[r.seed], store[r.run].history, phases=('relearn','relearn')).gap for r in d.itertuples()]
    return d.assign(gap=gaps)['method value seed first last gap'.split()].round(dict(first=4, last=4, gap=4))

def with_nine(store, few, chosen, net):
    "Accuracies with squares on nine images in ten: of plain finetuning and replay, averaged weights, and the chosen ones"
    chosen,few = named(on_all(store, chosen, net)),on_all(store, few, net)
    averaged = averages_on_all(store, few[few.method=='plain finetuning'], net, (.6,)).rename(columns=dict(share='value'))
    d = pd.concat([few.round(4), averaged.assign(method='averaged weights, 0.6', constant='share'), chosen])
    return d[chosen.columns]

def main(out, jobs=2, net=recipes['resist'].scales['cpu'].nets[0], tuned_on=(10,), seeds=(0,1,2), new=(3,4,5,6)):
    store,every = RunStore(out/'runs'),[*tuned_on, *seeds]
    go = partial(measured, jobs=jobs)
    go(train_net, store.path, replace(net, lengths=(net.lengths[0],0,0)), every)
    plain = go(train_resisting, store.path, net, every, method=['plain finetuning'])
    more = go(train_resisting, store.path, net, seeds, method=['replay','last layer only'])
    both = on_all(store, pd.concat([plain, more], ignore_index=True), net)
    both.drop(columns=['net','status','run','step']).round(4).to_csv(out/'plain.csv', index=False)
    runs = plain[plain.method=='plain finetuning']
    three = runs[runs.seed.isin(seeds)]
    together(store, three, net).to_csv(out/'ensemble.csv', index=False)
    confirmed(store.path, net, new, jobs).to_csv(out/'confirmed.csv', index=False)
    from_others(store, three, net).to_csv(out/'others.csv', index=False)
    averages(store, runs, net).merge(averages_on_all(store, three, net), how='left').to_csv(out/'averages.csv', index=False)
    every_try = [[k,v] for k,(_,vs,_) in methods.items() for v in vs]
    tries = named(go(tried, store.path, net, tuned_on, may_diverge=True, what=every_try))
    tries.to_csv(out/'tries.csv', index=False)
    chosen = choose(tries)[['method','value']].values.tolist()
    named(on_all(store, go(tried, store.path, net, seeds, what=chosen), net)).to_csv(out/'tuned.csv', index=False)
    nine = replace(net, ratio=.9)
    few = go(train_resisting, store.path, nine, seeds, method=['plain finetuning','replay'])
    with_nine(store, few, go(tried, store.path, nine, seeds, what=chosen), nine).to_csv(out/'nine.csv', index=False)
    others = [[k,None] for k in ('a new network','clean images','plain finetuning','replay')]+[['averaged weights',.6]]
    relearned = go(again, store.path, net, seeds, what=[*others, *chosen])
    learned_again(store, relearned).to_csv(out/'again.csv', index=False)

if __name__=='__main__': main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
