"No experiment is answered with the numbers of another one."
import pandas as pd, pytest, torch
from pairs import compare

@pytest.mark.slow('trains some sixty pairs')
@pytest.mark.filterwarnings('ignore')
def test_changed_pairs(tmp_path):
    "Each trains by itself; and each change that is in the script changes the weights, so that it would have been wrong to share"
    df = pd.DataFrame(compare(tmp_path, pytest.MonkeyPatch.context))
    assert len(df)>=60 and df.own.all(), df[~df.own]
    shown = ['one validation image more','one more','another of the same name','another name']   # these change what is shown
    inside = df[~df.outside & ~df.changed.isin(shown)]
    assert (inside.weights!=inside.unchanged).all(), inside[inside.weights==inside.unchanged]
