"The open questions' recipes: all methods begin with the same network, nothing is trained twice, and what they return is what was measured."
from dataclasses import asdict, replace
import types
import numpy as np, pandas as pd, pytest
from fastai.vision.all import plt
from feature_erosion import cli
from feature_erosion.data import TensorImages, tensor_dls
from feature_erosion.evalsets import evaluate, pattern_sets
from feature_erosion.paper import questions, recipes as recipes_module
from feature_erosion.paper.nets import Net, load_net, net_dls, net_pattern, trained
from feature_erosion.paper.questions import resisting, train_resisting
from feature_erosion.paper.recipes import Scale, recipes, run_recipe, runs_to_train, with_control
from feature_erosion.runs.store import RunStore

tiny = Net('Perceptron', 'perceptron', 'digits', n=128, n_valid=60, lr=.05, lengths=(4,2,1))
some = 'plain finetuning','replay','shrink and perturb','last layer only','last layer first (LP-FT)'

@pytest.fixture
def few(monkeypatch): monkeypatch.setattr(questions, 'resisting', {k:resisting[k] for k in some})

def test_all_methods_begin_with_the_same_network(tmp_path, few):
    made = run_recipe(recipes['resist'], Scale((tiny,), seeds=1), tmp_path, n_jobs=1, progress=False)
    t = made.tables['resist'].set_index('method')
    assert list(t.index)==[*some,'WiSE-FT, half way']
    start = load_net(trained(RunStore(tmp_path), replace(tiny, lengths=(4,0,0)), 0)).model
    sets = pattern_sets(net_dls(tiny, 0), net_pattern(tiny), ('clean','pattern'))
    # also where a method changes weights at once
    assert t.before.tolist()==pytest.approx([evaluate(start, sets['clean'])['accuracy']]*6)
    assert t[['clean','pattern']].stack().between(0,1).all() and t.relearned.isna().tolist()==[False]*5+[True]
    assert t.step['plain finetuning']==1
    found = made.tables['recovered']
    # three draws
    assert found.groupby(['method','features'], sort=False).size().to_dict()=={(m,f):3 for m in ('before',*some) for f in ('last','all')}
    now = found.groupby('method').now.first()
    # each method's own network
    assert now['before']==t.before.iloc[0] and now[list(some)].tolist()==t.clean[list(some)].tolist()
    written = {f:f.stat().st_mtime_ns for f in tmp_path.glob('train_*/run.json')}
    again = run_recipe(recipes['resist'], Scale((tiny,), seeds=1), tmp_path, n_jobs=1, progress=False)
    assert again.tables['resist'].equals(made.tables['resist'])
    assert written=={f:f.stat().st_mtime_ns for f in tmp_path.glob('train_*/run.json')}
    plt.close(made.plot())

def test_the_estimate_has_what_measurements_train(tmp_path, few):
    "Of the two questions that train in them; when these are made nothing is left"
    one,parts = Scale((tiny,), seeds=1),lambda *names: [(recipes[k], Scale((tiny,), seeds=1)) for k in names]
    todo = runs_to_train(RunStore(tmp_path), parts('resist','unlearn'))
    lengths = [n for _,_,n in todo]
    # phases of 4, 2 and 1 epochs. Five methods of three epochs, whose steps take 1, 1.5, 1, .3 and 1 times as long as plain ones.
    # Twice: retraining, and 70 for all other methods
    assert lengths==[4,2,1,pytest.approx(3*4.8),2*(4+70)]
    run_recipe(recipes['resist'], one, tmp_path, n_jobs=1, progress=False)
    assert [n for _,_,n in runs_to_train(RunStore(tmp_path), parts('resist','unlearn'))]==[148]
    assert not runs_to_train(RunStore(tmp_path), parts('recover','resist'))

@pytest.mark.parametrize('method', ['last layer only','last layer first (LP-FT)'])
def test_what_is_trained(tmp_path, method):
    "The last layer alone leaves the first as it was; linear probing first does not, in the end"
    store,net = RunStore(tmp_path),replace(tiny, lengths=(2,2,0))
    run = store.once(train_resisting, seed=0, net=asdict(net), method=method)
    before,after = trained(store, replace(tiny, lengths=(2,0,0))).weights('pretrain'),run.weights('erode')
    assert before['1.weight'].equal(after['1.weight'])==(method=='last layer only')
    assert not before['3.weight'].equal(after['3.weight'])

