"Labels and loaders of all kinds: classes that must agree, samples that are chosen with and without labels, looks that read once."
import warnings
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from PIL import Image
from torch import nn
from fastai.vision.all import (SGD, BCEWithLogitsLossFlat, Callback, CancelFitException, CategoryBlock, CrossEntropyLossFlat,
                               DataBlock, DataLoader, DataLoaders, DiceMulti, FlipItem, ImageBlock, ItemTransform, Learner,
                               MSELossFlat, MultiCategoryBlock, Perplexity, RegressionBlock, TensorCategory, TensorImage, TfmdDL,
                               ToTensor, accuracy, accuracy_multi, foreground_acc, get_image_files, load_learner, mae, partial, rmse, set_seed,
                               top_k_accuracy, F1Score, MaskBlock, Recall)
from fastai.callback.data import PartialDL, WeightedDL
from fastai.tabular.all import Categorify, Categorize, Datasets, TabularDataLoaders
from fastai.text.data import Numericalize, SortedDL, pad_input
from feature_erosion.batches import answered
from feature_erosion.measures.cka import layer_cka
from feature_erosion.data import TensorImages, digits_dls, tensor_dls
from feature_erosion.evalsets import EvalSets, evaluate, pattern_sets, train_accuracy
from feature_erosion.loaders import fixed_dl, pick, read_labels, same_dl, subset_dl
from feature_erosion.learner import erosion_learner
from feature_erosion.mitigations import Adversarial, DERpp, EWC, LwF, Replay, just_train_twice
from feature_erosion.patterns import ColorSquare, Stripes, stamp_dl
from feature_erosion.phases import Phase, check_classes, check_inputs, class_names
from feature_erosion.measures.probes import dl_labels, layer_probe
from feature_erosion.measures.plasticity import plasticity_measures
from feature_erosion.measures.rank import layer_rank
from feature_erosion.recover import group_accuracy, recover
from feature_erosion.unlearning import split_forget
from feature_erosion.watch import WatchErosion

works,loads = partial(pytest.mark.works, kind='labels'),partial(pytest.mark.works, kind='loaders')

def net(n=10, size=16): return nn.Sequential(nn.Flatten(), nn.Linear(3*size*size,8), nn.ReLU(), nn.Linear(8,n))

@pytest.fixture
def dls():
    set_seed(0)
    return digits_dls(n=64, n_valid=40, bs=16)

def renamed(dls, vocab):
    "The same images; class c is what `vocab` calls so"
    old = list(dls.vocab)
    def images(ds): return TensorImages(ds.x, [vocab.index(old[int(y)]) for y in ds.y], vocab)
    return tensor_dls(images(dls.train_ds), images(dls.valid_ds), bs=16, pad=0, flip=False, stats=((.5,)*3,)*2)

def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_phases(*args, **kwargs)
    return learn

# classes that must agree

@works(what='two phases that list the same classes in another order', how='refused: names the first class that has two labels')
def test_vocabularies_in_another_order(dls):
    other = renamed(dls, list(dls.vocab)[::-1])
    learn = erosion_learner(dls, net())
    said = "phase 'b' has class '9' as label 0, the Learner's data have it as 9; give all data one `vocab`"
    with pytest.raises(ValueError, match=said):
        quiet(learn, [Phase('a', 1), Phase('b', 1, other)])
    assert learn.dls is dls

@works(what='an evaluation set that lists the same classes in another order', how='refused: names the set and the class')
def test_evaluation_set_in_another_order(dls):
    other = renamed(dls, list(dls.vocab)[::-1])
    learn = Learner(dls, net(), opt_func=SGD, metrics=accuracy)
    with pytest.raises(ValueError, match="set 'old' has class '9' as label 0"):
        quiet(learn, [Phase('a', 1)], cbs=EvalSets({'old':other.valid}))
    assert list(learn.metrics.attrgot('name'))==['accuracy']
    quiet(learn, [Phase('a', 1)], cbs=EvalSets({'old':renamed(dls, list(dls.vocab)).valid}))
    assert (h := learn.recorder.history).accuracy.tolist()==h.old.tolist()

@works(what='a new task: other classes on the same outputs', how='works, with a warning that names a label and its two classes')
def test_other_classes_on_the_same_outputs(dls):
    def task(names):
        return tensor_dls(*(TensorImages(ds.x, ds.y%2, names) for ds in (dls.train_ds,dls.valid_ds)), bs=16, pad=0, flip=False)
    learn = Learner(task(['cat','dog']), net(2), opt_func=SGD, metrics=accuracy)
    with pytest.warns(UserWarning, match="phase 'b': label 0 is 'car', in the Learner's data it is 'cat'"):
        quiet(learn, [Phase('a', 1), Phase('b', 1, task(['car','bus']))])
    assert len(learn.recorder.phases)==2

@pytest.mark.parametrize('a,b,ok', [([3,7],['3','7'],True), ([3,7],[7,3],False), (['a','b','c'],['a','b'],True),
                                    (['a','b','c'],['b','c'],False), (['a','b'],None,True), (None,None,True)])
def test_same_classes(a, b, ok):
    "Names are compared as they are written; a shorter list agrees if it is a beginning; data without names cannot be compared"
    a,b = (SimpleNamespace(vocab=o) for o in (a,b))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        if ok: check_classes(a, b, 'x')
        else:
            with pytest.raises(ValueError): check_classes(a, b, 'x')

@works(what="torchvision's `ImageFolder`", how="works: its `class_to_idx` is its vocabulary")
def test_torchvision_folders_have_names(tmp_path):
    from torchvision.datasets import ImageFolder
    for k in 'ba':
        (tmp_path/k).mkdir()
        Image.new('RGB', (4,4)).save(tmp_path/k/'0.png')
    ds = ImageFolder(tmp_path)
    assert class_names(DataLoader(ds, bs=1))==['a','b']
    assert class_names(ImageFolder(tmp_path, target_transform=lambda y: 1-y)) is None
    with pytest.raises(ValueError, match="x has class 'a' as label 0"): check_classes(SimpleNamespace(vocab=['b','a']), ds, 'x')

@loads(what="PyTorch's loaders and parts of torchvision's folders, in which a class has another label",
       how='refused: names the class')
