"""``python -m fusedformer``: what is here and what would run, for a bug report."""

from fusedformer.kernels.common.explain import report

if __name__ == "__main__":
    print(report())
