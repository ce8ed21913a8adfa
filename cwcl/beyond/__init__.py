"Beyond the paper: what else few masks, many labels and more film allow."
