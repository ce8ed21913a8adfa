"The grid of runs behind the paper's tables, and what its results say: intervals, verdicts, tables and charts."