def test_methods_that_need_images_without_squares(tmp_path, few, monkeypatch):
    "Where some images have none, there are two more; all methods take as many iterations"
    assert {*questions._methods(replace(tiny, ratio=.9))}-{*questions._methods(tiny)}=={'GroupDRO','JTT'}
    monkeypatch.setattr(questions, 'resisting', {'plain finetuning':resisting['plain finetuning']})
    net = replace(tiny, n=320, ratio=.5, lengths=(2,2,0))
    t = run_recipe(recipes['resist'], Scale((net,), seeds=1), tmp_path, n_jobs=1,
                   progress=False).tables['resist'].set_index('method')
    assert [*t.index]==['plain finetuning','GroupDRO','JTT','WiSE-FT, half way']
    assert t.needs['GroupDRO']=='which images have squares'
    runs = [o for o in RunStore(tmp_path) if 'method' in o.settings]
    assert {o.settings['method']:o.evals.iter.max() for o in runs}==dict.fromkeys(('plain finetuning','GroupDRO','JTT'), 10)
    ends = [o.weights('erode')['1.weight'] for o in runs]
    assert not any(a.equal(b) for i,a in enumerate(ends) for b in ends[:i])

def test_picture_of_two_ratios():
    "As the presets `cpu` and `paper` have them: two methods are only in the second panel; each row is its method's"
    def rows(ratio, **clean):
        return [dict(net='n', ratio=ratio, seed=0, method=m, before=.7, chance=.1, clean=c, pattern=.95) for m,c in clean.items()]
    t = questions.pd.DataFrame(rows(1., plain=.2, replay=.6)+rows(.9, plain=.65, replay=.5, GroupDRO=.3))
    one,two = questions.plot_resist(dict(resist=t)).axes
    names = [o.get_text() for o in one.get_yticklabels()]
    assert names==['plain','replay','GroupDRO']
    assert [o.get_title('left') for o in (one,two)]==[f'squares on {o} of the images' for o in ('100%','90%')]
    def shown(ax): return dict(zip(map(names.__getitem__, ax.lines[1].get_ydata()), ax.lines[1].get_xdata()))
    assert shown(one)==dict(plain=.2, replay=.6) and shown(two)==dict(plain=.65, replay=.5, GroupDRO=.3)

def test_half_of_one_epoch(tmp_path):
    "Linear probing first, in a phase of one epoch, takes half of its iterations"
    run = RunStore(tmp_path).once(train_resisting, seed=0, net=asdict(replace(tiny, lengths=(2,1,0))),
                                  method='last layer first (LP-FT)')
    ends = run.evals.groupby('phase', sort=False).iter.max()
    assert ends.to_dict()==dict(probe=1, erode=1)   # two iterations of 64 samples

def test_nothing_to_save_is_not_clear():
    def judged(clean, pattern):
        rows = [dict(net='n', ratio=1., seed=0, method=m, before=.5, chance=.1, clean=c, pattern=p)
                for m,c,p in (('plain finetuning',clean,pattern), ('a',.5,.95), ('b',.5,.5))]
        return [o['agrees'] for o in questions.resist_claims(dict(resist=questions.pd.DataFrame(rows)))]
    assert judged(.1, 1.)==['yes','yes','no'] and judged(.05, 1.)==['yes','yes','no']   # below chance: all is forgotten, not more
    assert judged(.6, 1.)==['no','not clear','not clear']
    claims = questions.resist_claims(dict(resist=questions.pd.DataFrame([dict(net='n', ratio=1., seed=0,
        method='plain finetuning', before=.5, chance=.1, clean=.05, pattern=1.)])))
    assert claims[0]['mean']==1
    claims = questions.resist_claims(dict(resist=questions.pd.DataFrame([dict(net='n', ratio=1., seed=0,
        method='plain finetuning', before=.1, chance=.1, clean=.05, pattern=1.)])))
    assert (claims[0]['ours'],claims[0]['agrees'])==('nothing was known','not clear')