def test_pytorch_loaders_have_the_names_of_their_folders(tmp_path):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor
    for k in ('train/a','train/b','test/b'):
        (tmp_path/k).mkdir(parents=True)
        for i in range(4): Image.new('RGB', (4,4), (9*i,0,0)).save(tmp_path/k/f'{i}.png')
    train,test = (ImageFolder(tmp_path/k, ToTensor()) for k in ('train','test'))
    class Other(torch.utils.data.Subset):
        def __getitem__(self, i): return self.dataset[i][0],1
        def __getitems__(self, idxs): return [self[i] for i in idxs]
    part = torch.utils.data.Subset(train, range(2, 8))
    assert class_names(torch.utils.data.DataLoader(part))==class_names(DataLoader(part, bs=2))==['a','b']
    assert class_names(Other(test, range(4))) is None
    for kind in (partial(torch.utils.data.DataLoader, batch_size=2),partial(DataLoader, bs=2, num_workers=0)):
        for see in (layer_probe, partial(recover, few=1)):
            with pytest.raises(ValueError, match="test has class 'b' as label 0, train have it as 1"):
                see(net(2, 4), kind(part), kind(test), progress=False)

def texts(words, vocab=None):
    "A text of one word for each, and its class"
    ds = Datasets(words, [[str.split, Numericalize(vocab, min_freq=1)], [len, Categorize()]], splits=(range(len(words)),[0]))
    return ds.dataloaders(bs=2, num_workers=0, before_batch=pad_input)

def tables(cities, names=('age','height')):
    df = pd.DataFrame(dict(city=cities, age=range(len(cities)), height=range(len(cities)), y=[i%2 for i in range(len(cities))]))
    return TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['city'], cont_names=list(names), y_names='y',
                                      y_block=CategoryBlock, valid_idx=[0,1], bs=2, num_workers=0)

@works(what='texts with a vocabulary of their own, in which a word has another number', how='refused: names the word and both numbers')
def test_vocabularies_of_texts():
    a,b = texts(['one','two two','two']),texts(['two','one one','one'])
    assert [list(o.vocab[0])[9:11] for o in (a,b)]==[['two','one'],['one','two']]
    learn = Learner(a, nn.EmbeddingBag(16, 2), metrics=accuracy)
    for f in (lambda: EvalSets({'old':b.valid}), lambda: WatchErosion({'old':b})):
        with pytest.raises(ValueError, match="'old' has token 'one' as number 9, the Learner's data have it as 10"):
            quiet(learn, [Phase('a', 1)], cbs=f())
    with pytest.raises(ValueError, match="phase 'b' has token 'one' as number 9"): quiet(learn, [Phase('a', 1), Phase('b', 1, b)])
    more = texts(['two','one one','one one','six','six six'], a.vocab[0])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_inputs(a, more, 'x')
        check_inputs(a, texts(['six']*9+['two']*3, [*list(a.vocab[0])[:11], 'six']), 'x')   # after fastai's padding, 'xxfake'

@works(what='tables in which a category or a column has another number', how='refused: names it and both numbers')
def test_categories_of_tables():
    a = tables(['A','B','C']*3)
    check_inputs(a, tables(['A','B']*4), 'x')   # the first ones
    check_inputs(a, a.test_dl(pd.DataFrame(dict(city=['C','B'], age=1, height=2))), 'x')
    with pytest.raises(ValueError, match="set 'x' has city 'B' as number 1, the Learner's data have it as 2"):
        check_classes(a, tables(['B','C']*4).valid, "set 'x'")
    with pytest.raises(ValueError, match="x has column 'height' as number 1, the Learner's data have it as 2"):
        check_inputs(a, tables(['A','B']*4, ['height']), 'x')
    with pytest.warns(UserWarning, match="x: city 1 is 'D', in the Learner's data it is 'A'"):
        check_inputs(a, tables(pd.Categorical(['B','C']*4, categories=['D','B','C'])), 'x')

# choosing samples

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "24 images of digits in two folders, 15 of `few` and 9 of `many` bits, and masks of what is bright"
    set_seed(0)
    path,x = tmp_path_factory.mktemp('images'),digits_dls(n=24, n_valid=20, bs=8).train_ds.x.numpy()
    for k in ('few','many','masks'): (path/k).mkdir()
    for i,im in enumerate(x):
        Image.fromarray(im).save(path/('few' if i<15 else 'many')/f'{i:02}.png')
        Image.fromarray((im[...,0]>127).astype(np.uint8)).save(path/'masks'/f'{i:02}.png')
    return path

def files(path): return get_image_files(path, folders=['few','many'])
def mask_of(f): return f.parent.parent/'masks'/f.name
def number(f): return int(f.stem)

def several(f): return [k for k,v in dict(even=number(f)%2==0, third=number(f)%3==0, few=f.parent.name=='few').items() if v]

blocks = dict(labels=(CategoryBlock, lambda f: f.parent.name),
              several=(MultiCategoryBlock(vocab=['even','third','few']), several),
              masks=(MaskBlock(codes=['dark','bright']), mask_of), numbers=(RegressionBlock, lambda f: number(f)/24))

def of_kind(path, kind, **kwargs):
    block,get_y = blocks[kind]
    def split(files): return range(0, 24, 4),[i for i in range(24) if i%4]
    data = DataBlock((ImageBlock,block), get_items=files, get_y=get_y, splitter=split)
    return data.dataloaders(path, bs=6, num_workers=0, **kwargs)

def chosen(dl): return list(dl.get_idxs())
def is_itself(cka): return cka.shape==(4,4) and np.allclose(np.diag(cka), 1)

@works(what='one label a sample, `n` of the samples', how='works: each class keeps its share')
def test_stratified(dls):
    "By hand: 40 samples of which 12, 8 and 20 have a class; of 10 samples 3, 2 and 5"
    ds = TensorImages(dls.valid_ds.x, [0]*12+[1]*8+[2]*20, list('abc'))
    dl = DataLoaders(TfmdDL(ds, bs=16, num_workers=0), TfmdDL(ds, bs=16, num_workers=0)).valid
    for seed in range(3):
        got = chosen(subset_dl(dl, 10, seed))
        assert np.bincount(ds.y[got]).tolist()==[3,2,5] and got==sorted(got)==chosen(subset_dl(dl, 10, seed))
    assert chosen(subset_dl(dl, 10, 0))!=chosen(subset_dl(dl, 10, 1))

@works(what='fewer samples than classes, such as `n=100` of 200 classes', how='works: each sample is as likely as any other')
def test_fewer_samples_than_classes():
    "By hand: classes 0 to 199 have 2 samples each, or 1, 2 or 3; means over seeds of the class and of its share are those of all"
    for counts in (np.full(200, 2), 1+np.arange(200)%3):
        y = np.repeat(np.arange(200), counts)
        dl = TfmdDL(TensorImages(torch.zeros(len(y), 1, 1, 1, dtype=torch.uint8), y, list(map(str, range(200)))), bs=64, num_workers=0)
        got = [y[chosen(subset_dl(dl, 100, s))] for s in range(40)]
        assert all(np.bincount(o, minlength=200).max()-counts.max()*100/len(y)<1 for o in got)
        assert abs(np.mean(got)-y.mean())<6 and abs(np.mean(counts[np.array(got)]==counts.max())-np.mean(counts[y]==counts.max()))<.05
        assert len(np.unique(got))==200

