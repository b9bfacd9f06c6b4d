"The command line, as a user types it: results, and one line with exit code 2 for what a user can mend."
import json, os, signal, subprocess, sys, time
from configparser import ConfigParser
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
import numpy as np, psutil, pytest, torch
from PIL import Image
from conftest import root
from feature_erosion import cli
from feature_erosion.cli import main
from feature_erosion.runs.store import Run

quick = ['--data','digits','--arch','resnet20','--width','.25','--n','128','--n-valid','40']

@pytest.fixture
def folder(tmp_path):
    "Three classes of 12×12 images"
    for split,n in ('train',20),('val',4):
        for c in range(3):
            (d := tmp_path/'images'/split/f'c{c}').mkdir(parents=True)
            for i in range(n):
                Image.fromarray(np.random.RandomState(c*100+i).randint(256, size=(12,12,3), dtype=np.uint8)).save(d/f'{i}.png')
    return tmp_path/'images'

def weights(path, **kw):
    from feature_erosion.models import create_model
    torch.save(create_model('resnet20', **{'n_out':10, 'width':.25, **kw}).state_dict(), path)
    return path

def fails(capsys, *args):
    "Exit code 2, and one line on stderr: which"
    try: code = main(list(map(str, args)))
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err
    lines = [o for o in err.splitlines() if o.strip()]
    assert code==2 and len(lines)==1 and 'Traceback' not in err and lines[0].startswith('feature_erosion'), err
    return lines[0]

def test_fig1(tmp_path, capsys):
    assert main(['run','fig1',*quick,'--out',str(tmp_path/'o'),'--epochs','2','1','1','--ratio','.5'])==0
    run = Run(tmp_path/'o')
    acc = run.table('accuracy').set_index('phase')
    assert list(acc.index)==['start','pretrain','erode','relearn'] and {'clean','pattern','conflict','conflict_picture'}<={*acc}
    assert run.status=='finished' and run.settings['net']['ratio']==.5 and run.settings['net']['lengths']==[2,1,1]
    assert run.info['sessions'][0]['torch']==torch.__version__
    h = run.table('history')
    assert h.phase.tolist()==['pretrain','pretrain','erode','relearn']
    assert h.clean.iloc[-1]==pytest.approx(acc.clean.relearn, rel=1e-5)
    assert Image.open(run.path/'figures'/'phases.png').width>800 and '</svg>' in (run.path/'figures'/'phases.svg').read_text()
    out = capsys.readouterr().out
    assert 'conflict_picture' in out and '40 test images, chance 10%' in out

def test_weights_skip_pretraining(tmp_path):
    main(['run','fig1',*quick,'--out',str(tmp_path/'o'),'--weights',str(weights(tmp_path/'w.pth')),'--iters','3','2'])
    assert Run(tmp_path/'o').table('accuracy').phase.tolist()==['start','erode','relearn']

def test_folder(folder, tmp_path, capsys):
    main(['run','fig1','--data',str(folder),'--image-size','16','--arch','resnet20','--width','.25','--bs','16','--out',
          str(tmp_path/'o'),'--epochs','1','--size','.25','--pattern','stripes'])
    run = Run(tmp_path/'o')
    assert 'chance 33%' in capsys.readouterr().out and run.settings['net']['size']==16
    assert run.settings['net']['pattern']=='stripes'

@pytest.mark.parametrize('args,words', [
    (['--arch','resnet21'], "arch='resnet21'"), (['--data','nowhere'], "data='nowhere'"),
    (['--size','17'], 'the image is 16×16; choose a smaller size'),
    (['--size','0'], 'size=0'), (['--ratio','1.5'], 'ratio=1.5'), (['--ratio','-1'], 'ratio=-1.0'),
    (['--strength','2'], 'strength=2.0'), (['--n','5000'], 'n=5000'), (['--bs','0'], 'bs=0'),
    (['--weights','none.pth'], "weights='none.pth': there is no such file"),
    (['--epochs','0'], 'at least 1'), (['--epochs','1','2'], 'want 3 lengths'),
    (['--epochs','1','--iters','1'], 'give one of the two'),
    (['--width','-1'], 'width=-1.0'), (['--pattern','dots'], 'dots'), (['--epochs','x'], "'x'"),
    (['--lr','1e30'], 'try a lower learning rate')])
