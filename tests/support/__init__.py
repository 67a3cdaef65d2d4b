"""What the tests share: tiny models and domains, runs, sweeps, comparisons."""