any_samples = 'works: any samples, the same ones for the same seed'

@pytest.mark.parametrize('kind', [
    pytest.param('labels', marks=works(what='files with one label each: CKA, rank', how='works: each class keeps its share')),
    pytest.param('several', marks=works(what='several labels a sample (`MultiCategoryBlock`): CKA, rank', how=any_samples)),
    pytest.param('masks', marks=works(what='segmentation masks: CKA, rank', how=any_samples)),
    pytest.param('numbers', marks=works(what='a number as target (`RegressionBlock`): CKA, rank', how=any_samples))])
def test_measures_of_part_of_the_data(images, kind):
    dl,model = of_kind(images, kind).valid,net()
    a,b = layer_rank(model, dl, n=12, progress=False),layer_rank(model, dl, n=12, progress=False)
    assert a.equals(b) and a.attrs['n']==12 and is_itself(layer_cka([model,model], dl, n=12, progress=False))
    got = chosen(subset_dl(dl, 12))
    assert got==chosen(subset_dl(dl, 12)) and len(got)==len(set(got))==12 and max(got)<18

@pytest.mark.parametrize('which', ['files','arrays'])
@works(what='unlabelled `test_dl`: CKA, rank', how=any_samples)
def test_unlabelled(images, dls, which):
    arrays,model = [o.numpy() for o in dls.valid_ds.x[:24]],net()
    test = of_kind(images, 'labels').test_dl(files(images)) if which=='files' else dls.test_dl(arrays)
    a = layer_rank(model, test, n=10, progress=False)
    assert a.equals(layer_rank(model, test, n=10, progress=False)) and a.attrs['n']==10
    assert not a.equals(layer_rank(model, test, n=10, seed=1, progress=False))
    assert is_itself(layer_cka([model,model], test, n=10, progress=False))

class Counted(torch.utils.data.Dataset):
    "Labels only with the images, which take time to read"
    def __init__(self, n): self.n,self.read = n,0
    def __len__(self): return self.n
    def __getitem__(self, i): self.read += 1; return torch.full((3,4,4), float(i)),i%2

@loads(what='a dataset that knows its labels only by reading samples', how='works: nothing is read to choose among them')
def test_nothing_is_read_to_choose():
    ds = Counted(50)
    dl = subset_dl(DataLoader(ds, bs=8), 10)
    assert ds.read==0 and [int(o[0,0,0]) for b in dl for o in b[0]]==chosen(dl) and len(chosen(dl))==10 and ds.read==10

def test_learners_of_pytorch_loaders():
    "They train as on fastai's; what would have to change the loader says which kind it needs"
    g = torch.Generator().manual_seed(0)
    items = [(torch.rand(3,8,8, generator=g),torch.tensor(i%3)) for i in range(24)]
    def learner(kind):
        d = DataLoaders(*[kind(items, 8) for _ in range(2)])
        d.c = 3
        set_seed(0)
        return erosion_learner(d, nn.Sequential(nn.Flatten(), nn.Linear(192,3)), lr=.01, loss_func=CrossEntropyLossFlat())
    def trained(learn):
        quiet(learn, [Phase('a', 1), Phase('b', 1)], cbs=[LwF(), Adversarial(), EWC(learn.dls)])
        return learn.model.state_dict().values()
    learn = learner(torch.utils.data.DataLoader)
    assert all(torch.equal(a, b) for a,b in zip(trained(learn), trained(learner(DataLoader))))
    d,square = learn.dls,ColorSquare(2)
    for f in (lambda: Replay(d), lambda: DERpp(d), lambda: just_train_twice(learn, d), lambda: subset_dl(d.train, 5),
              lambda: d.inject(square), lambda: pattern_sets(d, square), lambda: learn.attention(pattern=square)):
        with pytest.raises(ValueError, match='must be a fastai DataLoader; got torch.utils.data'): f()

@loads(what='a part of a part of a loader', how='works: stays within it')
def test_a_part_of_a_part(dls):
    part = subset_dl(dls.valid, 20)
    assert chosen(subset_dl(part, None))==chosen(part) and set(chosen(subset_dl(part, 7)))<set(chosen(part))
    assert layer_rank(net(), part, progress=False).attrs['n']==20

@loads(what='a loader over an iterable', how='refused: its samples cannot be chosen; a list of batches can')
def test_iterables_are_refused():
    with pytest.raises(ValueError, match='an iterable, whose samples cannot be chosen'):
        subset_dl(DataLoader(iter([torch.zeros(3)]), bs=1), 1)

# Which samples a loader reads

data = torch.utils.data
forty = data.TensorDataset(torch.arange(40.)[:,None], torch.arange(40)%2)

def read(dl): return [int(i) for b in dl for i in b[0][:,0]]

@pytest.mark.parametrize('sampler,want', [
    (data.SubsetRandomSampler([8,2,4]), [2,4,8]), ([5,1,1], [1,5]), (range(3,6), [3,4,5]),
    (data.WeightedRandomSampler([0.]*30+[1.]*10, 10), list(range(30,40))), (data.SequentialSampler(range(4)), [0,1,2,3]),
    (data.RandomSampler(forty, num_samples=10), list(range(40))), (data.RandomSampler(forty, replacement=True), list(range(40))),
    (data.DistributedSampler(forty, num_replicas=2, rank=1), list(range(40)))], ids=lambda o: type(o).__name__)
def test_samplers_of_pytorch(sampler, want):
    "Training and validation samples are often two samplers over one dataset; each sample that can be drawn is measured, once"
    for dl in (data.DataLoader(forty, 8, sampler=sampler),
               data.DataLoader(forty, batch_sampler=data.BatchSampler(sampler, 8, False))):
        assert read(fixed_dl(dl))==want and set(read(fixed_dl(dl, 2)))<=set(want)
        assert dl_labels(dl).tolist()==[i%2 for i in want]
    assert layer_rank(nn.Linear(1,2), dl, progress=False, n=None).attrs['n']==len(want)

class Odd(data.Sampler):
    def __init__(self): pass
    def __iter__(self): return iter(range(1,40,2))
    def __len__(self): return 20

class OddBatches(data.BatchSampler): "Somebody's own batches"

def test_samplers_of_ones_own():
    for dl in (data.DataLoader(forty, 8, sampler=Odd()), data.DataLoader(forty, batch_sampler=OddBatches(Odd(), 4, False))):
        with pytest.raises(ValueError, match='dl: a Odd(Batches)? chooses its samples, and which .*Subset'): fixed_dl(dl)
    assert read(fixed_dl(data.DataLoader(forty, batch_sampler=[[5,0],[3]])))==[0,3,5]