def test_bad_arguments(args, words, tmp_path, capsys):
    assert words in fails(capsys, 'run', 'fig1', *quick, '--out', tmp_path/'o', *args)

@pytest.mark.parametrize('args,words', [
    (['--lr','-1'], 'lr=-1.0'), (['--lr','nan'], 'lr=nan'), (['--n','0'], 'n=0'), (['--n-valid','0'], 'n_valid=0'),
    (['--bs','0'], 'bs=0'), (['--ratio','2'], 'ratio=2.0'), (['--strength','-1'], 'strength=-1.0'),
    (['--size','0'], 'size=0'), (['--width','0'], 'width=0.0'), (['--seed','-1'], 'seed=-1'),
    (['--data','digits','--n-classes','3'], 'n_classes=3: only for a folder'),
    (['--data','digits','--image-size','32'], 'image_size=32: only for a folder of images; those of digits are 16×16'),
    (['--arch','timm/resnet18','--width','.5'], 'width=0.5: timm/resnet18 cannot be scaled'),
    (['--size','33'], 'the image is 32×32'), (['--size','1.5'], 'size=1.5: must be whole pixels (4), or a fraction'),
    (['--data','digits','--size','17'], 'the image is 16×16')])
def test_numbers_are_checked_before_anything_is_imported(args, words, tmp_path):
    code = "import sys; from feature_erosion.cli import main; code = main(sys.argv[1:]); assert code==2 and 'torch' not in sys.modules, sorted(sys.modules)"
    p = subprocess.run([sys.executable,'-c',code,'run','fig1','--out',str(tmp_path/'o'),*args], capture_output=True, text=True)
    assert p.returncode==0 and words in p.stderr and len(p.stderr.splitlines())==1, p.stderr

@pytest.mark.parametrize('given,want', [(None,'passive'),('active','active')])
def test_threads_wait_without_spinning(given, want):
    "Unless the user has chosen"
    env = {k:v for k,v in os.environ.items() if k!='OMP_WAIT_POLICY'} | ({'OMP_WAIT_POLICY':given} if given else {})
    code = "import os; from feature_erosion.cli import main; main(['run','fig1','--lr','-1']); print(os.environ['OMP_WAIT_POLICY'])"
    assert subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, env=env).stdout.strip()==want

def test_images_are_for_networks_trained_on_imagenet(tmp_path, capsys):
    assert "images='nowhere': none of fig1" in fails(capsys, 'paper', 'fig1', '--preset', 'smoke', '--images', 'nowhere', '--out',
                                                     tmp_path/'o')
    line = fails(capsys, 'run', 'fig1', '--data', 'nowhere', '--out', tmp_path/'o')
    assert '--images' not in line and 'the path of yours' in line

@pytest.mark.parametrize('error,words',
                         [(KeyboardInterrupt(), 'stopped; run the same command again'),
                          (KeyboardInterrupt("run 'a' stopped"), "run 'a' stopped")])
def test_ctrl_c(monkeypatch, capsys, error, words):
    def stop(a): raise error
    monkeypatch.setattr(cli, 'run_demo', stop)
    assert main(['demo'])==130 and words in capsys.readouterr().err

