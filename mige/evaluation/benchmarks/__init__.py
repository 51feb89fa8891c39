"""The benchmarks: rows from their own files, the table of measures, prepared folders."""