def test_samplers_keep_the_workers_own_start():
    "Such as one that opens a file"
    def start(i): raise OSError('opened')
    with pytest.raises(OSError, match='opened'):
        next(iter(fixed_dl(data.DataLoader(forty, 8, num_workers=1, worker_init_fn=start))))

def test_the_number_a_loader_was_given():
    assert read(fixed_dl(DataLoader(forty, bs=4, n=10)))==list(range(10))
    assert read(fixed_dl(PartialDL(forty, bs=4, partial_n=12)))==read(fixed_dl(WeightedDL(forty, bs=4)))==list(range(40))

class OddDL(TfmdDL):
    def get_idxs(self): return list(range(1,40,2))

def test_orders_of_ones_own():
    double = lambda b: (b[0]*2,b[1])
    changed = DataLoader(forty, bs=4, after_batch=double)
    changed.get_idxs = lambda: [1,3]
    for dl in (OddDL(forty, bs=4, after_batch=[ItemTransform(double)]), changed):
        with pytest.raises(ValueError, match=f'{type(dl).__name__} chooses its samples in a way of its own') as e:
            subset_dl(dl, None)
        advice = str(e.value).split('`')[1].replace('…', '4')
        assert read(subset_dl(eval(advice), None))==[2*i for i in range(40)]

# evaluation sets

def case(what, *args):
    return pytest.param(*args, marks=works(what=what, how="works: the numbers of the Learner's own validation"))

@pytest.mark.parametrize('kind,metric,loss,n_out', [
    case('several labels a sample: `EvalSets` with `accuracy_multi`', 'several', accuracy_multi, BCEWithLogitsLossFlat(), 3),
    case('segmentation: `EvalSets` with `DiceMulti`', 'masks', DiceMulti(), CrossEntropyLossFlat(axis=1), 2),
    case('regression: `EvalSets` with `mae`', 'numbers', mae, MSELossFlat(), 1),
    pytest.param('numbers', rmse, MSELossFlat(), 1, id='rmse, which fastai calls _rmse')])
def test_evaluation_sets_of_other_targets(images, kind, metric, loss, n_out):
    d = of_kind(images, kind)
    model = nn.Conv2d(3, 2, 3, padding=1) if kind=='masks' else net(n_out)
    learn = Learner(d, model, loss_func=loss, opt_func=SGD, lr=.01, metrics=metric)
    sets = EvalSets({'all':d.valid, 'painted':d.valid}, metrics=metric, n=None, n_at=7, at=[0,1])
    quiet(learn, [Phase('a', 2)], cbs=sets)
    h,ev = learn.recorder.history,learn.recorder.evals
    assert np.allclose(h['all'].astype(float), h.iloc[:, 4].astype(float), atol=1e-6)
    assert ev.n.tolist()==[18,7,7,18,18]
    again,kept = (list(evaluate(learn.model, dl, metric).values())[0] for dl in (subset_dl(d.valid, 7),sets.some['all'].batches))
    assert ev['all'].notna().all() and again==kept

@pytest.mark.parametrize('kind,metric,loss', [('several', accuracy_multi, BCEWithLogitsLossFlat()),
                                              ('masks', foreground_acc, CrossEntropyLossFlat(axis=1))])
def test_chance_is_not_known_without_single_classes(images, kind, metric, loss):
    d = of_kind(images, kind)
    model = nn.Conv2d(3, 2, 3, padding=1) if kind=='masks' else net(3)
    learn = Learner(d, model, loss_func=loss, opt_func=SGD, lr=.01, metrics=metric)
    quiet(learn, [Phase('a', 1)], cbs=EvalSets({'clean':d.valid}, metrics=metric))
    with pytest.raises(ValueError, match='chance=None: samples have no single class'): learn.erosion()
    assert learn.erosion(chance=.25).attrs['chance']==.25

@pytest.mark.parametrize('which', ['files','arrays'])
@works(what='an evaluation set without labels', how='refused: names the set')
def test_evaluation_sets_need_labels(images, dls, which):
    d = of_kind(images, 'labels')
    test = d.test_dl(files(images)) if which=='files' else dls.test_dl([dls.valid_ds.x[0].numpy()])
    with pytest.raises(ValueError, match="sets: 'new' has no labels"): EvalSets({'old':d.valid, 'new':test})

@pytest.mark.parametrize('f',
                         [lambda dls,**kw: evaluate(net(), dls.valid, **kw), lambda dls,**kw: EvalSets({'a':dls.valid}, **kw)],
                         ids=['evaluate','EvalSets'])
def test_metrics_have_names_of_their_own(dls, f):
    top = [partial(top_k_accuracy, k=k) for k in (1,5)]
    for two,said in ((top, 'top_k_accuracy'), ([F1Score(average='macro'), F1Score(average='micro')], 'f1_score')):
        with pytest.raises(ValueError, match=f"metrics: two are called '{said}', and one would hide the other"):
            f(dls, metrics=two)
    with pytest.raises(ValueError, match="metrics: one has no name .*F.cross_entropy"): f(dls, metrics=nn.CrossEntropyLoss())

def test_metrics_of_the_learner(dls):
    with pytest.raises(AttributeError, match='metrics: one reads `learn.loss`, which evaluation sets do not have'):
        evaluate(net(), dls.valid, Perplexity())

def test_a_learner_is_evaluated(dls):
    learn = Learner(dls, net(), metrics=accuracy)
    with learn.no_bar(): want = learn.validate()[1]
    assert evaluate(learn, dls.valid)=={'accuracy':want}

@pytest.mark.parametrize('pred,y', [((6,3), (6,3)), ((4,5,8,8), (4,8,8)), ((4,8,8,8), (4,8,8)), ((6,3), (3,))], ids=str)
def test_accuracy_of_what_it_does_not_fit(pred, y):
    "Masks of as many classes as pixels in a row would be compared along the wrong axis"
    with pytest.raises(ValueError, match='dl: labels of shape .* for answers of shape .*`accuracy` wants one integer'):
        evaluate(nn.Identity(), [(torch.rand(pred), torch.zeros(y, dtype=torch.long))])

def test_accuracy_of_sequences_and_columns():
    "One score vector for each place of a sequence; labels of a table are a column"
    p = torch.eye(3)[torch.tensor([[0,1,2,2],[1,1,0,0]])]
    assert evaluate(nn.Identity(), [(p, torch.tensor([[0,1,2,0],[1,2,0,0]]))])=={'accuracy':6/8}
    assert evaluate(nn.Identity(), [(p[0], torch.tensor([[0],[1],[2],[0]]))])=={'accuracy':3/4}

