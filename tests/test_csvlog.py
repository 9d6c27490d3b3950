"""Logs are CSV that others read back."""

import csv

from xlstm_ray.csvlog import CsvLog

NAMES = ["seconds", "process_bytes", "x", "y", "z"]  # a file that begins with them is known as a log of ours


def test_values_with_commas_quotes_and_line_ends_are_read_back(tmp_path):
    path, values = tmp_path / "log.csv", ["a,b", 'say "no"', "two\nlines", "", "1.5"]
    log = CsvLog(path, NAMES)
    log.row(*values)
    with open(path, newline="") as file:  # while the log is open
        names, row = csv.reader(file)
    log.close()
    assert names == ["time", *NAMES]
    assert row[1:] == values
    again = CsvLog(path, NAMES, append=True)
    again.row(1, 2, 3, 4, 0.25)
    again.close()
    assert path.read_text().endswith(",1,2,3,4,0.25\n")
    assert path.read_text().count("time") == 1
