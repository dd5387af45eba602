"""Files that people bring as data sets: recognized by their content, read row by row as lines of JSON.

Knows nothing of the product. `reading.open_rows` is the entry; what it cannot read is a `FormatProblem` that says in
one sentence what the file is. Heavy libraries are imported by the reader that needs them, in a bounded child process.
"""