def off(p, t): return (p.flatten()-t).abs().float().mean()

@works(what='negative labels, such as degrees or -1 by mistake',
       how='works: they count like any other; only the additional `labels` may leave samples out')
def test_negative_labels_count():
    "Two of four can be right; the distances of 0 from -30, -20, 1 and 2 are 53/4 on average"
    assert evaluate(nn.Identity(), [(torch.eye(4), torch.tensor([0,1,-1,-1]))])=={'accuracy':.5}
    y = torch.tensor([-30,-20,1,2])
    for t in (y, y.int()): assert evaluate(nn.Identity(), [(torch.zeros(4,1), t)], off)=={'off':53/4}
    with pytest.raises(ValueError, match='y: labels from -1 on'): TensorImages(torch.zeros(2,4,4,1, dtype=torch.uint8), [0,-1])

def test_more_labels_are_one_for_each_sample():
    b = [(torch.eye(4), torch.arange(4))]*2
    for n,said in ((3, 'at least 4'), (7, 'at least 8'), (9, '8')):
        with pytest.raises(ValueError, match=f"labels: 'other' has {n} for {said} samples"):
            evaluate(nn.Identity(), b, labels={'other':torch.zeros(n)})
    assert np.isnan(evaluate(nn.Identity(), b, labels={'other':[-1]*8})['other_accuracy'])

def test_no_samples_are_refused():
    with pytest.raises(ValueError, match='dl: there are no samples in it'): evaluate(nn.Identity(), [])

@pytest.mark.works(kind='models', what='A network that puts out NaN or infinity: `evaluate`, `EvalSets`, `train_accuracy`',
                   how='works: NaN, never the accuracy of the first class')
def test_a_diverged_network_has_no_accuracy(dls):
    x,y = torch.eye(3),torch.arange(3)
    for bad in (torch.nan, torch.inf):
        z = x.clone(); z[1,2] = bad
        assert np.isnan(list(evaluate(nn.Identity(), [(x, y), (z, y)], labels={'other':[0]*6}).values())).all()
        assert answered(z).tolist()==[0,-1,2]
    masked = x.masked_fill(x==0, -torch.inf)   # classes that are ruled out
    assert evaluate(nn.Identity(), [(masked, y)])=={'accuracy':1.} and answered(masked).tolist()==[0,1,2]
    assert group_accuracy(nn.Identity(), [(masked, y)]).accuracy.tolist()==[1.,1.,1.]
    ruled_out = x.masked_fill(y[:,None]==0, -torch.inf)   # all of them, on one sample
    assert np.isnan(evaluate(nn.Identity(), [(ruled_out, y)])['accuracy']) and answered(ruled_out).tolist()==[-1,1,2]
    with pytest.raises(ValueError, match='NaN or infinite scores'): group_accuracy(nn.Identity(), [(ruled_out, y)])

class Break(Callback):
    def after_train(self):
        for p in self.model.parameters(): p.data.fill_(torch.nan)

def test_divergence_is_not_erosion(dls):
    learn = erosion_learner(dls, net())
    with learn.no_bar(), learn.no_logging():
        learn.fit(20, lr=.01)
        learn.fit(1, cbs=[EvalSets(pattern_sets(dls, ColorSquare(4)), at=[0]), Break()])
        row = learn.erosion().loc['fit']
        assert row.before>.3 and row[['after','lost','forgetting','half_life','follows','reliance']].isna().all()
        assert not train_accuracy(.01)(learn)

def test_a_training_set_is_measured_without_augmentation():
    "Crops by up to half of the image would cost accuracy; the loader's next batches are the same as without a look"
    set_seed(0)
    d = digits_dls(n=128, n_valid=40, bs=64)
    learn = erosion_learner(tensor_dls(d.train_ds, d.valid_ds, pad=8), net())
    with learn.no_bar(), learn.no_logging():
        learn.fit(10, lr=.01)
        plain = evaluate(learn, tensor_dls(d.train_ds, d.train_ds).valid)['accuracy']
        learn.fit(1, lr=0., cbs=EvalSets({'train':learn.dls.train}, at=[]))
    assert learn.recorder.evals.train.iloc[-1]==pytest.approx(plain)
    dl,state = learn.dls.train,learn.dls.train.rng.getstate()
    assert evaluate(learn, dl)['accuracy']==pytest.approx(plain) and dl.rng.getstate()==state and dl.after_batch.split_idx==0

@works(what='a set `conflict` in which some images have no other class\'s picture',
       how='refused: both shares would not be of the same images')
def test_shares_of_the_same_images(dls):
    for kw in (dict(ratio=.5), dict(classes=['3'])):
        some = stamp_dl(dls.valid, ColorSquare(4), 'conflict', **kw)
        with pytest.raises(ValueError, match="images in 'conflict' have no other class's picture"): EvalSets({'conflict':some})
        assert EvalSets({'some':some}).columns==['some','some_picture']

@works(what='an evaluation set called like a column that is there already', how='refused before training: names the column')
@pytest.mark.parametrize('name',
                         ['accuracy','valid_loss','train_loss','n','epoch','iter','iters','total_iter','phase','when','time'])
def test_sets_called_like_columns(dls, name):
    learn = erosion_learner(dls, net())
    start = learn.model[1].weight.detach().clone()
    with pytest.raises(ValueError, match=f"there would be two columns '{name}'"):
        quiet(learn, [Phase('a', 1)], cbs=EvalSets({name:dls.valid}))
    assert torch.equal(learn.model[1].weight, start) and list(learn.metrics.attrgot('name'))==['accuracy']

def test_sets_called_like_each_other(dls):
    sets = pattern_sets(dls, ColorSquare(4))
    assert list(pattern_sets(dls, ColorSquare(4), names='conflict'))==['conflict']
    with pytest.raises(ValueError, match="sets: two would have the column 'conflict_picture'"):
        EvalSets({**sets, 'conflict_picture':dls.valid})
    with pytest.raises(ValueError, match="two columns 'clean'"):
        quiet(erosion_learner(dls, net()), [Phase('a', 1)], cbs=[EvalSets(sets), EvalSets({'clean':dls.train})])

def test_settings_of_evaluation_sets(dls):
    for at in (5, None, [1.5], [-1], 'log '):
        with pytest.raises(ValueError, match='at=.*whole numbers from 0 up'): EvalSets({'a':dls.valid}, at=at)
    for kw in (dict(n=2.5), dict(n_at=0)):
        with pytest.raises(ValueError, match='must be a whole number, at least 1'): EvalSets({'a':dls.valid}, **kw)
    for sets in (dls, [dls.valid]):
        with pytest.raises(ValueError, match='sets: got a .*a dict of loaders by name'): EvalSets(sets)

