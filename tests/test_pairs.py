"No experiment is answered with the numbers of another one."
import pandas as pd, pytest, torch
from pairs import compare

@pytest.mark.filterwarnings('ignore')
def test_changed_pairs(tmp_path):
    "Each trains by itself; and each change that is in the script changes the numbers, so that it would have been wrong to share"
    df = pd.DataFrame(compare(tmp_path, pytest.MonkeyPatch.context))
    assert len(df)>=60 and df.own.all(), df[~df.own]
    inside = df[~df.outside]
    names_only = inside.changed.isin(['another name','one more','another of the same name','one validation image more'])
    assert not inside[~names_only].weights.duplicated().any(), inside[~names_only & inside.weights.duplicated(keep=False)]
