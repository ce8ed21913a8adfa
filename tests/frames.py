"Few frames, for trainings of a few steps"
import pandas as pd

def few_frames(table, masks, others, valid=4, test=3):
    "The first frames with masks and without for training, for validation and for the test"
    train = table.part == 'train'
    of = [train & table.labelled, train & ~table.labelled, table.part == 'valid', table.part == 'test']
    return pd.concat([table[o][:n] for o,n in zip(of, (masks, others, valid, test))])