@works(what='phases with two different patterns', how='refused unless `EvalSets` are given: no one set can be painted for both')
def test_two_patterns_in_one_fit(dls):
    a,b,again = dls.inject(ColorSquare(4)),dls.inject(Stripes(8)),dls.inject(ColorSquare(4), ratio=.5)
    learn = erosion_learner(dls, net())
    with pytest.raises(ValueError, match="phases: 'a' and 'b' differ in their pattern"):
        quiet(learn, [Phase('a', 1, a), Phase('b', 1, b)])
    sets = EvalSets({'clean':dls.valid, 'squares':a.valid, 'stripes':b.valid})
    quiet(learn, [Phase('a', 1, a), Phase('b', 1, b)], cbs=sets)
    assert learn.injected.value is None and 'stripes' in learn.recorder.evals
    quiet(learn, [Phase('a', 1, a), Phase('b', 1, again)])
    assert learn.injected.value is a and 'conflict' in learn.recorder.evals

def test_sets_are_loaders():
    with pytest.raises(ValueError, match='dl: must be a fastai DataLoader; got builtins.list'):
        EvalSets({'a':[(torch.rand(2,3), torch.zeros(2))]})

@works(what='data that name no classes: `n_classes=` of `inject`', how='works: `fit_phases` and `pattern_sets` take it over')
def test_n_classes_are_handed_on():
    "Four labels, of which one does not occur: only `n_classes` knows of it"
    set_seed(0)
    x,y = torch.rand(64,3,8,8),torch.arange(64)%3
    ds = list(zip(map(TensorImage, x), y))
    d = DataLoaders(DataLoader(ds[:48], bs=16, shuffle=True), DataLoader(ds[48:], bs=16))
    easy = d.inject(ColorSquare(2), n_classes=4)
    for given in (pattern_sets(easy), pattern_sets(d, ColorSquare(2), n_classes=4)):
        stamps = given['conflict'].dataset.stamps
        assert stamps.min()>=0 and stamps.max()==3 and (stamps!=y[48:]).all()
    learn = Learner(d, net(4, 8), loss_func=CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy)
    quiet(learn, [Phase('a', 1), Phase('b', 1, easy)])
    assert {'clean','pattern','conflict','conflict_picture'}<=set(learn.recorder.history)
    with pytest.raises(ValueError, match='n_classes'): pattern_sets(d, ColorSquare(2))

# looks inside a phase

def starts(monkeypatch):
    "Which loaders start worker processes, an entry each time"
    import fastai.data.load as load
    seen = []
    class Multi(load._loaders[0]):
        def __init__(self, fake): seen.append(fake.d); super().__init__(fake)
    monkeypatch.setattr(load, '_loaders', (Multi,load._loaders[1]))
    return seen

@loads(what='a loader with worker processes, looked at inside a phase', how='works: each set is read once, then a look costs forward passes')
def test_looks_start_no_workers(images, monkeypatch):
    "Whether there are two looks or four, workers start equally often"
    def run(at):
        set_seed(0)
        seen,d = starts(monkeypatch),of_kind(images, 'labels')
        sets = pattern_sets(d, ColorSquare(4), ('clean','pattern'))
        for dl in sets.values(): dl.fake_l.num_workers = 1
        learn = Learner(d, net(2), opt_func=SGD, metrics=accuracy)
        quiet(learn, [Phase('a', iters=5)], cbs=EvalSets(sets, at=at, n_at=9))
        monkeypatch.undo()
        return len(seen),learn.recorder.evals
    (a,ev),(b,_) = run([1,2,3,4]),run([1,4])
    assert a==b>0 and (ev.when=='iter').sum()==4

def doubled(b): return b[0].mul_(2),b[1]

@pytest.mark.parametrize('which', ['files','changed in place'])
def test_kept_batches_are_the_loaders_own(images, which):
    "Types and all, time and again"
    samples = [(torch.full((2,), float(i)),i) for i in range(18)]
    dl = of_kind(images, 'labels').valid if which=='files' else DataLoader(samples, bs=6, after_batch=doubled)
    s = EvalSets({'x':dl}, n_at=9).some['x']
    want = list(s.dl)
    for _ in range(3):
        got = list(s.batches)
        same = [torch.equal(x, y) and type(x) is type(y) for a,b in zip(got, want) for x,y in zip(a, b)]
        assert len(got)==len(want)==2 and all(same) and len(same)==4
    assert s.batches.kept and len(s.batches)==2
    if which!='files': assert want[0][0][:,0].tolist()==[2*i for i in chosen(s.dl)[:6]]

def test_large_sets_are_not_kept(images, monkeypatch):
    d = of_kind(images, 'labels')
    e = EvalSets({'x':d.valid}, n_at=9)
    b = e.some['x'].batches
    monkeypatch.setattr(type(b), 'most', 9*3*16*16-1)    # of nine images in bytes
    a = [o[1].tolist() for o in b]
    assert b.kept==[] and a==[o[1].tolist() for o in b] and sum(map(len, a))==9
    monkeypatch.setattr(type(b), 'most', 1e6)
    b.kept = None
    assert [o[1].tolist() for o in b]==a and b.kept

def test_kept_batches_are_not_pickled(images):
    import pickle
    b = EvalSets({'x':digits_dls(n=64, n_valid=40).valid}, n_at=9).some['x'].batches
    list(b)
    assert b.kept and pickle.loads(pickle.dumps(b)).kept is None

@pytest.mark.parametrize('workers', [0,1])
@loads(what='training with and without evaluation sets', how='works: the same weights, bit for bit')
def test_training_is_the_same(images, workers):
    def weights(evals):
        set_seed(3)
        d = of_kind(images, 'labels', shuffle=True)
        d = DataLoaders(*[dl.new(num_workers=workers, after_item=[FlipItem(), ToTensor()]) for dl in d.loaders])
        model = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(768,2))
        learn = Learner(d, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1)
        set_seed(1)
        quiet(learn, [Phase('a', 3)], cbs=evals(d))
        return learn.model[2].weight.data
    with_ = weights(lambda d: EvalSets(pattern_sets(d, ColorSquare(4)), at=[0,1,2], n_at=9))
    assert torch.equal(with_, weights(lambda d: None))

# clear words

@pytest.mark.parametrize('call', ['history','phases','evals','plot_phases','plot_collapse'])
def test_tables_before_a_fit(dls, call):
    with pytest.raises(ValueError, match='no fit yet: train first, with `fit_phases` or `fit`'):
        got = getattr(Learner(dls, net(), metrics=accuracy).recorder, call)
        got()