@pytest.mark.slow('workers that import everything')
def test_ctrl_c_stops_the_workers(tmp_path):
    "As a terminal sends it, to all processes at once: joblib needs psutil to end its own, or they would train on for hours"
    settings = ConfigParser()
    settings.read(root/'settings.ini', encoding='utf-8')
    assert 'psutil' in settings['DEFAULT']['requirements']
    args = ['paper','fig1','fig6','--preset','smoke','--out',str(tmp_path)]
    code = f"{obeys}; from feature_erosion.cli import main; raise SystemExit(main({args}))"
    p = subprocess.Popen([sys.executable,'-c',code], cwd=root, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.rglob('history.jsonl')) and p.poll() is None: time.sleep(.1)   # until a worker trains
    os.killpg(p.pid, signal.SIGINT)
    assert ' stopped' in p.communicate(timeout=60)[1] and p.returncode==130   # in a worker, or while waiting for it
    for _ in range(100):
        if not workers(p.pid): break
        time.sleep(.1)
    assert not workers(p.pid)

@pytest.mark.parametrize('preset', ['smoke','cpu'])
def test_smoke_says_what_its_verdicts_are_worth(preset, tmp_path, monkeypatch, capsys):
    from feature_erosion.paper import questions
    monkeypatch.setattr(questions, 'paper', lambda *args: {})
    assert main(['paper','fig1','--preset',preset,'--out',str(tmp_path/'o')])==0
    assert ('say nothing about the paper' in capsys.readouterr().out)==(preset=='smoke')

obeys = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)'   # a shell's background job ignores it

def workers(group):
    def of(o):
        with suppress(ProcessLookupError, psutil.Error): return os.getpgid(o.pid)==group and o.status()!='zombie'
    return [o.cmdline() for o in psutil.process_iter() if of(o)]

def test_bad_folders(folder, tmp_path, capsys):
    run = ['run','fig1','--arch','resnet20','--width','.25','--out',tmp_path/'o','--bs','16','--epochs','1','--data']
    (tmp_path/'empty').mkdir()
    assert 'no images' in fails(capsys, *run, tmp_path/'empty')
    assert 'no images in folders of classes' in fails(capsys, *run, folder/'train'/'c1')
    assert 'n_classes=9' in fails(capsys, *run, folder, '--n-classes', 9)
    (folder/'train'/'c2'/'3.png').write_bytes(b'\x89PNG no more')
    line = fails(capsys, *run, folder)
    assert '3.png: not a readable image' in line

def test_wrong_channels_and_classes(tmp_path, capsys):
    run = ['run','fig1',*quick,'--out',tmp_path/'o','--epochs','1','--weights']
    assert 'conv1.weight: 4×1×3×3 in the file, 4×3×3×3 in the model' in fails(capsys, *run, weights(tmp_path/'grey.pth', c_in=1))
    (tmp_path/'bad.pth').write_bytes(b'junk')
    assert 'is not a weights file' in fails(capsys, *run, tmp_path/'bad.pth')

def test_out_is_checked_first(tmp_path, capsys):
    (tmp_path/'file').write_text('')
    for command,out in ((['run','fig1',*quick], tmp_path/'file'), (['demo'], tmp_path/'file'/'sub')):
        assert f"{tmp_path/'file'} is a file; give a folder" in fails(capsys, *command, '--out', out)

@pytest.mark.parametrize('figure', ['fig1','fig2'])
def test_runs_do_not_lie_among_the_images(folder, capsys, monkeypatch, figure):
    "Where they would be a class; as by default, in the folder itself"
    monkeypatch.chdir(folder/'train')
    args = ['run',figure,'--data','.','--image-size','16','--arch','resnet20','--width','.25','--epochs','1']
    assert f"out='runs/{figure}': lies in the folder of the images, {folder/'train'}, and would change it" in fails(capsys, *args)
    assert sorted(o.name for o in Path().iterdir())==['c0','c1','c2']

def test_a_folder_of_somebody_else_is_refused(tmp_path, capsys):
    (tmp_path/'.git').mkdir()
    line = fails(capsys, 'demo', '--out', tmp_path)
    assert f"out='{tmp_path}'" in line and str(tmp_path/'run1') in line and [o.name for o in tmp_path.iterdir()]==['.git']

