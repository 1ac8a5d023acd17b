"""What tests, `w2s-fast check` and the benchmarks share: sample inputs for every op and one accuracy policy."""