@pytest.mark.parametrize('call', ['plot_phases','plot_collapse'])
def test_plots_after_another_fit(dls, call):
    learn = quiet(Learner(dls, net(), opt_func=SGD, metrics=accuracy), [Phase('a', 1, dls.inject(ColorSquare(4)))])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    with pytest.raises(ValueError, match='no evaluations in this fit'): getattr(learn.recorder, call)()
    with pytest.raises(ValueError, match='no evaluations in this fit'): learn.erosion()

def test_a_look_for_a_learning_rate_is_no_fit(dls, tmp_path):
    learn = quiet(Learner(dls, net(), opt_func=SGD, metrics=accuracy, path=tmp_path), [Phase('a', 1, dls.inject(ColorSquare(4)))])
    rec = learn.recorder
    was = rec.history,rec.evals,rec.phases,learn.erosion()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=12, show_plot=False)
    for a,b in zip(was, (rec.history,rec.evals,rec.phases,learn.erosion()), strict=True): assert a.equals(b)

@pytest.mark.parametrize('then', ['validate','get_preds','lr_find'])
def test_the_last_fit_is_remembered_unseen(dls, tmp_path, then):
    "A fit that nobody asked about was taken for the one before"
    learn = quiet(Learner(dls, net(), opt_func=SGD, metrics=accuracy, path=tmp_path), [Phase('a', 1, dls.inject(ColorSquare(4)))])
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        loss = learn.recorder.values[-1][1]
        getattr(learn, then)(**dict(show_plot=False, num_it=6) if then=='lr_find' else {})
    h = learn.recorder.history
    assert len(h)==2 and h.valid_loss.iloc[-1]==loss and 'phase' not in h and not len(learn.recorder.evals)

@pytest.mark.parametrize('then', ['validate','lr_find'])
def test_an_exported_learner_has_its_history(dls, tmp_path, then):
    learn = quiet(Learner(dls, net(), opt_func=SGD, metrics=accuracy, path=tmp_path), [Phase('a', 1, dls.inject(ColorSquare(4)))])
    with learn.no_bar(), learn.no_logging(): getattr(learn, then)(**dict(show_plot=False, num_it=6) if then=='lr_find' else {})
    learn.export('x.pkl')
    assert load_learner(tmp_path/'x.pkl').recorder.history.equals(learn.recorder.history)

def test_a_fit_that_ends_before_it_begins(dls):
    class End(Callback):
        order = 0
        def before_fit(self): raise CancelFitException
    learn = Learner(dls, net(), opt_func=SGD, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=End())
    with pytest.raises(ValueError, match='no fit yet'): learn.recorder.history

def test_phases_that_are_none(dls):
    said = r"phases: want `Phase`s, e.g. Phase\('pretrain', 160, dls\); got \('a', 1,.*a tuple"
    with pytest.raises(ValueError, match=said): quiet(Learner(dls, net()), [('a',1,dls)])

@pytest.mark.parametrize('f', [evaluate, layer_rank, layer_cka])
def test_dataloaders_in_place_of_a_loader(dls, f):
    with pytest.raises(ValueError, match=r'dl: DataLoaders; .*such as `dls.valid`'): f(net(), dls)

class Padded(nn.Module):
    "Right where there is no padding: whether ones are more than a third of all tokens"
    def __init__(self): super().__init__(); self.fc = nn.Linear(1, 2)
    def forward(self, x):
        with torch.no_grad(): self.fc.weight.copy_(torch.tensor([[-1.],[1]])), self.fc.bias.copy_(torch.tensor([1/3,-1/3]))
        return self.fc((x==1).float().mean(1, keepdim=True))

@loads(what='Texts, from `SortedDL`', how='works: measures read the longest first, as validation does, with as little padding')
def test_texts_are_padded_as_in_validation():
    items = [(torch.ones(n) if n%2 else torch.full((n,), 2.),n%2) for n in [6,31,9,30,7,28,8,29]]
    def padded(b):
        k = max(len(x) for x,_ in b)
        return torch.stack([F.pad(x, (k-len(x),0)) for x,_ in b]),torch.tensor([y for _,y in b])
    dl,m = SortedDL(items, sort_func=lambda o: len(o[0]), bs=4, create_batch=padded, num_workers=0),Padded()
    assert (evaluate(m, dl)['accuracy'],evaluate(m, TfmdDL(items, bs=4, create_batch=padded, num_workers=0))['accuracy'])==(1,.75)
    assert dl_labels(dl).tolist()==[1,0,1,0,1,0,1,0] and group_accuracy(m, dl).accuracy.tolist()==[1,1]
    assert group_accuracy(m, dl, by=['short' if len(x)<10 else 'long' for x,_ in items]).n.to_dict()=={'long':4, 'short':4}
    train = SortedDL(list(items), sort_func=lambda o: len(o[0]), bs=4, create_batch=padded, num_workers=0, shuffle=True)
    assert recover(m, train, dl, few=2, features='last', progress=False).accuracy.tolist()==[1,1,1]
    for n in (3,6):
        some = fixed_dl(dl, n)
        lengths = [len(items[i][0]) for i in some.get_idxs()]
        assert lengths==sorted(lengths, reverse=True) and len(lengths)==n and fixed_dl(some).get_idxs()==some.get_idxs()
    assert same_dl(dl, idxs=[0,1,2]).get_idxs()==[0,1,2]

def test_measures_read_the_samples_that_were_named():
    "Not as many from the start of the dataset, nor those of the loader before"
    dl = DataLoader([(torch.tensor([float(i)]),i%2) for i in range(10)], bs=4, num_workers=0)
    for old in (dl, subset_dl(dl, 6)):
        some = same_dl(old, idxs=[7,9,8])
        assert torch.cat([b[0] for b in fixed_dl(some)]).flatten().tolist()==[7,9,8] and dl_labels(some).tolist()==[1,1,0]
        assert set(torch.cat([b[0] for b in fixed_dl(some, 2)]).flatten().tolist())<{7,8,9}

@loads(what="`n` samples of a PyTorch loader whose dataset has `targets`, or of a `TensorDataset`", how='works: stratified')
@pytest.mark.parametrize('n', [8,20,79])
def test_samples_of_pytorch_loaders_are_stratified(n):
    class Images(torch.utils.data.Dataset):
        targets = [0]*40+[1]*20+[2]*20
        def __len__(self): return 80
        def __getitem__(self, i): return torch.rand(4),self.targets[i]
    x,y = torch.rand(80, 4),torch.tensor(Images.targets)
    for ds in (Images(),torch.utils.data.TensorDataset(x, y)):
        for dl in (torch.utils.data.DataLoader(ds, 16, shuffle=True),DataLoader(ds, bs=16, num_workers=0)):
            got = dl_labels(dl, n).bincount()
            assert got.sum()==n and ((got-n*torch.tensor([.5,.25,.25])).abs()<1).all()

