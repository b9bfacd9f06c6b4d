"A damaged file is recovered from, or named."
import pandas as pd, pytest
from damages import damages

@pytest.mark.slow('trains again after each of forty damages')
@pytest.mark.filterwarnings('ignore')
def test_damages(tmp_path):
    "Every fifth of those in the table of the documentation; `python tests/damages.py FILE.csv` makes all"
    df = pd.DataFrame(damages(tmp_path, every=5))
    fine = {'the same','the same, with a word','named'}
    assert len(df)>40 and set(df.going_on)<=fine and set(df.reading)<=fine|{''}, df[~df.going_on.isin(fine) | ~df.reading.isin(fine|{''})].to_string()
    assert {'the same, with a word','named'}<=set(df.going_on)|set(df.reading)