def test_stopped_goes_on_finished_is_shown_changed_is_refused(tmp_path, capsys):
    run = ['run','fig1',*quick,'--out',str(tmp_path/'o'),'--epochs','1']
    assert main(run)==0 and main(run)==0
    out = capsys.readouterr().out
    first,again = out.split('is finished and was loaded')
    table = lambda s: [o for o in s.splitlines() if o.startswith(('start','pretrain','erode','relearn'))]
    assert table(first)==table(again) and len(table(again))==4
    said = fails(capsys, *run, '--bs', '32')
    assert 'net.bs: was 64, is 32' in said
    for o in out,said: assert 'choose another `out`, or delete the old one' in o and 'RunStore' not in o   # in the words of `--out`

def test_a_finished_run_is_only_read(tmp_path):
    "So that it may be where nothing can be written; tables that were lost or changed come back"
    run,folder = ['run','fig1',*quick,'--out',str(tmp_path/'o'),'--iters','2'],tmp_path/'o'
    def files(): return {f:(f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob('*') if f.is_file() and f.name!='.lock'}
    assert main(run)==0
    was = files()
    assert main(run)==0 and files()==was
    (folder/'tables'/'evals.csv').unlink(), (folder/'tables'/'accuracy.csv').write_text('phase,clean\nerode,1\n')
    assert main(run)==0
    assert {f:o for f,(_,o) in files().items() if f.suffix=='.csv'}=={f:o for f,(_,o) in was.items() if f.suffix=='.csv'}

def test_same_words_in_python():
    from feature_erosion.all import ColorSquare, digits_dls, erosion_learner
    dls = digits_dls(n=64, n_valid=20)
    with pytest.raises(ValueError, match='the image is 16×16; choose a smaller size'): dls.inject(ColorSquare(17))
    with pytest.raises(ValueError, match='ratio=1.5'): dls.inject(ColorSquare(4), ratio=1.5)
    with pytest.raises(ValueError, match='palette has 2 colours for 10 classes'):
        dls.inject(ColorSquare(4, palette=['red','blue']))
    with pytest.raises(ValueError, match="arch='resnet21'"): erosion_learner(dls, 'resnet21')
    with pytest.raises(FileNotFoundError, match="no file 'none.pth'"): erosion_learner(dls, 'resnet20', weights='none.pth')

def test_help():
    r = subprocess.run([sys.executable, '-m', 'feature_erosion.cli', 'run', '--help'], capture_output=True, text=True)
    assert r.returncode==0 and '--weights FILE' in r.stdout and 'default: vgg19' in r.stdout
    assert subprocess.run([sys.executable, '-m', 'feature_erosion.cli'], capture_output=True, text=True).returncode==2

def test_completion_knows_what_the_library_has(monkeypatch):
    "Of arguments that take other values, too, such as folders and networks of other packages"
    seen = {}
    def autocomplete(p): seen.update({o.dest:o.completer(prefix='') for o in p._subparsers._group_actions[0].choices['run']._actions
                                      if hasattr(o, 'completer')})
    monkeypatch.setitem(sys.modules, 'argcomplete', SimpleNamespace(autocomplete=autocomplete))
    monkeypatch.setenv('_ARGCOMPLETE', '1')
    with pytest.raises(SystemExit): main([])
    assert {'resnet18','resnet20','vgg19','torchvision/','timm/'}<=set(seen['arch']) and {'digits','cifar10'}<=set(seen['data'])
    assert 'square' in seen['pattern'] and 'fig4' in seen['figure']

@pytest.mark.slow('CIFAR-10 on the command line; on digits it is tested above')
def test_main_job_on_cifar(tmp_path, cifar10, resnet20):
    "The public ResNet-20 forgets CIFAR-10 within sixty iterations"
    assert main(['run','fig1','--data','cifar10','--arch','resnet20','--weights',str(resnet20),'--stats','imagenet','--bs','128',
                 '--n-valid','500','--sched','constant',
                 '--iters','60','5','--out',str(tmp_path/'o')])==0
    acc = Run(tmp_path/'o').table('accuracy').set_index('phase')
    assert acc.clean.start>.75 and acc.clean.erode<.4 and acc.pattern.erode>.9 and acc.conflict_picture.erode>.4

tiny = ['--image-size','16','--arch','resnet20','--width','.25','--bs','30','--epochs','1','--lr','.05','--seeds','1','--jobs',
        '1','--n','30']

@pytest.mark.parametrize('figure,nets',
                         [pytest.param('fig3', 2, marks=pytest.mark.slow('two networks')),
                          pytest.param('fig6', 8, marks=pytest.mark.slow('eight networks')),
    pytest.param('gradcam', 2, marks=pytest.mark.slow('Grad-CAM of two networks'))])
def test_another_figure_on_a_folder(folder, tmp_path, capsys, figure, nets):
    "All that the figure compares, with the network and the data that were asked for"
    if figure=='gradcam': pytest.importorskip('captum')
    assert main(['run',figure,'--data',str(folder),*tiny,'--out',str(tmp_path/'o')])==0
    run = Run(tmp_path/'o'/figure)
    got = run.settings['nets']
    assert len(got)==nets and {o['data'] for o in got}=={str(folder)} and {o['arch'] for o in got}=={'resnet20'}
    assert {0.,1.}<={o['ratio'] for o in got} and all(o['lengths'][:2]==[1,1] for o in got)
    assert run.status=='finished' and (run.path/'figures'/f'{figure}.png').is_file()
    assert f'{figure} ' in capsys.readouterr().out

@pytest.mark.parametrize('args,words',
                         [(['fig3','--seed','2'], 'seed=2: fig3 has seeds 0, 1'),
                          (['fig1','--seeds','2'], 'seeds=2: fig1 trains one network'),
    (['fig3','--seeds','0'], 'seeds=0: must be at least 1'),
    (['fig5','--weights','w.pth'], 'fig5 compares with training from scratch'),
    (['fig3','--ratio','0'], 'ratio=0: that is the control'),
    (['fig6','--ratio','.5'], 'ratio=0.5: fig6 compares the ratios 0, 0.01'), (['fig9'], "invalid choice: 'fig9'")])
def test_other_figures_errors(tmp_path, capsys, args, words):
    assert words in fails(capsys, 'run', *args, *quick, '--out', tmp_path/'o')
    assert not (tmp_path/'o').exists()

@pytest.mark.parametrize('terminal', [False,True])
def test_bars_are_for_a_terminal(terminal, monkeypatch, capsys):
    from fastprogress import fastprogress
    monkeypatch.setattr(cli, '_parsed',
                        lambda args: SimpleNamespace(json=False, do=lambda a: list(fastprogress.progress_bar(range(3)))))
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal)
    assert main([])==0 and ('100.00%' in (out := capsys.readouterr().out))==terminal==bool(out) and fastprogress.NO_BAR is False