@pytest.mark.parametrize('kind', ['fastai','pytorch'])
def test_more_labels_need_an_order(kind):
    x,y = torch.randn(40, 4),torch.arange(40)%3
    def loader(**kwargs):
        return DataLoader(list(zip(x, y)), bs=8, **kwargs) if kind=='fastai' else torch.utils.data.DataLoader(list(zip(x, y)), 8, **kwargs)
    with pytest.raises(ValueError, match='labels: the loader shuffles its samples'):
        evaluate(nn.Linear(4, 3), loader(shuffle=True), labels={'same':y})
    res = evaluate(model := nn.Linear(4, 3), fixed_dl(loader(shuffle=True)), labels={'same':pd.Series(y.numpy(), range(9, 49))})
    assert res['same_accuracy']==res['accuracy']==evaluate(model, loader(shuffle=True))['accuracy']

@loads(what='a PyTorch loader with a generator of its own',
       how='works: `evaluate` leaves it as it was, and the samples come in the order in which they would have come')
def test_evaluation_leaves_a_generator_alone():
    def order(look):
        dl = torch.utils.data.DataLoader([(torch.full((4,), float(i)),i%3) for i in range(40)], 8, shuffle=True,
                                         generator=torch.Generator().manual_seed(3))
        if look: evaluate(nn.Linear(4, 3), dl)
        return [x[:,0].tolist() for x,_ in dl]
    assert order(True)==order(False)

def test_a_metric_of_several_values_is_refused():
    with pytest.raises(ValueError, match="'recall_score' has 3 values, and one is needed"):
        evaluate(nn.Linear(4, 3), [(torch.rand(12, 4),torch.arange(12)%3)], metrics=Recall(average=None))

@pytest.mark.parametrize('level,enough', [(.25,True), (.3,False), (.99,False)])
def test_enough_of_the_samples_that_are_read(dls, level, enough):
    "5 of 20 samples are right; that the dataset has more makes no difference"
    part = same_dl(dls.train, idxs=list(range(20)))
    wanted = torch.cat([y for _,y in part]).as_subclass(torch.Tensor)
    wanted[5:] = (wanted[5:]+1)%10
    class Known(nn.Module):
        def forward(self, x): self.i,i = self.i+len(x),self.i; return F.one_hot(wanted[i:i+len(x)], 10).float()
    model = Known()
    model.i = 0
    assert train_accuracy(level)(Learner(DataLoaders(part, dls.valid), model)) is enough

@loads(what='a loader of fewer samples than a batch, and `drop_last`', how='works: is measured, also by methods of a Learner')
@pytest.mark.parametrize('measure',
                         ['layer_cka','layer_rank','layer_probe','look_inside','plasticity','group_accuracy','recover','evaluate'])
def test_a_short_loader_is_not_replaced(dls, measure):
    short = dls.train.new(dls.train.dataset.take(list(range(12))), bs=16)
    assert len(short)==0
    learn = Learner(dls, net(), opt_func=SGD)
    with learn.no_bar():
        if measure in ('layer_cka','layer_rank'): assert getattr(learn, measure)(dl=short).attrs['n']==12
        if measure=='plasticity':
            assert learn.plasticity(dl=short).loc['now'].to_dict()==plasticity_measures(learn.model, short, learn.loss_func)
        if measure=='layer_probe':
            assert (r := learn.layer_probe(train=short, test=short, C=1.)).attrs['n']==12 and r.attrs['n_test']==12
        if measure=='look_inside':
            assert (r := learn.look_inside(train=short, test=short, C=1.)).rank.attrs['n']==12 and r.probe.attrs['n']==12
        if measure=='group_accuracy': assert learn.group_accuracy(sets=short).n.sum()==12
        if measure=='evaluate': assert evaluate(learn, short)==evaluate(learn, fixed_dl(short))
        if measure=='recover':
            assert learn.recover(train=dls.train.new(dls.train.dataset.take(pick(dls.train.dataset.y, 10, stratify=True)), bs=16),
                                 test=short, few=1).attrs['n_test']==12

@loads(what="fastai's `WeightedDL`, with weights of zero", how='works: samples that are never drawn are not measured')
def test_samples_of_no_weight():
    items = [(torch.full((4,), float(i)),i%2) for i in range(40)]
    for kind in (lambda w: WeightedDL(items, bs=8, wgts=w, shuffle=True, num_workers=0),
                 lambda w: torch.utils.data.DataLoader(items, 8,
                                                       sampler=torch.utils.data.WeightedRandomSampler(torch.tensor(w), 40))):
        dl = kind(np.where(np.arange(40)<30, 0., 1.))
        assert [v for x,_ in fixed_dl(dl) for v in x[:,0].tolist()]==list(range(30, 40))
        assert layer_rank(nn.Linear(4, 2), dl, progress=False).n.item()==10

def test_a_subclass_that_makes_other_labels(dls):
    class Next(TensorImages):
        def __getitem__(self, i): x,y = super().__getitem__(i); return x,TensorCategory((y+1)%10)
    ds = Next(dls.train_ds.x, dls.train_ds.y, list(dls.vocab))
    assert read_labels(ds).tolist()==[(int(y)+1)%10 for y in dls.train_ds.y]
    easy = tensor_dls(ds, ds, bs=16, pad=0, flip=False).inject(ColorSquare(4))
    assert easy.valid.dataset.stamps.tolist()==torch.cat([b[1] for b in easy.valid]).tolist()

def test_other_data_are_read_whole(dls, tmp_path):
    "The samples that were chosen for validation are not looked for among those to predict, also after an export"
    _,retain = split_forget(dls, classes=[0,1,2])
    learn = Learner(retain, net(), path=tmp_path)
    images = [o.numpy() for o in dls.valid_ds.x]*2
    x = (torch.stack([TensorImage(o).permute(2,0,1) for o in images]).float()/255-.5)/.5
    with torch.no_grad(): want = learn.model.eval()(x.as_subclass(torch.Tensor)).softmax(1)
    learn.export('e.pkl')
    for o in (learn, load_learner(tmp_path/'e.pkl')):
        with o.no_bar():
            torch.testing.assert_close(o.get_preds(dl=o.dls.test_dl(images))[0], want)
            torch.testing.assert_close(o.predict(images[-1])[2], want[-1])

def test_a_loader_made_anew_has_the_chosen_samples(dls):
    for dl in (subset_dl(dls.valid, 9), split_forget(dls, classes=[0,1,2])[1].valid):
        new = dl.new(bs=4)
        assert len(new)==-(-dl.n//4) and new.n==dl.n and dl_labels(fixed_dl(new)).tolist()==dl_labels(dl).tolist()