def test_pictures_of_two_networks():
    "Each has panels of its own, with its numbers"
    t = questions.pd.DataFrame([dict(net=n, ratio=1., seed=0, method='plain finetuning', before=.7, chance=.1, clean=c, pattern=1.,
                                     what='a class', forget=c, test=.5, attack=.5, relearn=0.) for n,c in (('A',.2), ('B',.6))])
    for plot,k,line in ((questions.plot_resist, 'resist', lambda ax: ax.lines[1].get_xdata()),
                        (questions.plot_unlearn, 'unlearn', lambda ax: ax.collections[1].get_offsets()[:,0])):
        axs = plot({k:t}).axes
        assert [(ax.get_title('left')[:3],*line(ax)) for ax in axs]==[('A, ',.2),('B, ',.6)]
        plt.close('all')

def test_means_of_steps_are_told_as_they_are():
    "Half a step is not none, which would say that it was known all along; nor are one and a third `1 steps`"
    t = questions.pd.DataFrame([dict(net='n', ratio=1., seed=s, method=m, what='a class', forget=.5, test=.5, attack=.5, relearn=v)
                                for m,vs in dict(a=(0,1), b=(1,1), c=(1,1,2), d=(40,41), e=(0,0)).items() for s,v in enumerate(vs)])
    ax, = questions.plot_unlearn(dict(unlearn=t)).axes
    told = [o.get_text().removeprefix('attack 50% · ') for o in ax.texts]
    assert told==['back after 0.5 steps','back after 1 step','back after 1.3 steps','back after 40 steps','known']
    plt.close('all')

def test_what_is_recovered(tmp_path):
    made = run_recipe(recipes['recover'], Scale(with_control(replace(tiny, lengths=(4,2,0))), seeds=1), tmp_path, n_jobs=1,
                      progress=False)
    t = made.tables['recover']
    # three draws
    assert t.groupby(['ratio','seed','features','model']).size().eq(2*3).all() and set(t.model)=={'start','before','after'}
    assert set(t.few)=={1,10}
    before = t[t.model!='after'].drop(columns='ratio').groupby(t.ratio)
    # the same networks, measured twice
    assert before.get_group(0.).reset_index(drop=True).equals(before.get_group(1.).reset_index(drop=True))
    assert t.accuracy.between(0,1).all() and len(made.claims())==4
    plt.close(made.plot())

def test_only_when_named(tmp_path):
    assert set(cli.questions)<=set(recipes) and not set(cli.questions) & set(cli.figures)
    named = [r.name for r,_ in recipes_module._chosen('smoke', None, None)]
    assert [o for o in named if o in recipes_module.questions]==[] and set(cli.figures)<=set(named)

@pytest.mark.slow('three recipes')
def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(questions, 'resisting', {k:resisting[k] for k in some[:2]})
    monkeypatch.setattr(questions, 'unlearners', {k:questions.unlearners[k] for k in ('pattern','finetune')})
    def small(s): return replace(s, seeds=1, nets=tuple(replace(o, lengths=(2,1,min(1, o.lengths[2]))) for o in s.nets))
    for k in cli.questions: monkeypatch.setitem(recipes, k, replace(recipes[k], scales=dict(smoke=small(recipes[k].scales['smoke']))))
    assert cli.main(['paper','resist','recover','unlearn','--preset','smoke','--out',str(tmp_path/'o'),'--jobs','1'])==0
    said = capsys.readouterr().out
    assert 'WiSE-FT, half way' in said and 'new last layer brings back' in said and 'finetune, a class' in said
    for o in cli.questions: assert (tmp_path/'o'/o/'figures'/f'{o}.png').exists()

def test_what_is_forgotten_on_purpose_has_two_samples_on_both_sides(monkeypatch):
    "Of `a` there is no test image, of `b` one in training; a share of 2% of 30 samples would be one"
    def images(*counts): return TensorImages(np.zeros((sum(counts),8,8,3), dtype=np.uint8), np.repeat(range(4), counts), list('abcd'))
    learn = types.SimpleNamespace(dls=tensor_dls(images(9,1,8,12), images(0,2,2,2), bs=4))
    asked = []
    def compare(learn, forget, retain, *args, **kw):
        asked.append((forget, retain))
        return pd.DataFrame(dict(forget=[0.]), index=pd.Index(['retrained'], name='method'))
    monkeypatch.setattr(questions, 'compare_unlearning', compare)
    net = Net('N', 'perceptron', 'digits', lengths=(1,0,0))
    for seed,n in enumerate((8,12,8)):   # c, d, c
        t = questions.unlearn_tables(learn, net, seed, None)['unlearn']
        (one,_),(two,_) = asked[-2:]
        assert (one.train.n,two.train.n)==(n,2) and t.what.tolist()==['a class','two samples']