@pytest.mark.parametrize('args,words',
                         [(['run','fig1','--data','nowhere'], "data='nowhere'"),
                          (['run','fig1','--weights','none.pth'], "weights='none.pth'"),
                          (['report','nowhere'], "path='nowhere'"),
                          (['demo','--out','/dev/null/x'], "out='/dev/null/x': /dev/null is a file; give a folder"),
                          (['run','fig1','--data','digits','--out','/dev/null'], "out='/dev/null': /dev/null is a file"),
                          (['paper','fig1','--out','/dev/null/x/y'], "/dev/null is a file")])
def test_paths_are_checked_before_anything_is_imported(args, words, tmp_path):
    code = "import sys; from feature_erosion.cli import main; code = main(sys.argv[1:]); assert code==2 and 'torch' not in sys.modules, sorted(sys.modules)"
    p = subprocess.run([sys.executable,'-c',code,*args], capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode==0 and words in p.stderr and len(p.stderr.splitlines())==1 and not list(tmp_path.iterdir()), p.stderr

def test_where_data_and_weights_are_looked_for(monkeypatch, tmp_path):
    "As fastai and torch do"
    from fastai.data.external import fastai_path
    assert cli._data_home()==fastai_path('data') and cli._weights_home()==Path(torch.hub.get_dir())/'checkpoints'
    (tmp_path/'config.ini').write_text('[DEFAULT]\ndata = /elsewhere\n')
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path)); assert cli._data_home()==Path('/elsewhere')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert cli._weights_home()==tmp_path/'hub'/'checkpoints'==Path(torch.hub.get_dir())/'checkpoints'

def test_images_that_are_asked_for_must_be_there(tmp_path, capsys):
    "Not left out, with hours of the other figures before them"
    assert "data='nowhere'" in fails(capsys, 'paper', 'fig1', 'fig2', '--images', 'nowhere', '--out', tmp_path/'o')
    assert not (tmp_path/'o').exists()

def test_json_is_alone_on_stdout(tmp_path, capsys):
    run = ['run','fig1',*quick,'--out',str(tmp_path/'o'),'--epochs','1','--json']
    assert main(run)==0
    out,err = capsys.readouterr()
    got = json.loads(out)
    assert got['run']==str(tmp_path/'o') and got['n']==40 and got['chance']==pytest.approx(.1)
    assert {*got['phases']}=={'start','pretrain','erode','relearn'}
    assert 'conflict_picture' in err and 'train_loss' in err and not set('█\r')&set(err)   # in a pipe no trace of bars
    assert main(run)==0 and json.loads(capsys.readouterr().out)==got
    assert main(['report',str(tmp_path/'o'),'--json'])==0
    assert json.loads(capsys.readouterr().out)=={'page': str(tmp_path/'o'/'report.html')}

def test_lengths_on_the_command_line_replace_those_of_a_configuration(tmp_path):
    (tmp_path/'c.json').write_text('{"iters": [3, 3, 3], "lr": 1}')
    def lengths(*args): return (a := cli._parsed(['run','fig1','--config',str(tmp_path/'c.json'),*args])).epochs,a.iters,a.lr
    assert [lengths(), lengths('--epochs','2'), lengths('--iters','4')]==[(None,[3,3,3],1), ([2],None,1), (None,[4],1)]

def test_null_in_a_configuration_is_not_a_name(tmp_path, capsys):
    (tmp_path/'c.json').write_text('{"out": null, "weights": null, "lr": null, "epochs": 3}')
    a = cli._parsed(['run','fig1','--config',str(tmp_path/'c.json')])
    assert (a.out, a.weights, a.lr, a.epochs)==(None, None, .1, [3])
    for text in '{"out": {}}','{"out": false}','{"iters": []}','{"iters": [1, null]}':
        (tmp_path/'c.json').write_text(text)
        assert 'must be a word or a number' in fails(capsys, 'run', 'fig1', '--config', tmp_path/'c.json')

@pytest.mark.parametrize('args,says',
                         [(['demo','--seed','99999999999999999999'],'seed=99999999999999999999: must be from 0 to 4294967295'),
                          (['run','fig1','--seed','-1'],'seed=-1: must be from 0'),
                          (['run','fig1','--data',''],"data='': is empty"),
                                       (['run','fig1','--weights',''],"weights='': is empty"),
                                       (['report',''],"path='': is empty"), (['paper','--images',''],"images='': is empty"),
                                       (['paper','--out',''],"out='': is empty")])
def test_what_is_empty_or_too_large_is_named(capsys, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, *args) and not list(tmp_path.iterdir())
